"""LinearQuant in plain torch on the CPU, for the self-test of `python -m lq_graph doctor`.

Written from the formulas of the documents (aclnnQuantMatmulV4.md, aclnnTransQuantParamV2.md,
aclnnDynamicQuant.md and aclnnAscendQuantV3.md of hicann/ops-nn), with none of lq_graph's kernels:
the product is an int64 matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dynamic_quant_misses", "linear_quant", "static_quant", "trans_quant_param", "unpack"]

_FLOAT16_MAX = 65504.0


def unpack(words: Tensor) -> Tensor:
    """int32 (..., k/8) to its int4 values (..., k), the lowest four bits first."""
    nibbles = torch.stack([(words >> 4 * i) & 0xF for i in range(8)], -1).flatten(-2)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def trans_quant_param(scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """The 64-bit form of a scale: the upper 19 bits of its float32, bit 46 set, and the offset as
    nine bits from bit 37 on."""
    word = (scale.float().view(torch.int32).long() & 0xFFFFE000) + (1 << 46)
    if offset is not None:
        word = word + ((offset.round().clamp(-256, 255).long() & 0x1FF) << 37)
    return word


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype,
) -> Tensor:
    """x1 (m, k) and weight (n, k), int8 or int32 holding int4, to (m, n). n is more than 1."""
    if x1.dtype == torch.int32:
        x1, weight = unpack(x1), unpack(weight)
    total = x1.long() @ weight.long().T
    if bias is not None and bias.dtype == torch.int32:
        total, bias = total + bias.long(), None
    if output_dtype == torch.int32:
        return total.int()
    value = total.int().float()
    folded = output_dtype == torch.int8 or (
        output_dtype == torch.float16 and pertoken_scale is None
    )
    if folded or scale.dtype == torch.int64:
        word = scale if scale.dtype == torch.int64 else trans_quant_param(scale, offset)
        value = value * (word & 0xFFFFE000).int().view(torch.float32)
        if output_dtype == torch.float16:
            return value.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half()
        if output_dtype == torch.bfloat16:
            return value.bfloat16()
        nine = (word >> 37) & 0x1FF
        nine = torch.where(nine > 255, nine - 512, nine)
        return (value.round().clamp(-256, 255).long() + nine).clamp(-128, 127).to(torch.int8)
    value = value * scale.float()
    if pertoken_scale is not None:
        value = value * pertoken_scale[:, None]
    if bias is not None:
        value = value + bias.float()
    return value.to(output_dtype)


def static_quant(x: Tensor, scale_reciprocal: Tensor, offset: Tensor | None) -> Tensor:
    """x * scale_reciprocal + offset as int8, rounded half to even."""
    value = x.float() * scale_reciprocal.float()
    if offset is not None:
        value = value + offset.float()
    return value.round().clamp(-128, 127).to(torch.int8)


def dynamic_quant_misses(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """How far the result of dynamic_quant is from its definition, one number for each value of x.

    A row's scale is its largest magnitude / top (127, or 7 for int4), and a value is x / scale
    rounded. Kernels of different chips round differently, so this counts what no rounding explains.

    Returns:
        steps beyond one step, infinite in rows with a wrong scale; 0 where the result is right.
    """
    top = 127 if values.dtype == torch.int8 else 7
    values = values if values.dtype == torch.int8 else unpack(values)
    x = x.double()
    want = x.abs().amax(-1) / top
    off = (values.double() - x / want[:, None]).abs()
    beyond = torch.where(off <= 1, 0.0, off - 1)
    wrong_scale = (scale.double() - want).abs() > want * 1e-6
    return torch.where(wrong_scale[:, None], torch.inf, beyond)
