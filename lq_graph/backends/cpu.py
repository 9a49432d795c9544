"""CPU kernels: validate with plan(), compute with lq_graph.kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..errors import LinearQuantValueError
from ..kernels import OperandError
from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.plan import check_finite, plan, plan_trans_quant_param
from .derivatives import check_gradients

__all__ = ["check_held", "dynamic_quant", "linear_quant", "static_quant", "trans_quant_param"]


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
    if p.fold_scale:
        scale = trans_quant_param(scale, offset)
    elif p.cut_scale:
        scale = kernels.s19(scale)
    try:
        return kernels.quant_matmul(
            x1,
            weight,
            scale,
            bias=bias,
            pertoken_scale=pertoken_scale,
            output_dtype=p.output_dtype,
        )
    except OperandError as error:
        raise LinearQuantValueError(f"linear_quant: {error}") from None


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
