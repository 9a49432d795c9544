"""The variables that change what torch, torch_npu, torchair, CANN, cann_host or lq_graph do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os.path import isfile  # unlike Path's, it raises no error
from pathlib import Path

from .cann import LIBRARY

__all__ = ["AUTOLOAD", "autoload_is_off", "variables_that_matter"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"

_NAMES = {
    AUTOLOAD,
    "TASK_QUEUE_ENABLE",
    "INF_NAN_MODE_ENABLE",
    "COMBINED_ENABLE",
    "CPU_AFFINITY_CONF",
    "MULTI_STREAM_MEMORY_REUSE",
    "PER_STREAM_QUEUE",
    "STREAMS_PER_DEVICE",
    "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_NPU_MEMORY_CACHING",
    "OMP_NUM_THREADS",
    "OMP_THREAD_LIMIT",
    "CXX",
    "LD_PRELOAD",
}
_BEGINNINGS = (
    "LQ_GRAPH_",
    "CANN_HOST_",
    "ASCEND_",
    "ACL_",
    "HCCL_",
    "NPU_",
    "TORCH_NPU_",
    "TORCH_HCCL_",
    "TORCHAIR_",
    "TORCHINDUCTOR_",
    "TORCHDYNAMO_",
)
_LIBRARIES = "LD_LIBRARY_PATH"  # of it, only the folders that concern CANN
_ABOUT_CANN = ("ascend", "cann")


def autoload_is_off(environ: Mapping[str, str]) -> bool:
    """Whether `import torch` leaves torch_npu alone."""
    return environ.get(AUTOLOAD) == "0"


def variables_that_matter(environ: Mapping[str, str]) -> dict[str, str]:
    """Those that are set, by name."""
    found = {
        name: value
        for name, value in environ.items()
        if name in _NAMES or name.startswith(_BEGINNINGS)
    }
    folders = [
        folder
        for folder in environ.get(_LIBRARIES, "").split(os.pathsep)
        if any(word in folder.lower() for word in _ABOUT_CANN) or isfile(Path(folder, LIBRARY))
    ]
    if folders:
        found[_LIBRARIES] = os.pathsep.join(folders)
    return dict(sorted(found.items()))
