"""Calls of the compiled CPU kernels; `library` tells when there are any. Each returns None if the
kernels do not compute it: then torch does, to the same numbers."""

from __future__ import annotations

import struct
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from .errors import NotFiniteError
from .layouts import NZ_ROW_BYTES
from .library import is_forked, loaded
from .memory import check_held

__all__ = ["dynamic_quant", "matmul", "static_quant"]

# struct LqMatmul of csrc/call.h
_MATMUL = struct.Struct("17q4i")
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
# struct LqQuantize of csrc/call.h
_QUANTIZE = struct.Struct("9q4i")
_FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATIC = 5  # in enum LqArithmetic, after those of dynamic_quant
# With fewer products, or values, a second thread costs more than it saves.
_ONE_THREAD, _ONE_THREAD_VALUES = 1 << 20, 1 << 15
_CPU = torch.device("cpu")  # whatever the default device is
# what a kernel returns: enum LqAnswer of csrc/call.h
_DONE, _NO_MEMORY, _NOT_FINITE = 0, 1, 2


def _check_bytes(argument: str, tensor: Tensor, needed: int, width: int) -> None:
    """`check_held` of a contiguous tensor whose bytes are known: a quarter of the time."""
    if tensor.untyped_storage().nbytes() < needed + tensor.storage_offset() * width:
        check_held(argument, tensor)


def _rows_of(argument: str, x: Tensor, words: int) -> Tensor:
    """x as (m, words), each row contiguous."""
    check_held(argument, x)
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
        rows = _rows_of("x1", x, words)
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


def _has_memory(x: Tensor) -> bool:
    """Whether x is a plain tensor of the CPU."""
    return type(x) in (Tensor, Parameter) and x.is_cpu


def _quantize(
    x: Tensor,
    bits: int,
    packed: bool,
    arithmetic: int,
    scale: int,
    factor: int = 0,
    offset: int = 0,
    factor_stride: int = 0,
) -> Tensor | None:
    """Rows of x, quantized; scale, factor and offset are addresses."""
    library, dtype, shape = loaded(), _FLOATS.get(x.dtype), x.shape
    k = shape[-1]
    if library is None or dtype is None or not k or (packed and k % 8):
        return None
    width = 4 if dtype == 2 else 2
    if x.is_contiguous():
        rows, m, row = x, x.numel() // k, k * width
        _check_bytes("x", x, m * row, width)
    else:
        rows = _rows_of("x", x, k)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    # sizes one by one take half the time of a shape
    sizes, last, stored = shape[:-1], k // 8 if packed else k, torch.int32 if packed else torch.int8
    out = torch.empty(*sizes, last, dtype=stored, device=_CPU)
    threads = 1 if m * k < _ONE_THREAD_VALUES or is_forked() else torch.get_num_threads()
    call = _QUANTIZE.pack(
        rows.data_ptr(), factor, offset, out.data_ptr(), scale, m, k, row, factor_stride,
        dtype, arithmetic, 0 if bits == 8 else 1 if packed else 2, threads,
    )  # fmt: skip
    answer = library.quantize(call, len(call))
    if answer != _DONE:
        _refuse(answer)
    return out


def dynamic_quant(
    x: Tensor, bits: int, arithmetic: int, packed: bool
) -> tuple[Tensor, Tensor] | None:
    """`activations.dynamic_quant` with the compiled kernel, or None if the kernel does not compute
    it: x is not in the CPU's memory, or empty.

    Args:
        x, bits, packed: as `activations.dynamic_quant` takes them.
        arithmetic: a number of enum LqArithmetic of csrc/call.h.
    """
    if not _has_memory(x):
        return None
    shape = x.shape
    scale = torch.empty(shape[0] if len(shape) == 2 else shape[:-1], device=_CPU)
    values = _quantize(x, bits, packed, arithmetic, scale.data_ptr())
    return None if values is None else (values, scale)


def static_quant(
    x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None, axis: int, bits: int, packed: bool
) -> Tensor | None:
    """`activations.static_quant` with the compiled kernel, or None if the kernel does not compute
    it: as for `dynamic_quant`, or an argument has another dtype than x, or another axis than the
    last has more than one scale.
    """
    size = scale_reciprocal.numel()
    if size != 1 and (size != x.shape[-1] or axis not in (-1, x.dim() - 1)):
        return None
    addresses = [0, 0]
    columns = {"scale_reciprocal": scale_reciprocal, "offset": offset}
    for i, (name, tensor) in enumerate(columns.items()):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.numel() != size or not _has_memory(tensor):
            return None
        check_held(name, tensor)
        columns[name] = tensor = tensor.contiguous()  # it must live until the call
        addresses[i] = tensor.data_ptr()
    if not _has_memory(x):
        return None
    return _quantize(x, bits, packed, _STATIC, 0, *addresses, size > 1)
