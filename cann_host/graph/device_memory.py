"""The caller's memory as values of a graph."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cann_host import runtime, weights
from cann_host.bindings import GeTensor
from cann_host.graph.executor import FractalNZ, GraphError, torch_dtype
from cann_host.memory import FRACTAL_NZ, over_memory
from lq_graph.kernels import NzWeight, nz_to_nd

__all__ = ["Input", "Inputs", "bytes_at", "with_format"]

# Formats whose storage is the plain row-major tensor: NCHW, NHWC, ND, NCDHW, ...
_PLAIN_FORMATS = frozenset({0, 1, 2, 27, 30, 35, 47})


class Input(NamedTuple):
    """An input of a graph in the caller's memory.

    Attributes:
        value: over the memory, no copy.
        address: of the memory; 0 for none.
    """

    value: Tensor | FractalNZ
    address: int


class Inputs:
    """Reads the inputs of a graph. What was read is kept while the caller passes the same memory;
    the library looks at each run whether the memory still has its size."""

    def __init__(self) -> None:
        self._last: tuple[bytes, bytes, list[Input]] = (b"", b"", [])

    def read(self, tensors: int, count: int, dims: int, dim_count: int) -> list[Input]:
        """The inputs of a run.

        Args:
            tensors, count: address of GeTensors, and how many.
            dims, dim_count: address of the dims of all, and how many.

        Raises:
            GraphError: memory is too small or not aligned, or a dtype or format is not implemented.
        """
        last, last_dims, inputs = self._last
        now = ctypes.string_at(tensors, _SIZE * count)
        now_dims = ctypes.string_at(dims, 8 * dim_count)
        if now == last and now_dims == last_dims:
            return inputs
        known = dict(zip(_parts(last), inputs, strict=True)) if now_dims == last_dims else {}
        all_dims = (ctypes.c_int64 * dim_count).from_buffer_copy(now_dims)[:]
        inputs = [known.get(part) or _read(part, all_dims) for part in _parts(now)]
        self._last = (now, now_dims, inputs)
        return inputs


_SIZE = ctypes.sizeof(GeTensor)


def _parts(tensors: bytes) -> list[bytes]:
    return [tensors[at : at + _SIZE] for at in range(0, len(tensors), _SIZE)]


def _read(part: bytes, dims: Sequence[int]) -> Input:
    tensor = GeTensor.from_buffer_copy(part)
    first, last = tensor.first_dim, tensor.first_dim + tensor.dim_count
    storage = tuple(dims[first:last])
    shape = tuple(dims[last : last + tensor.origin_dim_count]) if tensor.has_origin else storage
    dtype, address = torch_dtype(tensor.dtype, "an input"), tensor.data or 0
    return Input(with_format(address, tensor.size, dtype, tensor.format, shape, storage), address)


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


def _nd(blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
    """FRACTAL_NZ blocks in the caller's memory as ND, kept until their bytes are written."""
    place = blocks.data_ptr(), blocks.nbytes
    kind = ("ND", blocks.dtype, tuple(blocks.shape), shape)
    return weights.converted(kind, *place, lambda: nz_to_nd(blocks, *shape[-2:]))


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
        partial(_nd, blocks, shape),
        NzWeight(blocks, *shape) if NzWeight.fits(blocks, shape) else None,
    )
