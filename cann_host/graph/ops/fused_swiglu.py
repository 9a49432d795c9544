"""SwiGLU, and SwiGLU that dequantizes and quantizes.

Sources: the kernels and golden generators of hicann/ops-nn, activation/swi_glu,
quant/dequant_swiglu_quant and quant/swi_glu_quant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import INT4, GraphError, Int4, describe, op, optional_desc
from cann_host.rules import (
    DequantSwigluQuantCall,
    SwiGluCall,
    SwiGluGradCall,
    SwiGluQuantCall,
    check_dequant_swiglu_quant,
    check_group_list,
    check_swi_glu,
    check_swi_glu_grad,
    check_swi_glu_quant,
    dequant_swiglu_quant_ignores,
)
from lq_graph.kernels import Arithmetic, dynamic_quant, quantize_rows

from .fused_norms import to_integers
from .quant import quantized_name

__all__ = ["SwiGluOptions", "dequant_swiglu_quant", "swi_glu", "swi_glu_grad", "swi_glu_quant"]


def swi_glu(x: Tensor, dim: int = -1) -> Tensor:
    """The first half of a dim, activated, times the second; one rounding."""
    left, right = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(left) * right).to(x.dtype)


@op("SwiGlu")
def _swi_glu(x: Tensor, *, dim: int = -1) -> Tensor:
    call = SwiGluCall(executor.soc_name(), describe(x), dim, is_graph=True)
    if refusal := check_swi_glu(call):
        raise GraphError(refusal)
    return swi_glu(x, dim)


def swi_glu_grad(y_grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    """The gradients of both halves of x, one rounding."""
    grad, (left, right) = y_grad.float(), x.float().chunk(2, dim)
    gate = torch.sigmoid(left)
    slope = gate * (1 - gate) * left + gate
    return torch.cat((slope * grad * right, gate * left * grad), dim).to(x.dtype)


@op("SwiGluGrad")
def _swi_glu_grad(y_grad: Tensor, x: Tensor, *, dim: int = -1) -> Tensor:
    forward = SwiGluCall(executor.soc_name(), describe(x), dim, is_graph=True)
    if refusal := check_swi_glu_grad(SwiGluGradCall(describe(y_grad), forward)):
        raise GraphError(refusal)
    return swi_glu_grad(y_grad, x, dim)


# ---- DequantSwigluQuant ----


class SwiGluOptions(NamedTuple):
    """Which SwiGLU DequantSwigluQuant computes.

    Attributes:
        activate_left: whether the first half is activated.
        mode: 0 is SwiGLU; 1 and 2 are GPT-OSS' variant, of even and odd columns or of halves; 3 is
            SwiGLU with limits after and before the product.
        limit, alpha, bias: of the variants.
    """

    activate_left: bool = False
    mode: int = 0
    limit: float = 7.0
    alpha: float = 1.702
    bias: float = 1.0


def _gated(value: Tensor, options: SwiGluOptions) -> Tensor:
    """SwiGLU of float32 values (..., 2h)."""
    if options.mode == 1:
        act, gate = value[..., ::2], value[..., 1::2]
    else:
        left, right = value.chunk(2, -1)
        act, gate = (left, right) if options.activate_left else (right, left)
    if options.mode == 0:
        return torch.nn.functional.silu(act) * gate
    gate = gate.clamp(max=options.limit).clamp(min=-options.limit)
    if options.mode == 3:
        return torch.nn.functional.silu(act).clamp(max=options.limit) * gate
    act = act.clamp(max=options.limit)
    return act / (1 + torch.exp(act * -options.alpha)) * (gate + options.bias)


class _Groups(NamedTuple):
    """The rows of x that belong to a group: `rows` of them, and the group of each."""

    rows: int
    of_row: Tensor

    def pick(self, tensor: Tensor) -> Tensor:
        """For each row the values of its group, (rows, -1); (1, -1) for one group."""
        values = tensor.reshape(len(tensor), -1)
        return values if len(values) == 1 else values[self.of_row]


def _groups_of(group_index: Tensor, rows: int, groups: int) -> _Groups:
    pairs = group_index.dim() == 2
    numbers = group_index[:, 0].tolist() if pairs else list(range(groups))
    counts = group_index[:, 1].tolist() if pairs else group_index.tolist()
    if pairs and min(counts) <= 0:  # the kernel ends at the first of these
        end = next(i for i, count in enumerate(counts) if count <= 0)
        numbers, counts = numbers[:end], counts[:end]
    counts = [max(count, 0) for count in counts]
    wrong = [number for number in numbers if not 0 <= number < groups]
    if wrong:
        raise GraphError(f"group_index names group {wrong[0]}; there are {groups}")
    if refusal := check_group_list(counts, rows):
        raise GraphError(refusal)
    # the dtype is int64 also if there is no group
    of_row = torch.tensor(numbers, dtype=torch.int64).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64)
    )
    return _Groups(len(of_row), of_row)


def dequant_swiglu_quant(
    call: DequantSwigluQuantCall,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    group_index: Tensor | None,
    options: SwiGluOptions,
) -> tuple[Tensor, Tensor | None]:
    """int8 (rows, h) and, if the quantization is dynamic, float32 (rows,): rows of x that belong to
    a group, all if there are no groups.

    Raises:
        GraphError: the groups have more rows than x.
    """
    if ignored := dequant_swiglu_quant_ignores(call):
        executor.caution(ignored)
        options = options._replace(mode=0)
    x = x.reshape(-1, x.shape[-1])
    if group_index is None:
        groups = _Groups(len(x), torch.zeros(len(x), dtype=torch.int64))
        weight_scale, bias, quant_scale, quant_offset = (
            None if t is None else t.reshape(1, -1)
            for t in (weight_scale, bias, quant_scale, quant_offset)
        )
    else:
        count = call.groups
        groups = _groups_of(group_index, len(x), count)
        weight_scale, bias = (
            None if t is None else t.reshape(count, -1) for t in (weight_scale, bias)
        )
        if call.quant_mode == "dynamic" and quant_scale is not None:
            quant_scale = quant_scale.reshape(count, -1)
    value = _dequantized(x[: groups.rows], weight_scale, activation_scale, bias, groups)
    value = _gated(value, options)
    if call.quant_mode.lower() == "dynamic":
        if quant_scale is not None:
            value = value * groups.pick(quant_scale)
        # the two kernels: dequant_swiglu_quant_dynamic_base.hpp, and dequant_swiglu_quant.h
        arithmetic = Arithmetic.DIVIDE if group_index is not None else Arithmetic.STEP
        return dynamic_quant(value, 8, arithmetic)
    return to_integers(_scaled(value, quant_scale, quant_offset, groups)), None


def _dequantized(
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    groups: _Groups,
) -> Tensor:
    """float32; only int32 is dequantized."""
    if x.dtype != torch.int32:
        return x.to(torch.float32)
    assert weight_scale is not None
    if bias is not None and bias.dtype == torch.int32:
        x = x + groups.pick(bias)
    value = x.to(torch.float32) * groups.pick(weight_scale)
    if activation_scale is not None:
        value = value * activation_scale.reshape(-1, 1)[: groups.rows]
    if bias is not None and bias.dtype != torch.int32:
        value = value + groups.pick(bias).to(torch.float32)
    return value


def _scaled(value: Tensor, scale: Tensor | None, offset: Tensor | None, groups: _Groups) -> Tensor:
    """value / scale + offset; one scale for a row multiplies by 1 / scale."""
    if scale is None:
        return value
    assert offset is not None
    factor = groups.pick(scale)
    if factor.shape[-1] == 1:
        # dequant_swiglu_quant.h takes a scale of 0 for 1
        inverse = torch.where(factor == 0, 1.0, factor.reciprocal())
        return value * inverse + groups.pick(offset)[:, :1]
    return value / factor + groups.pick(offset)


@op("DequantSwigluQuant")
def _dequant_swiglu_quant(
    x: Tensor,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    activate_left: bool = False,
    quant_mode: str = "static",
    dst_type: int = 2,
    round_mode: str = "rint",
    activate_dim: int = -1,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    call = DequantSwigluQuantCall(
        executor.soc_name(),
        describe(x),
        optional_desc(weight_scale),
        optional_desc(activation_scale),
        optional_desc(bias),
        optional_desc(quant_scale),
        optional_desc(quant_offset),
        optional_desc(group_index),
        quant_mode,
        quantized_name(dst_type),
        round_mode,
        activate_dim,
        swiglu_mode,
        is_graph=True,
    )
    if refusal := check_dequant_swiglu_quant(call):
        raise GraphError(refusal)
    # no kernel writes rows outside the groups, nor the scale of a static quantization
    y = x.new_zeros((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.int8)
    scale = x.new_zeros(x.shape[:-1], dtype=torch.float32)
    if executor.is_meta(x):
        return y, scale
    options = SwiGluOptions(activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
    values, steps = dequant_swiglu_quant(
        call,
        x,
        weight_scale,
        activation_scale,
        bias,
        quant_scale,
        quant_offset,
        group_index,
        options,
    )
    y.view(-1, y.shape[-1])[: len(values)] = values
    if steps is not None:
        scale.view(-1)[: len(steps)] = steps
    return y, scale


# ---- SwiGluQuant ----


def swi_glu_quant(
    call: SwiGluQuantCall,
    x: Tensor,
    smooth_scales: Tensor,
    offsets: Tensor | None,
    group_index: Tensor | None,
    *,
    activate_left: bool,
) -> tuple[Tensor, Tensor | None]:
    """int8 of x's rows, int4 values unpacked, and, if the quantization is dynamic, float32 factors:
    127 or 7 divided by the row's largest magnitude. A row after the last group has no scale.

    Raises:
        GraphError: group_index does not rise, or leaves x.
    """
    x = x.reshape(-1, x.shape[-1])
    value = _gated(x.to(torch.float32), SwiGluOptions(activate_left))
    ends = _ends_of(group_index, call.group_list_type, len(x))
    count = len(ends)
    counts = torch.tensor(ends).diff(prepend=torch.tensor([0]))
    groups = _Groups(ends[-1], torch.repeat_interleave(torch.arange(count), counts))
    value[: groups.rows] *= groups.pick(smooth_scales.reshape(count, -1))
    bits = 4 if call.dst_type == "int4" else 8
    if call.quant_mode == "static":
        assert offsets is not None
        value[: groups.rows] += groups.pick(offsets.reshape(count, -1))
        return to_integers(value, bits), None
    peak = value.abs().amax(-1)
    values, _ = quantize_rows(value, peak, bits, Arithmetic.MULTIPLY)
    return values, torch.full_like(peak, 7.0 if bits == 4 else 127.0).div_(peak)


def _ends_of(group_index: Tensor | None, group_list_type: int, rows: int) -> list[int]:
    """For each group the row after its last."""
    if group_index is None:
        return [rows]
    ends = [int(end) for end in group_index.tolist()]
    if group_list_type == 1:
        ends = [sum(ends[: i + 1]) for i in range(len(ends))]
    counts = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    if refusal := check_group_list(counts, rows):
        raise GraphError(refusal)
    return ends


@op("SwiGluQuant")
def _swi_glu_quant(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    offsets: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    activate_left: bool = False,
    quant_mode: str = "dynamic",
    group_list_type: int = 0,
    dst_type: int = 2,
) -> tuple[Tensor | Int4, Tensor]:
    call = SwiGluQuantCall(
        executor.soc_name(),
        describe(x),
        optional_desc(smooth_scales),
        optional_desc(offsets),
        optional_desc(group_index),
        quant_mode,
        group_list_type,
        quantized_name(dst_type),
        is_graph=True,
    )
    if refusal := check_swi_glu_quant(call):
        raise GraphError(refusal)
    y_shape = (*x.shape[:-1], x.shape[-1] // 2)
    scale = x.new_zeros(x.shape[:-1], dtype=torch.float32)  # no static kernel writes it
    if executor.is_meta(x):
        y = x.new_zeros(y_shape, dtype=torch.int8)
    else:
        assert smooth_scales is not None
        values, factors = swi_glu_quant(
            call, x, smooth_scales, offsets, group_index, activate_left=activate_left
        )
        y = values.reshape(y_shape)
        scale = scale if factors is None else factors.reshape(scale.shape)
    return Int4(y) if dst_type == INT4 else y, scale
