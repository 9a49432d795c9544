"""What calls of the compiled kernels have in common: structs, fields of tensors, answers."""

from __future__ import annotations

import struct
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .errors import NotFiniteError
from .layouts import NZ_ROW_BYTES
from .library import is_forked
from .memory import check_held

__all__ = [
    "DONE",
    "FLOATS",
    "MATMUL",
    "OUTPUTS",
    "QUANTIZE",
    "STATIC",
    "StoredWeight",
    "address_of",
    "bias_of",
    "check_bytes",
    "float_rows",
    "kind_of_scale",
    "refuse",
    "rows_of",
    "threads_for",
    "values_of",
    "weight_of",
]

# structs LqMatmul and LqQuantize of csrc/call.h
MATMUL: struct.Struct = struct.Struct("17q4i")
QUANTIZE: struct.Struct = struct.Struct("9q4i")
OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # enum LqFloat of csrc/call.h
STATIC = 5  # in enum LqArithmetic of csrc/call.h, after those of dynamic_quant
_FLOAT, _FOLDED, _PACKED = range(3)  # enum LqScale of csrc/call.h
_PACKED_DTYPES = (torch.int64, torch.uint64)
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


def rows_of(argument: str, x: Tensor, words: int) -> Tensor:
    """x as (m, words), each row contiguous."""
    check_held(argument, x)
    rows = x.reshape(-1, words)
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def float_rows(x: Tensor, k: int, width: int) -> tuple[Tensor, int, int]:
    """x as rows of k values of `width` bytes; their number; and the bytes from one to the next."""
    if x.is_contiguous():
        m, row = x.numel() // k, k * width
        check_bytes("x", x, m * row, width)
        return x, m, row
    rows = rows_of("x", x, k)
    return rows, rows.shape[0], rows.stride(0) * width


def address_of(tensor: Tensor | None) -> int:
    """The address of a tensor's values; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def kind_of_scale(dtype: torch.dtype, folds: bool) -> int:
    """In enum LqScale of csrc/call.h, the kind of a scale of a dtype."""
    return _PACKED if dtype in _PACKED_DTYPES else _FOLDED if folds else _FLOAT


def values_of(argument: str, values: Tensor) -> Tensor:
    """A scale or an offset as the kernels read it: contiguous, float32 or packed."""
    dtype = values.dtype
    if values.is_contiguous():
        size = dtype.itemsize
        check_bytes(argument, values, values.shape[0] * size, size)
    else:
        check_held(argument, values)
        values = values.contiguous()
    return values if dtype is torch.float32 or dtype in _PACKED_DTYPES else values.float()


def bias_of(bias: Tensor) -> tuple[Tensor, int, int]:
    """A bias as the kernels read it, which must live until the call; and its address as int_bias
    and as float_bias of struct LqMatmul."""
    check_held("bias", bias)
    is_int = bias.dtype is torch.int32
    bias = (bias if is_int else bias.float()).contiguous()
    return (bias, bias.data_ptr(), 0) if is_int else (bias, 0, bias.data_ptr())


def threads_for(steps: int, one_thread: int = _ONE_THREAD) -> int:
    """How many threads a call of so many steps uses: one if they are fewer than `one_thread`; of
    many threads, as many as have half of that each."""
    if steps < one_thread or is_forked():
        return 1
    return min(torch.get_num_threads(), 2 * steps // one_thread)


def refuse(answer: int) -> NoReturn:
    """Raise the error for an answer of the kernels other than DONE."""
    if answer == _NOT_FINITE:
        raise NotFiniteError
    if answer == _NO_MEMORY:
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    raise RuntimeError(f"lq_graph: the CPU kernel returned {answer}; run pip install -e . again")
