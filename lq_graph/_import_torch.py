"""Imports torch, before any other module of this package that needs it. torch loads torch_npu,
which fails without CANN. Its error does not say what to do; the error raised here does."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def _for_the_command_line() -> bool:
    """Whether this is `python -m lq_graph` or the console script `lq-graph`, where --help and some
    commands must work without torch, and others without a device. A command that needs a device
    imports torch_npu itself. While -m imports a package, sys.argv is -m and the arguments."""
    if os.path.basename(sys.argv[0] if sys.argv else "") in ("lq-graph", "lq-graph.exe"):
        return True
    called = sys.orig_argv[-len(sys.argv) :][:1]
    return sys.argv[:1] == ["-m"] and bool(called and re.fullmatch(r"(-\w*m)?lq_graph", called[0]))


# whether the package imports torch at once; on the command line, the commands that need it do
AT_ONCE = not _for_the_command_line()


@contextmanager
def _without_autoload() -> Iterator[None]:
    before = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = before


def _why(error: RuntimeError) -> str:
    """Why torch_npu, and so torch, cannot be imported, and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if "cannot open shared object file" in str(cause):
        return (
            "lq_graph: torch_npu is installed, but neither CANN nor cann_host is active in this "
            "process, so torch itself cannot be imported. What to do: with an NPU, source CANN's "
            "set_env.sh first; without one, run `python -m cann_host your_script.py` (a stand-in "
            "for CANN that computes on the CPU); for plain CPU use, set "
            f"{_AUTOLOAD}=0."
        )
    return (
        "lq_graph: torch_npu is installed and cannot be imported, so torch itself cannot be "
        f"imported: {type(cause).__name__}: {cause}. What to do: run `python -m lq_graph doctor`, "
        "which finds the cause; uninstall torch_npu; or, for plain CPU use, set "
        f"{_AUTOLOAD}=0."
    )


def import_torch() -> None:
    """Import torch.

    Raises:
        ImportError: it cannot be imported; the text says what to do.
    """
    try:
        if not AT_ONCE:
            with _without_autoload():
                import torch
            return
        if "torch" not in sys.modules and os.environ.get(_AUTOLOAD, "1") == "1":
            from ._cuda_build import why_import_would_abort

            if why := why_import_would_abort():
                raise ImportError(why)
        import torch  # noqa: F401
    except RuntimeError as error:
        if "torch_npu" not in str(error):
            raise
        raise ImportError(_why(error)) from None
