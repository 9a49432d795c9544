"""Norms that quantize, or that give a second dtype.

Sources: the kernels and golden generators of hicann/ops-nn, norm/add_rms_norm_dynamic_quant,
norm/add_rms_norm_quant, norm/add_rms_norm_quant_v2, norm/rms_norm_quant and norm/add_rms_norm_cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cann_host import chips
from cann_host.graph import executor
from cann_host.graph.executor import INT4, GraphError, Int4, describe, op, optional_desc
from cann_host.rules import (
    A950,
    AddRmsNormDynamicQuantCall,
    AddRmsNormQuantCall,
    RmsNormCall,
    RmsNormQuantCall,
    check_add_rms_norm_cast,
    check_add_rms_norm_dynamic_quant,
    check_add_rms_norm_quant,
    check_rms_norm_quant,
    soc_family,
)
from lq_graph.kernels import dynamic_quant, static_quant

from .nn import norm_of_sum, rms_norm
from .quant import quantized_name

__all__ = [
    "add_rms_norm_cast",
    "add_rms_norm_dynamic_quant",
    "add_rms_norm_quant",
    "rms_norm_quant",
    "to_integers",
]


def to_integers(value: Tensor, bits: int = 8) -> Tensor:
    """float32 values rounded half to even and clamped, as int8."""
    return static_quant(value, value.new_ones(1), bits=bits)


def _marked(values: Tensor, bits: int) -> Tensor | Int4:
    return Int4(values) if bits == 4 else values


# ---- AddRmsNormDynamicQuant ----


def add_rms_norm_dynamic_quant(
    soc: str,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scales: Sequence[Tensor | None],
    beta: Tensor | None,
    epsilon: float,
    wanted: Sequence[bool],
    bits: int,
) -> tuple[list[tuple[Tensor, Tensor] | None], Tensor]:
    """A quantized norm and its scale for each smooth scale, None where it is not wanted; and the
    sum. The norm stays in float32 until it is quantized."""
    y, _, total = norm_of_sum(x1, x2, gamma, epsilon, chips.NormRoundings())
    if beta is not None:
        y = y + beta.to(torch.float32)
    results: list[tuple[Tensor, Tensor] | None] = []
    for smooth, is_wanted in zip(smooth_scales, wanted, strict=True):
        if not is_wanted:
            results.append(None)
            continue
        scaled = y if smooth is None else y * smooth.to(torch.float32)
        results.append(dynamic_quant(scaled, bits, chips.fused_norm_arithmetic(soc)))
    return results, total


@op("AddRmsNormDynamicQuant")
def _add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 1e-6,
    output_mask: Sequence[bool] = (),
    dst_type: int = 2,
) -> tuple[Any, ...]:
    soc = executor.soc_name()
    call = AddRmsNormDynamicQuantCall(
        soc,
        describe(x1),
        describe(x2),
        describe(gamma),
        quantized_name(dst_type),
        optional_desc(smooth_scale1),
        optional_desc(smooth_scale2),
        optional_desc(beta),
        epsilon,
        tuple(bool(flag) for flag in output_mask),
        is_graph=True,
    )
    if refusal := check_add_rms_norm_dynamic_quant(call):
        raise GraphError(refusal)
    bits = 4 if dst_type == INT4 else 8
    smooth, wanted = (smooth_scale1, smooth_scale2), call.wanted
    results, total = add_rms_norm_dynamic_quant(
        soc, x1, x2, gamma, smooth, beta, epsilon, wanted, bits
    )
    # InferShape gives a result that is not wanted one element
    unwanted = x1.new_zeros(1, dtype=torch.int8), x1.new_zeros(1, dtype=torch.float32)
    (y1, scale1), (y2, scale2) = (unwanted if pair is None else pair for pair in results)
    return _marked(y1, bits), _marked(y2, bits), total, scale1, scale2


# ---- AddRmsNormQuant ----


def _scaled(
    y: Tensor, scale: Tensor, points: Tensor | None, *, divides: bool, per_tensor: bool = False
) -> Tensor:
    """int8 of y divided by a scale, or multiplied, plus the zero points."""
    factor = scale.to(torch.float32)
    if per_tensor:
        factor = factor.reciprocal()  # by which that kernel multiplies
    value = y / factor if divides and not per_tensor else y * factor
    if points is not None:
        value = value + points.to(torch.float32)
    return to_integers(value)


def add_rms_norm_quant(
    call: AddRmsNormQuantCall,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales: Sequence[Tensor | None],
    zero_points: Sequence[Tensor | None],
    beta: Tensor | None,
    epsilon: float,
) -> tuple[list[Tensor | None], Tensor]:
    """int8 for each scale, None for an absent one; and the sum."""
    per_tensor = call.is_per_tensor
    rounds = chips.add_rms_norm_quant_roundings(
        call.soc, x1.dtype, beta=beta is not None, per_tensor=per_tensor
    )
    if per_tensor:
        gamma, beta = gamma.reshape(-1), None if beta is None else beta.reshape(-1)
    y, _, total = norm_of_sum(x1, x2, gamma, epsilon, rounds)
    if beta is not None:
        y = y + beta.to(torch.float32)
    return [
        None
        if scale is None
        else _scaled(y, scale, points, divides=call.div_mode, per_tensor=per_tensor)
        for scale, points in zip(scales, zero_points, strict=True)
    ], total


@op("AddRmsNormQuant")
def _add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    scales2: Tensor | None = None,
    zero_points1: Tensor | None = None,
    zero_points2: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    axis: int = -1,  # no kernel reads it
    epsilon: float = 1e-6,
    div_mode: bool = True,
    dst_type: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    call = AddRmsNormQuantCall(
        executor.soc_name(),
        describe(x1),
        describe(x2),
        describe(gamma),
        describe(scales1),
        optional_desc(scales2),
        optional_desc(zero_points1),
        optional_desc(zero_points2),
        optional_desc(beta),
        quantized_name(dst_type),
        div_mode,
    )
    if refusal := check_add_rms_norm_quant(call):
        raise GraphError(refusal)
    points = zero_points1, zero_points2
    (y1, y2), total = add_rms_norm_quant(
        call, x1, x2, gamma, (scales1, scales2), points, beta, epsilon
    )
    assert y1 is not None
    return y1, x1.new_zeros(1, dtype=torch.int8) if y2 is None else y2, total


# ---- RmsNormQuant ----


def rms_norm_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    epsilon: float,
    bits: int,
) -> Tensor:
    """int8 of x's shape. The kernel multiplies by 1 / scale and rounds to float16 before it rounds
    to integers (rms_norm_quant.cpp)."""
    y, _ = rms_norm(x.to(torch.float32), gamma.reshape(-1), epsilon=epsilon)
    y = y + beta.reshape(-1).to(torch.float32)
    first, addend = (t.reshape(-1)[:1].to(torch.float32) for t in (scale, offset))
    value = y * first.reciprocal() + addend
    return to_integers(value.to(torch.float16).to(torch.float32), bits)


def warn_of_more_scales(scale: Sequence[int]) -> None:
    if tuple(scale) != (1,):
        executor.caution(f"RmsNormQuant reads one scale and one offset of {tuple(scale)}")


@op("RmsNormQuant")
def _rms_norm_quant(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor,
    offset: Tensor,
    *,
    epsilon: float,
    high_precision_mode: bool = False,  # the kernels of this operator do not read it
    gemma_mode: bool = False,
    dst_type: int = 2,
) -> Tensor | Int4:
    if gemma_mode:
        raise GraphError("gemma_mode is not implemented by cann_host")
    call = RmsNormQuantCall(
        executor.soc_name(),
        describe(x),
        describe(gamma),
        describe(beta),
        describe(scale),
        describe(offset),
        quantized_name(dst_type),
        epsilon,
        is_graph=True,
    )
    if refusal := check_rms_norm_quant(call):
        raise GraphError(refusal)
    warn_of_more_scales(scale.shape)
    bits = 4 if dst_type == INT4 else 8
    return _marked(rms_norm_quant(x, gamma, beta, scale, offset, epsilon, bits), bits)


# ---- AddRmsNormCast ----


def add_rms_norm_cast(
    soc: str, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y in float32, y, rstd and the sum. Before Ascend 950 the first is the rounded y."""
    y, rstd, total = norm_of_sum(x1, x2, gamma, epsilon, chips.add_rms_norm_roundings(soc))
    rounded = y.to(x1.dtype)
    wide = y if soc_family(soc) == A950 else rounded.to(torch.float32)
    return wide, rounded, rstd, total


@op("AddRmsNormCast")
def _add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    soc = executor.soc_name()
    call = RmsNormCall(soc, describe(x1), describe(gamma), epsilon, describe(x2), is_graph=True)
    if refusal := check_add_rms_norm_cast(call):
        raise GraphError(refusal)
    return add_rms_norm_cast(soc, x1, x2, gamma, epsilon)
