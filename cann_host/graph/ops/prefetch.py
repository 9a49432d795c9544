"""Cmo, a prefetch. It changes no value; cann_host.info() says how many there were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.graph import executor
from cann_host.graph.executor import FractalNZ, GraphError, Int4, op

_PREFETCH = 6  # of the attribute type: the only one that torchair sets


def _bytes(value: Any) -> int:
    """The bytes of a value on the device, as far as they are known."""
    like = value.like if isinstance(value, FractalNZ) else value
    if isinstance(like, Int4):
        return like.shape.numel() // 2
    assert isinstance(like, Tensor)
    return like.numel() * like.itemsize


# A prefetch of a constant is done at run time too.
@op("Cmo", accepts_internal_formats=True, only_at_run_time=True)
def _cmo(src: Any, *, max_size: int, type: int = _PREFETCH, offset: int = 0) -> Tensor:
    if type != _PREFETCH:
        raise GraphError(f"type {type} is not implemented by cann_host; it does {_PREFETCH}")
    size = _bytes(src)
    if max_size <= 0 or not 0 <= offset < max(size, 1):
        raise GraphError(
            f"max_size is {max_size} and offset {offset}; max_size must be positive, and offset in "
            f"src, which has {size} bytes"
        )
    if executor.is_meta(src):
        return torch.empty(0, device="meta")
    if runtime.is_active():
        runtime.current().library.cann_host_count_prefetch()
    return torch.empty(0)
