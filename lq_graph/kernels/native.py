"""Calls of the compiled CPU kernels; `library` tells when there are any. Each returns None if the
kernels do not compute it: then torch does, to the same numbers."""

from __future__ import annotations

import struct
from typing import NoReturn

import torch
from torch import Tensor

from .errors import NotFiniteError
from .layouts import NZ_ROW_BYTES
from .library import is_forked, loaded
from .memory import check_held

__all__ = ["matmul"]

# struct LqMatmul of csrc/call.h
_MATMUL = struct.Struct("17q4i")
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
# With fewer products, a second thread costs more than it saves.
_ONE_THREAD = 1 << 20
# what a kernel returns: enum LqAnswer of csrc/call.h
_DONE, _NO_MEMORY, _NOT_FINITE = 0, 1, 2


def _check_bytes(argument: str, tensor: Tensor, needed: int, width: int) -> None:
    """`check_held` of a contiguous tensor whose bytes are known: a quarter of the time."""
    if tensor.untyped_storage().nbytes() < needed + tensor.storage_offset() * width:
        check_held(argument, tensor)


def _rows_of(x: Tensor, words: int) -> Tensor:
    """x as (m, words), each row contiguous."""
    check_held("x1", x)
    rows = x.reshape(-1, words)
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def _refuse(answer: int) -> NoReturn:
    """Raise the error for an answer of the kernel other than _DONE."""
    if answer == _NOT_FINITE:
        raise NotFiniteError
    if answer == _NO_MEMORY:
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    raise RuntimeError(f"lq_graph: the CPU kernel returned {answer}; run pip install -e . again")


def matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pertoken_scale: Tensor | None,
    output_dtype: torch.dtype,
    nz_shape: tuple[int, int] | None = None,
    prepared: Tensor | None = None,
) -> Tensor | None:
    """`numerics.quant_matmul` with the compiled kernel, or None if the kernel does not compute it.

    The arguments are those of `numerics.quant_matmul`, except the weight. For a weight with batch
    dims it returns None. A FRACTAL_NZ weight is passed as its contiguous blocks, with its ND shape,
    (n, k) or (n, k/8), as nz_shape.
    """
    # Few calls into torch: each takes a tenth of the time of a small layer.
    library = loaded()
    shape, weight_shape = x.shape, nz_shape or weight.shape
    if library is None or len(weight_shape) != 2:
        return None
    n, words = weight_shape
    if not (n and words):
        return None
    width = x.element_size()
    bytes_in_row = words * width
    weight_row, weight_step = bytes_in_row, NZ_ROW_BYTES
    if nz_shape is not None:
        weight_row, weight_step = NZ_ROW_BYTES, weight.stride(0) * width
        _check_bytes("weight", weight, weight.nbytes, width)
    elif weight.is_contiguous():
        _check_bytes("weight", weight, n * bytes_in_row, width)
    else:
        if weight.stride(1) != 1:
            return None
        weight_row = weight.stride(0) * width
        check_held("weight", weight)
    if len(shape) == 2 and x.is_contiguous():
        rows, m, row = x, shape[0], bytes_in_row
        _check_bytes("x1", x, m * row, width)
    else:
        rows = _rows_of(x, words)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    scale_dtype = scale.dtype
    packed = scale_dtype is torch.int64 or scale_dtype is torch.uint64
    scale_size = scale.shape[0]
    if scale.is_contiguous():
        size = 8 if packed else scale_dtype.itemsize
        _check_bytes("scale", scale, scale_size * size, size)
    else:
        check_held("scale", scale)
        scale = scale.contiguous()
    if not packed and scale_dtype is not torch.float32:
        scale = scale.to(torch.float32)
    pertoken = int_bias = float_bias = 0
    if pertoken_scale is not None:
        check_held("pertoken_scale", pertoken_scale)
        if len(shape) != 2 or not pertoken_scale.is_contiguous():
            pertoken_scale = pertoken_scale.expand(shape[:-1]).contiguous()
        pertoken = pertoken_scale.data_ptr()
    if bias is not None:
        if bias.dim() != 1:
            return None
        check_held("bias", bias)
        is_int = bias.dtype is torch.int32
        bias = (bias if is_int else bias.to(torch.float32)).contiguous()
        int_bias, float_bias = (bias.data_ptr(), 0) if is_int else (0, bias.data_ptr())
    out = torch.empty(m, n, dtype=output_dtype)
    threads = 1 if is_forked() or m * n * bytes_in_row < _ONE_THREAD else torch.get_num_threads()
    call = _MATMUL.pack(
        rows.data_ptr(), weight.data_ptr(), 0 if prepared is None else prepared.data_ptr(), scale.data_ptr(), 0, pertoken, int_bias, float_bias,
        out.data_ptr(), m, n, bytes_in_row, row, weight_row, 0 if scale_size == 1 else 1,
        0, weight_step, width == 4, 2 if packed else 0, _OUTPUTS[output_dtype], threads,
    )  # fmt: skip
    answer = library.matmul(call, len(call))
    if answer != _DONE:
        _refuse(answer)
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


def prepare(weight: Tensor) -> Tensor | None:
    library = loaded()
    if library is None or weight.dim() != 2 or not weight.numel() or weight.stride(1) != 1:
        return None
    check_held("weight", weight)
    width = weight.element_size()
    call = _MATMUL.pack(
        0, weight.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, weight.shape[0], weight.shape[1] * width, 0,
        weight.stride(0) * width, 0, 0, 32, width == 4, 0, 0, torch.get_num_threads(),
    )  # fmt: skip
    out = torch.empty(library.prepared_bytes(call, len(call)), dtype=torch.uint8)
    library.prepare(call, len(call), out.data_ptr())
    return out
