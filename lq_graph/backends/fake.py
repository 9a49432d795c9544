"""Fake kernels: the output's shape and dtype under fake tensors, on meta and in graphs, from
plan()."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.activations import QuantPlan, plan_dynamic_quant, plan_static_quant
from ..rules.devices import check_devices
from ..rules.plan import Plan, plan, plan_trans_quant_param
from .autocast import when_cast
from .derivatives import check_gradients

__all__ = [
    "check_dynamic_quant",
    "check_linear_quant",
    "check_static_quant",
    "check_trans_quant_param",
    "dynamic_quant",
    "linear_quant",
    "static_quant",
    "trans_quant_param",
]


def check_linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype | None,
    float_scale: Tensor | None = None,
) -> Plan:
    """Refuse what lq_graph::linear_quant does not take; devices first."""
    check_devices(
        "linear_quant",
        x1=x1,
        weight=weight,
        scale=scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
        float_scale=float_scale,
    )
    return plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)


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
    """Fake kernel of lq_graph::linear_quant; contract in `lq_graph.linear_quant`."""
    p = check_linear_quant(
        x1, weight, scale, offset, pertoken_scale, bias, output_dtype, float_scale
    )
    check_gradients("linear_quant", scale, offset, pertoken_scale, bias)
    return x1.new_empty(p.output_shape, dtype=p.output_dtype)


def check_trans_quant_param(
    scale: Tensor, offset: Tensor | None, round_mode: int
) -> tuple[int, ...]:
    """Refuse what lq_graph::trans_quant_param does not take."""
    check_devices("trans_quant_param", scale=scale, offset=offset)
    return plan_trans_quant_param(scale, offset, round_mode)


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fake kernel of lq_graph::trans_quant_param; contract in `lq_graph.trans_quant_param`."""
    shape = check_trans_quant_param(scale, offset, round_mode)
    check_gradients("trans_quant_param", scale, offset)
    return scale.new_empty(shape, dtype=torch.int64)


def check_dynamic_quant(x: Tensor, dtype: torch.dtype | None) -> QuantPlan:
    """Refuse what lq_graph::dynamic_quant does not take."""
    return plan_dynamic_quant(when_cast(x), dtype)


def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Fake kernel of lq_graph::dynamic_quant; contract in `lq_graph.dynamic_quant`."""
    p = check_dynamic_quant(x, dtype)
    check_gradients("dynamic_quant", x)
    quantized = x.new_empty(p.output_shape, dtype=p.row.output_dtype)
    return quantized, x.new_empty(p.scale_shape, dtype=torch.float32)


def check_static_quant(
    x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None, *forms: Tensor | None
) -> QuantPlan:
    """Refuse what lq_graph::static_quant does not take.

    Args:
        forms: scale, zero_point, reciprocals, zero_points.
    """
    given = dict(zip(("scale", "zero_point", "reciprocals", "zero_points"), forms, strict=False))
    check_devices("static_quant", x=x, scale_reciprocal=scale_reciprocal, offset=offset, **given)
    return plan_static_quant(when_cast(x, scale_reciprocal.dtype), scale_reciprocal, offset)


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
    """Fake kernel of lq_graph::static_quant; contract in `lq_graph.static_quant`."""
    p = check_static_quant(x, scale_reciprocal, offset, scale, zero_point, reciprocals, zero_points)
    check_gradients("static_quant", x, scale_reciprocal, offset)
    return x.new_empty(p.output_shape, dtype=p.row.output_dtype)
