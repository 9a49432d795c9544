"""A stand-in for CANN: the real torch_npu and torchair on any Linux machine, computed on the CPU.

    python -m cann_host script.py [args]        run a script
    python -m cann_host -m module [args]        run a module, pytest for example

or, before anything imports torch:

    import cann_host
    cann_host.activate()

It shows that the wheels' Python and C++ accept a program and that its graphs mean what CANN's
documents say. It does not show what a chip does.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import sys
from typing import Any

__all__ = ["CannHostError", "activate", "info", "is_active"]

CANN_VERSION = "9.1.0"
DEFAULT_SOC = "Ascend910B2"
SOC_VARIABLE = "CANN_HOST_SOC"

_active: dict[str, Any] | None = None


class CannHostError(RuntimeError):
    """The stand-in cannot be activated; the text says what to do."""


def is_active() -> bool:
    """Whether this process runs on the stand-in."""
    return _active is not None


def info() -> dict[str, Any]:
    """What the stand-in is in this process: versions, SoC, libraries; `active` says whether."""
    from cann_host import _native

    directory = _native.library_directory()
    return {
        "active": is_active(),
        "cann_version": CANN_VERSION,
        "soc": DEFAULT_SOC if _active is None else _active["soc"],
        "libraries": None if directory is None else str(directory),
        "aten_fallbacks": 0 if _active is None else _active["aten_fallbacks"],
    }


def activate(soc: str | None = None) -> None:
    """Put the stand-in in the place of CANN in this process, and import torch and torch_npu.

    Call it before anything imports torch. A second call does nothing.

    Args:
        soc: the product to report, as CANN names it; default the variable CANN_HOST_SOC, else
            Ascend910B2.

    Raises:
        CannHostError: it cannot be done here; the text says why and what to do.
    """
    global _active
    if _active is not None:
        if soc is not None and soc != _active["soc"]:
            raise CannHostError(
                f"cann_host is already active as {_active['soc']}; start another process for {soc}."
            )
        return
    soc = soc or os.environ.get(SOC_VARIABLE) or DEFAULT_SOC
    library = _load(soc)
    # With its task queue on, torch_npu reports the first failed launch late and then drops every
    # later launch in silence, leaving garbage in the results; and some of its waits hold the
    # interpreter lock that the queue's thread needs here. Without, each launch fails where it is.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    _import_torch_npu()

    from cann_host import aclnn, fallback, ge

    aclnn.install(library, soc)
    ge.install(library)
    count = fallback.install(library)
    _active = {"soc": soc, "aten_fallbacks": count}
    print(
        f"cann_host: no NPU here; a stand-in for CANN {CANN_VERSION} ({soc}) computes on the CPU",
        file=sys.stderr,
    )


def _load(soc: str) -> ctypes.CDLL:
    """Check that activation is possible and load the native libraries."""
    from cann_host import _native

    if not sys.platform.startswith("linux"):
        raise CannHostError(f"cann_host runs on Linux only, and this is {sys.platform}.")
    if "torch" in sys.modules:
        raise CannHostError(
            "torch is already imported: call cann_host.activate() before the first import of "
            "torch, or start the program with `python -m cann_host`."
        )
    real = _native.loaded_libraries("libascendcl.so")
    if real:
        raise CannHostError(
            f"a CANN is already loaded in this process ({real[0]}); cann_host does not replace it."
        )
    if importlib.util.find_spec("torch_npu") is None:
        raise CannHostError(
            'torch_npu is not installed: pip install "lq-graph[npu]" brings the version this was '
            "made for."
        )
    directory = _native.library_directory()
    if directory is None:
        raise CannHostError(
            "cann_host's native libraries were not built, because no C++ compiler was found when "
            "lq-graph was installed: install one (apt-get install g++) and install lq-graph again."
        )
    library = _native.load(directory)
    library.cann_host_set_soc.argtypes = (ctypes.c_char_p,)
    library.cann_host_set_soc.restype = None
    library.cann_host_set_soc(soc.encode())
    return library


class _WithoutLine:
    """A text stream that drops one exact line; the rest goes to the stream behind it."""

    def __init__(self, stream: Any, line: str) -> None:
        self._stream = stream
        self._line = line
        self._dropped = False

    def write(self, text: str) -> int:
        if text == self._line:
            self._dropped = True
        elif self._dropped and text == "\n":  # print() writes its line end apart
            self._dropped = False
        else:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _import_torch_npu() -> None:
    stdout = sys.stdout
    # torch_npu warns on stdout that no CANN is installed, which is the point of this package.
    line = "Warning: ASCEND_HOME_PATH environment variable is not set."
    sys.stdout = _WithoutLine(stdout, line)
    # At exit handlers run in reverse: _drain, torch_npu's own, _leave.
    atexit.register(_leave)
    try:
        import torch  # noqa: F401 - loads torch_npu too, unless autoload is off
        import torch_npu  # noqa: F401
    finally:
        sys.stdout = stdout
    atexit.register(_drain)


def _drain() -> None:
    """Finish the launches in torch_npu's queue while their Python can still run.

    torch_npu would wait for them with the interpreter lock held, for ever.
    """
    import torch_npu

    if torch_npu.npu.is_initialized():
        torch_npu.npu.synchronize()


def _leave() -> None:
    from cann_host import aclnn

    aclnn.uninstall()
