"""Tensors in memory: whether their storage holds them, and copies with the strides that a kernel
needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from .errors import ShortStorageError

__all__ = ["aligned", "cache_sized", "check_held", "row_major", "without_overlap"]


def check_held(argument: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage is shorter than its shape: it would be read beyond its end.

    Raises:
        ShortStorageError: its storage is shorter; `argument` is its name.
    """
    if type(tensor) not in (Tensor, Parameter) or not tensor.numel():
        return  # a subclass may have no memory of its own
    # torch checks this when a storage is set, not when it shrinks.
    before = tensor.storage_offset()
    if tensor.is_contiguous():
        needed = int(before + tensor.numel()) * tensor.element_size()
    else:
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = before + sum((size - 1) * stride for size, stride in sizes)
        needed = int(last + 1) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if held < needed:
        raise ShortStorageError(argument, tuple(tensor.shape), needed, held)


def cache_sized(count: int) -> Iterator[slice]:
    """Slices of a long vector, so that the passes over each stay in the cache: 5 to 10 times
    faster than whole passes over a large weight."""
    step = 1 << 20
    for start in range(0, count, step):
        yield slice(start, start + step)


def row_major(x: Tensor) -> Tensor:
    """x contiguous, with the strides that a view of another dtype needs; a dim of 1 may have any
    stride in a contiguous tensor."""
    x, expected = x.contiguous(), 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != expected:
            return x.clone(memory_format=torch.contiguous_format)
        expected *= size
    return x


def aligned(x: Tensor) -> Tensor:
    """x contiguous, and laid out so that it can be viewed in 8-byte words."""
    x = row_major(x)
    return x.clone() if x.storage_offset() * x.element_size() % 8 else x


def without_overlap(x: Tensor) -> Tensor:
    """torch._int_mm (2.13, CPU) gives garbage for rows or columns that share memory."""
    rows, cols = x.stride()[-2:]
    plain = (cols == 1 and rows >= x.shape[-1]) or (rows == 1 and cols >= x.shape[-2])
    return x if plain else x.clone(memory_format=torch.contiguous_format)
