"""Looks, before torch is imported, whether torch_npu would end the process beside this torch.

From torch 2.10 on, the CUDA half of torch and torch_npu register allocator settings of the same
names in c10 (c10/core/AllocatorConfig.h). The second registration throws while a library is loaded,
which no Python can catch. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["why_import_would_abort"]

_REGISTERS = (
    b"getMutableKeys"  # c10's set of the settings' names; torch_npu's libraries refer to it
)
_ERROR = "Duplicated key"
_SECONDS = 300  # an import from a slow disk takes a minute
# Set in the process that tries: if its Python imports lq_graph at its start, it must not try again.
_TRIES = "LQ_GRAPH_TRIES_IMPORT"


def why_import_would_abort() -> str:
    """Why `import torch` would end this process, and what to do; "" if it would not.

    An import in a process of its own decides. It costs some seconds, and is tried only with a CUDA
    build of torch beside a torch_npu that registers settings.
    """
    if _TRIES in os.environ or not (_library("torch", "libc10_cuda.so") and _registers()):
        return ""
    try:
        tried = subprocess.run(
            # the same torch: with -c, Python looks into the current folder first
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; import torch"],
            env={**os.environ, _TRIES: "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    if tried.returncode == 0 or _ERROR not in tried.stderr:
        return ""
    torch, torch_npu = _version("torch"), _version("torch_npu")
    release = torch.partition("+")[0]
    return (
        f"lq_graph: torch {torch} is a CUDA build. With it, importing torch_npu {torch_npu} ends "
        "the process, because both register the same allocator settings. What to do: install the "
        f"CPU build of torch {release}, as the install page of pytorch.org gives it."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except Exception:  # absent, as for a folder in PYTHONPATH, or damaged
        return "of an unknown version"


def _library(package: str, name: str) -> Path | None:
    """The path of a library of a package that is not imported."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder, "lib", name)).is_file():
            return path
    return None


def _registers() -> bool:
    """Whether the installed torch_npu registers settings in c10's set."""
    path = _library("torch_npu", "libtorch_npu.so")
    if path is None:
        return False
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            return text.find(_REGISTERS) >= 0
    except (OSError, ValueError):  # not readable, or empty
        return False
