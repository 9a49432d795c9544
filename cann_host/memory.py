"""Raw memory as torch tensors."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FRACTAL_NZ", "flat_over", "over_memory", "view_over"]

FRACTAL_NZ = 29  # its number in aclFormat and in GE's Format

_memoryview = ctypes.pythonapi.PyMemoryView_FromMemory
_memoryview.restype = ctypes.py_object
_memoryview.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE


def over_memory(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
) -> Tensor:
    """A CPU tensor over raw memory, no copy; the memory must outlive it.

    Args:
        address: of the storage.
        dtype: of the elements.
        shape: any.
        strides: in elements; None for row-major.
        offset: of the first element, in elements.
    """
    if 0 in shape:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if strides is None:
        reach = 1
        for size in shape:
            reach *= size
    else:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flat = flat_over(address + offset * dtype.itemsize, dtype, reach)
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)


view_over = lru_cache(maxsize=1 << 14)(over_memory)
view_over.__doc__ = """`over_memory`, once for the same arguments: the caller must not change the
metadata of the tensor."""


@lru_cache(maxsize=1 << 14)
def flat_over(address: int, dtype: torch.dtype, count: int) -> Tensor:
    """A CPU tensor of one dim over raw memory, no copy. The caller must not change its metadata:
    later calls with the same arguments return the same tensor."""
    memory = _memoryview(address, count * dtype.itemsize, _WRITABLE)
    with torch.inference_mode(False):  # it outlives the mode of this call
        return torch.frombuffer(memory, dtype=dtype)
