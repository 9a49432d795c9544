"""Imports torch and torch_npu on the stand-in: checks that it is possible, and drops the warning
that torch_npu prints if no CANN is installed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys

from cann_host import _native, allocator_keys
from cann_host.missing import correct, without_line
from cann_host.options import CannHostError

__all__ = ["NEEDED", "check_possible", "import_torch_npu"]

# The packages of torch_npu and torchair, as pip names them; the extra npu of lq-graph.
NEEDED = ("torch_npu>=2.7.1,<2.15", "packaging", "protobuf")

# torch_npu's, with a space in some versions
_WARNING = re.compile(r"Warning ?: ASCEND_HOME_PATH environment variable is not set\.")


def check_possible() -> None:
    """Check that the stand-in can take CANN's place in this process.

    Raises:
        CannHostError: another platform, torch is already imported, a CANN is loaded, or there is
            no torch_npu.
    """
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
        needed = " ".join(f'"{package}"' for package in NEEDED)
        raise CannHostError(
            f"torch_npu is not installed. What to do: pip install {needed}; it brings the torch "
            "that it needs. To keep the torch that you have, name the torch_npu of that version."
        )


def import_torch_npu(library: ctypes.CDLL, *, quiet: bool) -> None:
    """Import torch and torch_npu.

    Args:
        library: the native library, loaded.
        quiet: print nothing about allocator settings; the process that started this one did.

    Raises:
        CannHostError: one of them cannot be imported.
    """
    try:
        with without_line(_WARNING), allocator_keys.set_aside(library) as both:
            import torch  # loads torch_npu too, unless autoload is off
            import torch_npu  # noqa: F401
    except Exception as error:
        raise CannHostError(_why_not_imported(error)) from error
    correct()
    if both and not quiet:
        version, _, build = torch.__version__.partition("+")
        build = f" (a {build} build)" if build else ""
        print(
            f"cann_host: torch {version}{build} and torch_npu both register the allocator "
            f"setting{'s' * (len(both) > 1)} {', '.join(both)}. On the stand-in it works; beside a "
            "real CANN expect `import torch_npu` to end the process. There, install the CPU build "
            f"of torch {version}, as the install page of pytorch.org gives it.",
            file=sys.stderr,
        )


def _why_not_imported(error: BaseException) -> str:
    """The cause of a failed import of torch or torch_npu; torch's autoload wraps it in its own
    error."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {error}"
    try:
        torch, torch_npu = map(importlib.metadata.version, ("torch", "torch_npu"))
    except importlib.metadata.PackageNotFoundError:
        return f"torch and torch_npu cannot be imported: {text}"
    train = torch_npu.split(".")[:2]
    if torch.split(".")[:2] != train:
        text += (
            f" (this torch_npu is made for torch {'.'.join(train)}). What to do: install that "
            "torch, or the torch_npu for yours; `python -m lq_graph doctor` gives the commands."
        )
    return f"torch {torch} and torch_npu {torch_npu} cannot be imported: {text}"
