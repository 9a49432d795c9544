"""CPU kernels: validate with plan(), compute with lq_graph.kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import LinearQuantValueError
from ..kernels import LayerForm, NotFiniteError, OperandError
from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.cann import Target
from ..rules.plan import Spec, check_finite, plan, plan_trans_quant_param
from ..rules.products import get_target
from ..rules.symbolic import cached_decision
from .derivatives import check_gradients

__all__ = [
    "check_held",
    "dynamic_quant",
    "layer",
    "linear_quant",
    "static_quant",
    "trans_quant_param",
]


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    float_scale: Tensor | None = None,
) -> Tensor:
    """CPU kernel of lq_graph::linear_quant; contract in `lq_graph.linear_quant`."""
    del float_scale
    if check_gradients("linear_quant", scale, offset, pertoken_scale, bias):
        with torch.no_grad():
            return linear_quant(
                x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
            )
    p = plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)
    if p.m == 0:
        return x1.new_empty(p.output_shape, dtype=p.output_dtype)
    if p.cut_scale:
        scale = kernels.s19(scale)
    try:
        return kernels.quant_matmul(
            x1,
            weight,
            scale,
            bias=bias,
            pertoken_scale=pertoken_scale,
            output_dtype=p.output_dtype,
            folds=p.fold_scale,
            offset=offset if p.fold_scale else None,
        )
    except OperandError as error:
        if p.fold_scale and isinstance(error, NotFiniteError):
            check_finite(scale, offset)  # what trans_quant_param says of them
        raise LinearQuantValueError(f"linear_quant: {error}") from None


def layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype | None,
    scale_reciprocal: Tensor | None = None,
    input_offset: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """dynamic_quant, or static_quant if scale_reciprocal is given, and linear_quant of its result,
    in one call of the compiled kernel; None if it does not compute that.

    Args:
        x: (..., k), floats.
        weight, scale, offset, bias, output_dtype: of linear_quant.
        scale_reciprocal, input_offset: of static_quant.
        out: (..., n), contiguous, for the result; None for a new tensor.

    Raises:
        LinearQuantTypeError, LinearQuantValueError: what the two operators raise.
    """
    if not x.numel():
        return None
    form = _form(
        get_target(),
        output_dtype,
        x.dtype,
        x.shape,
        weight.dtype,
        weight.shape,
        scale.dtype,
        scale.shape,
        None if offset is None else (offset.dtype, offset.shape),
        None if bias is None else (bias.dtype, bias.shape),
        None if scale_reciprocal is None else (scale_reciprocal.dtype, scale_reciprocal.shape),
        None if input_offset is None else (input_offset.dtype, input_offset.shape),
    )
    if form is None:
        return None
    if not form.folds:
        offset = None
    try:
        return kernels.quant_layer(
            form, x, weight, scale, offset, bias, scale_reciprocal, input_offset, out
        )
    except OperandError:
        return None  # the operators refuse it, each in its own words


@cached_decision
def _form(target: Target, output_dtype: torch.dtype | None, *key: Any) -> LayerForm | None:
    """The form of a legal layer, from dtypes and shapes; None if the two operators must compute
    it."""
    del target  # get_target() is what the plans read
    x, weight, scale = (Spec(key[at], tuple(key[at + 1])) for at in (0, 2, 4))
    offset, bias, reciprocal, zero = (one and Spec(one[0], tuple(one[1])) for one in key[6:])
    rows = Spec(x.dtype, (math.prod(x.shape[:-1]), x.shape[-1]))
    if reciprocal is None:
        quantized = plan_dynamic_quant(rows, weight.dtype)
        arithmetic, pertoken = quantized.arithmetic.number, Spec(torch.float32, rows.shape[:1])
    else:
        quantized = plan_static_quant(rows, reciprocal, zero)
        arithmetic, pertoken = None, None
    x1 = Spec(quantized.row.output_dtype, quantized.output_shape)
    p = plan(x1, weight, scale, offset, pertoken, bias, output_dtype=output_dtype)
    if p.cut_scale:
        return None
    return kernels.form_of_layer(
        x,
        weight,
        scale,
        offset,
        bias,
        reciprocal,
        output_dtype=p.output_dtype,
        folds=p.fold_scale,
        arithmetic=arithmetic,
    )


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """CPU kernel of lq_graph::trans_quant_param; contract in `lq_graph.trans_quant_param`."""
    if check_gradients("trans_quant_param", scale, offset):
        with torch.no_grad():
            return trans_quant_param(scale, offset, round_mode)
    plan_trans_quant_param(scale, offset, round_mode)
    check_held("trans_quant_param", scale=scale, offset=offset)
    check_finite(scale, offset)
    return kernels.pack_scale(scale, offset, round_mode)


def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """CPU kernel of lq_graph::dynamic_quant; contract in `lq_graph.dynamic_quant`."""
    if check_gradients("dynamic_quant", x):
        with torch.no_grad():
            return dynamic_quant(x, dtype=dtype)
    p = plan_dynamic_quant(x, dtype)
    try:
        return kernels.dynamic_quant(x, 4 if p.int4 else 8, p.arithmetic, packed=p.int4)
    except OperandError as error:
        raise LinearQuantValueError(f"dynamic_quant: {error}") from None


def static_quant(
    x: Tensor,
    scale_reciprocal: Tensor,
    offset: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    reciprocals: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> Tensor:
    """CPU kernel of lq_graph::static_quant; contract in `lq_graph.static_quant`."""
    del scale, zero_point, reciprocals, zero_points
    if check_gradients("static_quant", x, scale_reciprocal, offset):
        with torch.no_grad():
            return static_quant(x, scale_reciprocal, offset)
    plan_static_quant(x, scale_reciprocal, offset)
    try:
        return kernels.static_quant(x, scale_reciprocal, offset)
    except OperandError as error:
        raise LinearQuantValueError(f"static_quant: {error}") from None


def check_held(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors whose storage is shorter than their shape.

    Raises:
        LinearQuantValueError: with the operator's and the tensor's name.
    """
    try:
        for name, tensor in tensors.items():
            if tensor is not None:
                kernels.check_held(name, tensor)
    except OperandError as error:
        raise LinearQuantValueError(f"{op}: {error}") from None
