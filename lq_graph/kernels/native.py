"""Calls of the compiled CPU kernels; `library` tells when there are any. Each returns None if the
kernels do not compute it: then torch does, to the same numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .calls import (
    DONE,
    FLOATS,
    MATMUL,
    OUTPUTS,
    QUANTIZE,
    STATIC,
    address_of,
    bias_of,
    check_bytes,
    float_rows,
    kind_of_scale,
    refuse,
    rows_of,
    threads_for,
    values_of,
    weight_of,
)
from .library import loaded
from .memory import check_held
from .prepared import prepared_of
from .symbolic import empty

__all__ = ["dynamic_quant", "matmul", "static_quant"]

# With fewer values to quantize, a second thread costs more than it saves.
_ONE_THREAD_VALUES = 1 << 16
_PLAIN = (Tensor, Parameter)  # a subclass may have no memory of its own


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
    kind = kind_of_scale(scale.dtype, folds)
    scale = values_of("scale", scale)
    offset_stride = int_bias = float_bias = 0
    if offset is not None:
        offset = values_of("offset", offset)
        offset_stride = int(offset.shape[0] != 1)
    if bias is not None:
        bias, int_bias, float_bias = bias_of(bias)
    return _Epilogue(
        kind,
        scale.data_ptr(),
        int(scale.shape[0] != 1),
        address_of(offset),
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
        rows = rows_of("x1", x, row_bytes // width)
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
    out = empty((m, n), (n, 1), output_dtype)
    call = MATMUL.pack(
        rows.data_ptr(), address, address_of(ready), end.scale, end.offset, pertoken,
        end.int_bias, end.float_bias, out.data_ptr(), m, n, row_bytes, row, stride,
        end.scale_stride, end.offset_stride, step, int4, end.kind, OUTPUTS[output_dtype],
        threads_for(m * n * row_bytes),
    )  # fmt: skip
    answer = library.matmul(call, len(call))
    if answer != DONE:
        refuse(answer)
    return out if len(shape) == 2 else out.view(*shape[:-1], n)


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
    # Few calls into torch, as in matmul.
    library, dtype, shape = loaded(), FLOATS.get(x.dtype), x.shape
    if library is None or dtype is None or type(x) not in _PLAIN or not x.is_cpu:
        return None
    k = shape[-1]
    width, last = 4 if dtype == 2 else 2, k // 8 if packed else k
    if not k or (packed and k % 8):
        return None
    rows, m, row = float_rows(x, k, width)
    if not m:
        return None
    stored, scale = torch.int32 if packed else torch.int8, None
    out = empty((m, last), (last, 1), stored)
    if arithmetic != STATIC:
        scale = empty((m,), (1,), torch.float32)
    call = QUANTIZE.pack(
        rows.data_ptr(), factor, offset, out.data_ptr(), 0 if scale is None else scale.data_ptr(),
        m, k, row, factor_stride, dtype, arithmetic, 0 if bits == 8 else 1 if packed else 2,
        threads_for(m * k, _ONE_THREAD_VALUES),
    )  # fmt: skip
    answer = library.quantize(call, len(call))
    if answer != DONE:
        refuse(answer)
    if len(shape) != 2:
        out = out.view(*shape[:-1], last)
        scale = None if scale is None else scale.view(shape[:-1])
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
    found = _quantize(x, bits, packed, STATIC, factor, zero, size > 1)
    return None if found is None else found[0]
