"""Raw memory as torch tensors."""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["FRACTAL_NZ", "flat_over", "has_overlap", "offsets", "over_memory", "view_over"]

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


def offsets(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The place of each element of a strided tensor, in elements from the first; of one dim."""
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, stride in zip(shape, strides, strict=True):
        places = places[..., None] + torch.arange(size, device="cpu") * stride
    return places.flatten()


@lru_cache(maxsize=1 << 12)
def has_overlap(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements of a strided tensor share memory."""
    count = math.prod(shape)
    if count == 0:
        return False
    if count > 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)):
        return True
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= reach:
            return len(offsets(shape, strides).unique()) < count
        reach += (size - 1) * stride
    return False
