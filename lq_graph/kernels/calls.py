"""What calls of the compiled kernels have in common: structs, fields of a weight, answers."""

from __future__ import annotations

import struct
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .errors import NotFiniteError
from .layouts import NZ_ROW_BYTES
from .library import is_forked
from .memory import check_held

__all__ = ["DONE", "MATMUL", "StoredWeight", "check_bytes", "refuse", "threads_for", "weight_of"]

# struct LqMatmul of csrc/call.h
MATMUL: struct.Struct = struct.Struct("17q4i")
# what a kernel returns: enum LqAnswer of csrc/call.h
DONE, _NO_MEMORY, _NOT_FINITE = 0, 1, 2
# With fewer products, a second thread costs more than it saves.
_ONE_THREAD = 1 << 18


class StoredWeight(NamedTuple):
    """How the kernels read a weight: fields of struct LqMatmul."""

    address: int
    n: int
    row_bytes: int
    stride: int
    step: int
    int4: bool


def weight_of(weight: Tensor, nz_shape: tuple[int, int] | None = None) -> StoredWeight | None:
    """The fields of a weight; None if the kernels do not read it: with batch dims, empty or
    transposed.

    Args:
        weight: int8 (n, k) or int32 (n, k/8), or its contiguous FRACTAL_NZ blocks.
        nz_shape: the shape in ND, for such blocks.
    """
    shape = nz_shape or weight.shape
    if len(shape) != 2:
        return None
    n, words = shape
    if not (n and words):
        return None
    width = weight.element_size()
    row = words * width
    if nz_shape is not None:
        check_bytes("weight", weight, weight.nbytes, width)
        step = weight.stride(0) * width
        return StoredWeight(weight.data_ptr(), n, row, NZ_ROW_BYTES, step, width == 4)
    stride = row
    if weight.is_contiguous():
        check_bytes("weight", weight, n * row, width)
    else:
        if weight.stride(1) != 1:
            return None
        stride = weight.stride(0) * width
        check_held("weight", weight)
    return StoredWeight(weight.data_ptr(), n, row, stride, NZ_ROW_BYTES, width == 4)


def check_bytes(argument: str, tensor: Tensor, needed: int, width: int) -> None:
    """`check_held` of a contiguous tensor whose bytes are known: a quarter of the time."""
    if tensor.untyped_storage().nbytes() < needed + tensor.storage_offset() * width:
        check_held(argument, tensor)


def threads_for(steps: int, one_thread: int = _ONE_THREAD) -> int:
    """How many threads a call of so many steps uses: one if they are fewer than `one_thread`."""
    return 1 if steps < one_thread or is_forked() else torch.get_num_threads()


def refuse(answer: int) -> NoReturn:
    """Raise the error for an answer of the kernels other than DONE."""
    if answer == _NOT_FINITE:
        raise NotFiniteError
    if answer == _NO_MEMORY:
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    raise RuntimeError(f"lq_graph: the CPU kernel returned {answer}; run pip install -e . again")
