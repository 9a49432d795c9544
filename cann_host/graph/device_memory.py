"""The caller's memory as values of a graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.graph.executor import FractalNZ, GraphError
from cann_host.memory import FRACTAL_NZ, over_memory
from lq_graph.kernels import NzWeight, nz_to_nd

__all__ = ["bytes_at", "with_format"]

# Formats whose storage is the plain row-major tensor: NCHW, NHWC, ND, NCDHW, ...
_PLAIN_FORMATS = frozenset({0, 1, 2, 27, 30, 35, 47})


def bytes_at(address: int) -> int:
    """How many bytes of device memory begin at an address."""
    found: int = runtime.current().library.cann_host_bytes_at(address)
    return found


def _over(address: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size or (needed and not address):
        raise GraphError(
            f"a tensor of shape {shape} takes {needed} bytes, and its memory has {size}"
        )
    if needed and address % dtype.itemsize:
        raise GraphError(f"a {dtype} tensor at {address:#x}, not a multiple of the element size")
    return over_memory(address, dtype, shape)


def with_format(
    address: int,
    size: int,
    dtype: torch.dtype,
    form: int,
    shape: tuple[int, ...],
    storage: tuple[int, ...],
) -> Tensor | FractalNZ:
    """A value over the caller's memory, no copy.

    Args:
        address, size: of the memory, in bytes.
        dtype: of the elements.
        form: its format, as GE numbers them.
        shape: as torch sees it.
        storage: shape in memory, for FRACTAL_NZ.

    Raises:
        GraphError: the memory is too small or not aligned, or the format is not implemented.
    """
    form &= 0xFF  # the bits above hold sub-formats
    if form in _PLAIN_FORMATS:
        return _over(address, size, dtype, shape)
    if form != FRACTAL_NZ:
        raise GraphError(f"a tensor of shape {shape} has format {form}, which is not implemented")
    if len(storage) != len(shape) + 2:
        raise GraphError(f"a FRACTAL_NZ tensor of shape {shape} has storage shape {storage}")
    blocks = _over(address, size, dtype, storage)
    return FractalNZ(
        torch.empty(shape, dtype=dtype, device="meta"),
        storage,
        lambda: nz_to_nd(blocks, *shape[-2:]),
        NzWeight(blocks, *shape) if NzWeight.fits(blocks, shape) else None,
    )
