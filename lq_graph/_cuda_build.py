"""Looks, before torch is imported, whether torch_npu would end the process beside this torch.

From torch 2.10 on, the CUDA half of torch registers allocator settings in c10
(c10/core/AllocatorConfig.h); torch_npu 2.10.0.post7 and later register settings of the same names.
The second registration throws while a library is loaded, which no Python can catch. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .doctor.packages import find_torch, find_torch_npu

__all__ = ["why_import_would_abort"]

_ERROR = "Duplicated key"
_SECONDS = 300  # an import from a slow disk takes a minute
# Set in the process that tries: if its Python imports lq_graph at its start, it must not try again.
_TRIES = "LQ_GRAPH_TRIES_IMPORT"


def why_import_would_abort() -> str:
    """Why `import torch` would end this process, and what to do; "" if it would not.

    An import in a process of its own decides. It costs some seconds, and is tried only with a CUDA
    build of torch beside a torch_npu that registers settings.
    """
    if _TRIES in os.environ:
        return ""
    torch = find_torch()
    if torch is None or not torch.registers_allocator_keys:
        return ""
    torch_npu = find_torch_npu()
    if torch_npu is None or not torch_npu.registers_allocator_keys:
        return ""
    try:
        tried = subprocess.run(
            # the same torch: with -c, Python looks into the current folder first
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:] = {[*map(str, sys.path)]}; import torch",
            ],
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
    return (
        f"lq_graph: torch {torch.version} is a CUDA build. With it, importing torch_npu "
        f"{torch_npu.version} ends the process, because both register the same allocator settings. "
        f"What to do: install the CPU build of torch {torch.version.partition('+')[0]}, as the "
        "install page of pytorch.org gives it."
    )
