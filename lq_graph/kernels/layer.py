"""A whole layer in one call of the compiled kernels: activations are quantized and multiplied."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

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
    threads_for,
    values_of,
)
from .layouts import NZ_ROW_BYTES
from .library import loaded
from .memory import check_held
from .numerics import TensorLike
from .prepared import prepared_of
from .symbolic import empty

__all__ = ["LayerForm", "form_of_layer", "quant_layer"]

_LAYER = struct.Struct(QUANTIZE.format + MATMUL.format)


class LayerForm(NamedTuple):
    """What dtypes and shapes decide about the calls of a layer; m, k and n count values."""

    m: int
    k: int
    n: int
    width: int  # bytes of a value of x
    row_bytes: int  # of the weight
    weight_width: int
    weight_bytes: int
    output_shape: tuple[int, ...]
    output_strides: tuple[int, ...]
    output_dtype: torch.dtype
    folds: bool  # the scale, with the offset
    factor_stride: int
    scale_stride: int
    offset_stride: int
    quantize: tuple[int, int, int]  # dtype, arithmetic and values of struct LqQuantize
    matmul: tuple[int, int, int, int]  # w_step, int4, scale_kind and output of struct LqMatmul


def form_of_layer(
    x: TensorLike,
    weight: TensorLike,
    scale: TensorLike,
    offset: TensorLike | None,
    bias: TensorLike | None,
    scale_reciprocal: TensorLike | None,
    *,
    output_dtype: torch.dtype,
    folds: bool,
    arithmetic: int | None,
) -> LayerForm | None:
    """The form of a layer, or None if the kernels do not compute it in one call.

    Args:
        x: float16, bfloat16 or float32, (..., k).
        weight, scale, offset, bias, output_dtype, folds: as `numerics.quant_matmul` takes them; the
            weight int8 (n, k) or int32 (n, k/8).
        scale_reciprocal: of static_quant, in the dtype of x, (1,) or (k,).
        arithmetic: of dynamic_quant, as that takes it; None for static_quant.
    """
    if x.dtype not in FLOATS or len(weight.shape) != 2:
        return None
    if bias is not None and len(bias.shape) != 1:
        return None
    n, words = weight.shape
    int4 = weight.dtype == torch.int32
    weight_width = 4 if int4 else 1
    row_bytes = words * weight_width
    k = row_bytes * (2 if int4 else 1)
    m = math.prod(x.shape[:-1])
    if x.shape[-1] != k or not (m and k and n):
        return None
    output_shape = (*x.shape[:-1], n)
    return LayerForm(
        m=m,
        k=k,
        n=n,
        width=x.dtype.itemsize,
        row_bytes=row_bytes,
        weight_width=weight_width,
        weight_bytes=n * row_bytes,
        output_shape=output_shape,
        output_strides=tuple(math.prod(output_shape[i:]) for i in range(1, len(output_shape) + 1)),
        output_dtype=output_dtype,
        folds=folds,
        factor_stride=int(scale_reciprocal is not None and scale_reciprocal.shape[0] != 1),
        scale_stride=int(scale.shape[0] != 1),
        offset_stride=int(offset is not None and offset.shape[0] != 1),
        quantize=(FLOATS[x.dtype], STATIC if arithmetic is None else arithmetic, int(int4)),
        matmul=(NZ_ROW_BYTES, int(int4), kind_of_scale(scale.dtype, folds), OUTPUTS[output_dtype]),
    )


def quant_layer(
    form: LayerForm,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    scale_reciprocal: Tensor | None,
    input_offset: Tensor | None,
    out: Tensor | None = None,
) -> Tensor | None:
    """A whole layer in one call: `activations.dynamic_quant` or `static_quant`, then
    `numerics.quant_matmul`; or None if the kernels do not compute that.

    Args:
        form: of these tensors.
        x, weight, scale, bias, scale_reciprocal: as `form_of_layer` takes them, on the CPU.
        offset: of `numerics.quant_matmul`; only if the scale is folded.
        input_offset: of static_quant, as scale_reciprocal.
        out: (..., n), contiguous, for the result; None for a new tensor.

    Raises:
        NotFiniteError, ShortStorageError: as `numerics.quant_matmul` raises them.
    """
    # Few calls into torch and few functions: each takes a hundredth of the time of a small layer.
    library = loaded()
    if library is None:
        return None
    _, k, n, width, row_bytes, weight_width, weight_bytes = form[:7]
    x, m, row = float_rows(x, k, width)
    stride = row_bytes
    if weight.is_contiguous():
        check_bytes("weight", weight, weight_bytes, weight_width)
    else:
        if weight.stride(1) != 1:
            return None
        check_held("weight", weight)
        stride = weight.stride(0) * weight_width
    scale = values_of("scale", scale)
    int_bias = float_bias = 0
    if bias is not None:
        bias, int_bias, float_bias = bias_of(bias)
    if offset is not None:
        offset = values_of("offset", offset)
    if scale_reciprocal is not None:
        check_held("scale_reciprocal", scale_reciprocal)
        scale_reciprocal = scale_reciprocal.contiguous()
        if input_offset is not None:
            check_held("offset", input_offset)
            input_offset = input_offset.contiguous()
    ready = prepared_of(weight, library.instruction_set)
    if out is None:
        out = empty(form.output_shape, form.output_strides, form.output_dtype)
    call = _LAYER.pack(
        x.data_ptr(), address_of(scale_reciprocal), address_of(input_offset), 0, 0, m, k, row,
        form.factor_stride, *form.quantize, 1,
        0, weight.data_ptr(), address_of(ready), scale.data_ptr(), address_of(offset), 0,
        int_bias, float_bias, out.data_ptr(), m, n, row_bytes, 0, stride, form.scale_stride,
        form.offset_stride, *form.matmul, threads_for(m * weight_bytes),
    )  # fmt: skip
    answer = library.layer(call, len(call))
    if answer != DONE:
        refuse(answer)
    return out
