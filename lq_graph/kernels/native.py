"""Calls of the compiled CPU kernels; `library` tells when there are any. Each returns None if the
kernels do not compute it: then torch does, to the same numbers."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .calls import DONE, MATMUL, check_bytes, refuse, threads_for, weight_of
from .library import loaded
from .memory import check_held
from .prepared import prepared_of

__all__ = ["dynamic_quant", "layer", "matmul", "static_quant"]

QUANTIZE = struct.Struct("9q4i")  # struct LqQuantize of csrc/call.h
_LAYER = struct.Struct(QUANTIZE.format + MATMUL.format)
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
_FLOAT, _FOLDED, _PACKED = range(3)  # enum LqScale of csrc/call.h
_FLOATS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_STATIC = 5  # in enum LqArithmetic, after those of dynamic_quant
# With fewer values to quantize, a second thread costs more than it saves.
_ONE_THREAD_VALUES = 1 << 16
_PLAIN = (Tensor, Parameter)  # a subclass may have no memory of its own
_CPU = torch.device("cpu")  # whatever the default device is
_PACKED_DTYPES = (torch.int64, torch.uint64)


def _rows_of(argument: str, x: Tensor, words: int) -> Tensor:
    """x as (m, words), each row contiguous."""
    check_held(argument, x)
    rows = x.reshape(-1, words)
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def _float_rows(x: Tensor, k: int, width: int) -> tuple[Tensor, int, int]:
    """x as rows of k values of `width` bytes; their number; and the bytes from one to the next."""
    if x.is_contiguous():
        m, row = x.numel() // k, k * width
        check_bytes("x", x, m * row, width)
        return x, m, row
    rows = _rows_of("x", x, k)
    return rows, rows.shape[0], rows.stride(0) * width


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _values(argument: str, values: Tensor) -> Tensor:
    """A scale or an offset as the kernels read it: contiguous, float32 or packed."""
    dtype = values.dtype
    if values.is_contiguous():
        size = dtype.itemsize
        check_bytes(argument, values, values.shape[0] * size, size)
    else:
        check_held(argument, values)
        values = values.contiguous()
    return values if dtype is torch.float32 or dtype in _PACKED_DTYPES else values.float()


class _Epilogue(NamedTuple):
    """What a product is scaled by: fields of struct LqMatmul."""

    kind: int
    scale: int
    scale_stride: int
    offset: int
    offset_stride: int
    int_bias: int
    float_bias: int
    held: tuple[Tensor | None, ...]  # tensors that must live until the call


def _epilogue_of(
    scale: Tensor, folds: bool, offset: Tensor | None, bias: Tensor | None
) -> _Epilogue:
    kind = _PACKED if scale.dtype in _PACKED_DTYPES else _FOLDED if folds else _FLOAT
    scale = _values("scale", scale)
    offset_stride = int_bias = float_bias = 0
    if offset is not None:
        offset = _values("offset", offset)
        offset_stride = int(offset.shape[0] != 1)
    if bias is not None:
        check_held("bias", bias)
        is_int = bias.dtype is torch.int32
        bias = (bias if is_int else bias.float()).contiguous()
        int_bias, float_bias = (bias.data_ptr(), 0) if is_int else (0, bias.data_ptr())
    return _Epilogue(
        kind,
        scale.data_ptr(),
        int(scale.shape[0] != 1),
        _address(offset),
        offset_stride,
        int_bias,
        float_bias,
        (scale, offset, bias),
    )


def matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pertoken_scale: Tensor | None,
    output_dtype: torch.dtype,
    nz_shape: tuple[int, int] | None = None,
    *,
    folds: bool = False,
    offset: Tensor | None = None,
) -> Tensor | None:
    """`numerics.quant_matmul` with the compiled kernel, or None if the kernel does not compute it.

    The arguments are those of `numerics.quant_matmul`, except the weight. For a weight with batch
    dims it returns None. A FRACTAL_NZ weight is passed as its contiguous blocks, with its ND shape,
    (n, k) or (n, k/8), as nz_shape.
    """
    # Few calls into torch: each takes a tenth of the time of a small layer.
    library, shape = loaded(), x.shape
    if library is None or (bias is not None and bias.dim() != 1):
        return None
    stored = weight_of(weight, nz_shape)
    if stored is None:
        return None
    address, n, row_bytes, stride, step, int4 = stored
    width = 4 if int4 else 1
    if len(shape) == 2 and x.is_contiguous():
        rows, m, row = x, shape[0], row_bytes
        check_bytes("x1", x, m * row, width)
    else:
        rows = _rows_of("x1", x, row_bytes // width)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    end = _epilogue_of(scale, folds, offset, bias)
    ready = prepared_of(weight, library.instruction_set)
    pertoken = 0
    if pertoken_scale is not None:
        check_held("pertoken_scale", pertoken_scale)
        if len(shape) != 2 or not pertoken_scale.is_contiguous():
            pertoken_scale = pertoken_scale.expand(shape[:-1]).contiguous()
        pertoken = pertoken_scale.data_ptr()
    out = torch.empty(m, n, dtype=output_dtype, device=_CPU)
    call = MATMUL.pack(
        rows.data_ptr(), address, _address(ready), end.scale, end.offset, pertoken,
        end.int_bias, end.float_bias, out.data_ptr(), m, n, row_bytes, row, stride,
        end.scale_stride, end.offset_stride, step, int4, end.kind, _OUTPUTS[output_dtype],
        threads_for(m * n * row_bytes),
    )  # fmt: skip
    answer = library.matmul(call, len(call))
    if answer != DONE:
        refuse(answer)
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


def layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    folds: bool,
    offset: Tensor | None,
    arithmetic: int | None,
    scale_reciprocal: Tensor | None,
    input_offset: Tensor | None,
) -> Tensor | None:
    """A whole layer in one call: `activations.dynamic_quant` or `static_quant`, then
    `numerics.quant_matmul`; or None if the kernel does not compute that.

    Args:
        x: float16, bfloat16 or float32, (..., k).
        weight, scale, bias, output_dtype, folds, offset: as `numerics.quant_matmul` takes them; the
            weight in ND, int8 (n, k) or int32 (n, k/8).
        arithmetic: of dynamic_quant, whose scales are the pertoken_scale, as that takes it; None
            for static_quant.
        scale_reciprocal, input_offset: of static_quant, in the dtype of x.

    Raises:
        NotFiniteError, ShortStorageError: as `numerics.quant_matmul` raises them.
    """
    library = loaded()
    if library is None or (bias is not None and bias.dim() != 1):
        return None
    stored = weight_of(weight)
    if stored is None:
        return None
    address, n, row_bytes, stride, step, int4 = stored
    k, width = row_bytes * (2 if int4 else 1), x.element_size()
    if x.shape[-1] != k:
        return None
    rows, m, row = _float_rows(x, k, width)
    if not m:
        return None
    factor_stride = 0
    if scale_reciprocal is not None:
        check_held("scale_reciprocal", scale_reciprocal)
        scale_reciprocal = scale_reciprocal.contiguous()
        factor_stride = int(scale_reciprocal.shape[0] != 1)
        if input_offset is not None:
            check_held("offset", input_offset)
            input_offset = input_offset.contiguous()
    end = _epilogue_of(scale, folds, offset, bias)
    ready = prepared_of(weight, library.instruction_set)
    out = torch.empty(*x.shape[:-1], n, dtype=output_dtype, device=_CPU)
    call = _LAYER.pack(
        rows.data_ptr(), _address(scale_reciprocal), _address(input_offset), 0, 0, m, k, row,
        factor_stride,
        _FLOATS[x.dtype], _STATIC if arithmetic is None else arithmetic, int4, 1,
        0, address, _address(ready), end.scale, end.offset, 0, end.int_bias, end.float_bias,
        out.data_ptr(), m, n, row_bytes, 0, stride, end.scale_stride, end.offset_stride,
        step, int4, end.kind, _OUTPUTS[output_dtype], threads_for(m * n * row_bytes),
    )  # fmt: skip
    answer = library.layer(call, len(call))
    if answer != DONE:
        refuse(answer)
    return out


def _quantize(
    x: Tensor,
    bits: int,
    packed: bool,
    arithmetic: int,
    factor: int = 0,
    offset: int = 0,
    factor_stride: int = 0,
) -> tuple[Tensor, Tensor | None] | None:
    """x quantized, and the scales of its rows if arithmetic is dynamic; factor and offset are
    addresses."""
    # Few calls into torch, as in matmul; and sizes one by one, which take half the time of a shape.
    library, dtype, shape = loaded(), _FLOATS.get(x.dtype), x.shape
    if library is None or dtype is None or type(x) not in _PLAIN or not x.is_cpu:
        return None
    k = shape[-1]
    width, last = 4 if dtype == 2 else 2, k // 8 if packed else k
    if not k or (packed and k % 8):
        return None
    rows, m, row = _float_rows(x, k, width)
    if not m:
        return None
    stored, scale = torch.int32 if packed else torch.int8, None
    sizes: tuple[int, ...] = (m,) if len(shape) == 2 else shape[:-1]
    out = torch.empty(*sizes, last, dtype=stored, device=_CPU)
    if arithmetic != _STATIC:
        # for x of 1 dim there are no sizes, which torch takes as a shape only
        scale = torch.empty(*sizes or [()], dtype=torch.float32, device=_CPU)
    call = QUANTIZE.pack(
        rows.data_ptr(), factor, offset, out.data_ptr(), 0 if scale is None else scale.data_ptr(),
        m, k, row, factor_stride, dtype, arithmetic, 0 if bits == 8 else 1 if packed else 2,
        threads_for(m * k, _ONE_THREAD_VALUES),
    )  # fmt: skip
    answer = library.quantize(call, len(call))
    if answer != DONE:
        refuse(answer)
    return out, scale


def dynamic_quant(
    x: Tensor, bits: int, arithmetic: int, packed: bool
) -> tuple[Tensor, Tensor] | None:
    """`activations.dynamic_quant` with the compiled kernel, or None if the kernel does not compute
    it: x is not in the CPU's memory, or empty.

    Args:
        x, bits, packed: as `activations.dynamic_quant` takes them.
        arithmetic: a number of enum LqArithmetic of csrc/call.h.
    """
    # with a dynamic arithmetic there is a scale
    return _quantize(x, bits, packed, arithmetic)  # type: ignore[return-value]


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
        if tensor.dtype != x.dtype or tensor.numel() != size:
            return None
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return None
        check_held(name, tensor)
        columns[name] = tensor = tensor.contiguous()  # it must live until the call
        addresses[i] = tensor.data_ptr()
    factor, zero = addresses
    found = _quantize(x, bits, packed, _STATIC, factor, zero, size > 1)
    return None if found is None else found[0]
