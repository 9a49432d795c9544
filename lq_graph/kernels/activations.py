"""Quantized activations: what the DynamicQuant and AscendQuant kernels compute.

Sources: the kernels of quant/dynamic_quant and quant/ascend_quant_v2 (hicann/ops-nn).
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from . import native
from .memory import check_held
from .packing import pack_int4

__all__ = [
    "Arithmetic",
    "dynamic_quant",
    "dynamic_quant_with_offset",
    "for_rows",
    "quantize_rows",
    "static_quant",
]

# the range of a quantized value: int8, and int4 (held as int8 until it is packed)
_LIMITS = {8: (-128, 127), 4: (-8, 7)}

_EPSILON = 1e-12  # DYNAMIC_QUANT_EPSINON of the DynamicQuant kernels


class Arithmetic(Enum):
    """How a DynamicQuant kernel computes values and scale from a row's peak, its largest magnitude.

    top is 127, or 7 for int4. lq_graph.rules and cann_host.chips each say which kernel a chip runs.

    Attributes:
        MULTIPLY: float32 x * (top / peak), scale peak * (1 / top). dynamic_quant_db.h,
            dynamic_quant_multi_row.h, dynamic_quant_single_row.h.
        RECIPROCAL: the same values, scale 1 / (top / peak). dynamic_quant.h,
            dynamic_quant_large_shape_opt.h, dynamic_quant_moe.h, dynamic_quant_moe_large_shape.h.
        DIVIDE: float32 x / scale, scale peak * (1 / top). arch35/dynamic_quant_regbase_*.h.
        HALF: float16 x * float16(127 / peak), halves rounded away from zero, scale
            peak * (1 / 127) in float32. dynamic_quant_align_310p.h and both unalign files. The
            factor leaves float16 for a peak below 127 / 65504.
        STEP: float32 x * (1 / scale), scale peak / top.
            quant/dequant_swiglu_quant/op_kernel/dequant_swiglu_quant_dynamic_base.hpp.
    """

    MULTIPLY = "multiply"
    RECIPROCAL = "reciprocal"
    DIVIDE = "divide"
    HALF = "half"
    STEP = "step"

    def __init__(self, _: str) -> None:
        self.number = len(type(self).__members__)  # in enum LqArithmetic of csrc/call.h


# A2 and A3 write the scale as peak * (1 / top) up to a k that depends on whether there are smooth
# scales: the first number holds for any k, the second for multiples of 8 (from 128 on). A longer
# row does not fit the vector unit's 192 KiB, and other kernels run. Source: SetTilingData (13 or 19
# bytes a value of k) and CheckMultiRowPreconditions of dynamic_quant_tiling.cpp (hicann/ops-nn,
# quant/dynamic_quant/op_host).
_MULTIPLIES = {False: (15040, 16320), True: (10288, 12800)}


def for_rows(
    arithmetic: Arithmetic, k: int, *, smooth: bool = False, groups: bool = False
) -> Arithmetic:
    """The arithmetic of the kernel that a chip chooses for rows of k values.

    Args:
        arithmetic: of the chip, for rows of usual length.
        k: values in a row.
        smooth, groups: whether there are smooth_scales, and a group_index.
    """
    if arithmetic is not Arithmetic.MULTIPLY:
        return arithmetic
    any_k, aligned_k = _MULTIPLIES[smooth]
    multiplies = k <= any_k or (k <= aligned_k and k % 8 == 0)
    return Arithmetic.MULTIPLY if multiplies and not groups else Arithmetic.RECIPROCAL


def _clamped(whole: Tensor, bits: int) -> Tensor:
    """Whole float32 numbers to int8 values, clamped; NaN becomes 0, as on the chip."""
    low, high = _LIMITS[bits]
    # All three values are given, because torchair's converter does not take None.
    return whole.nan_to_num_(0.0, high, low).clamp_(low, high).to(torch.int8)


def _to_integer(value: Tensor, bits: int) -> Tensor:
    """float32 to int8 values, rounded half to even and clamped."""
    return _clamped(value.round_(), bits)


def _half_to_integer(value: Tensor, bits: int) -> Tensor:
    """float16 to int8 values, halves rounded away from zero: CAST_ROUND of 310P."""
    value = value.to(torch.float32)
    return _clamped((value + value.sign() * 0.5).trunc_(), bits)


def _ratio(top: float, divisor: Tensor) -> Tensor:
    """top / divisor, rounded once: torch computes it as a reciprocal times top."""
    return torch.full_like(divisor, top).div_(divisor)


def dynamic_quant(
    x: Tensor, bits: int, arithmetic: Arithmetic, *, packed: bool = False
) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last dim by its largest magnitude, symmetric. The compiled kernel of
    `native` computes it for tensors of the CPU, torch for others, to the same numbers.

    For a row of zeros the result is zeros and a scale of 0. For a row that holds infinity or NaN it
    is zeros and a scale that is infinite or NaN.

    Args:
        x: float16 or bfloat16, or float32 after it was multiplied by smooth scales; (..., k).
        bits: 8, or 4 with 7 in place of 127.
        arithmetic: which kernel to compute as.
        packed: int4 values are packed, as `pack_int4` does; only with bits 4.

    Returns:
        int8 (..., k), or int32 (..., k/8) if packed; and float32 (...), the size of one step.

    Raises:
        PartialGroupError: packed, and k is not a multiple of 8.
        ShortStorageError: x's storage is shorter than its shape.
    """
    out = native.dynamic_quant(x, bits, arithmetic.number, packed)
    if out is not None:
        return out
    check_held("x", x)
    x = x.contiguous()  # as the outputs are
    values, scale = quantize_rows(x, x.to(torch.float32).abs().amax(-1), bits, arithmetic)
    return (pack_int4(values) if packed else values), scale


def quantize_rows(
    x: Tensor, peak: Tensor, bits: int, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of rows whose largest magnitudes are known, or of a part of their k."""
    top = _LIMITS[bits][1]
    scale = peak * (1 / top)
    if arithmetic is Arithmetic.DIVIDE:
        return _to_integer(x.to(torch.float32) / scale.unsqueeze(-1), bits), scale
    if arithmetic is Arithmetic.STEP:
        scale = peak / torch.full_like(peak, top)
        return _to_integer(x.to(torch.float32) * _ratio(1.0, scale).unsqueeze(-1), bits), scale
    factor = _ratio(top, peak)
    if arithmetic is Arithmetic.HALF:
        factor = factor.masked_fill(peak <= _EPSILON, 0.0).to(torch.float16)
        return _half_to_integer(x.to(torch.float16) * factor.unsqueeze(-1), bits), scale
    if arithmetic is Arithmetic.RECIPROCAL:
        scale = _ratio(1.0, factor)
    return _to_integer(x.to(torch.float32) * factor.unsqueeze(-1), bits), scale


def dynamic_quant_with_offset(
    x: Tensor, bits: int, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row of the last dim by its least and largest value, asymmetric.

    DynamicQuantV2 computes this with an offset (aclnnDynamicQuantV2 to V4): x is about
    (value - offset) * scale. With top 127 and span 255 (7 and 15 for int4), in float32:

    - MULTIPLY and RECIPROCAL: scale max((high - low) / span, 1e-12), offset top - high / scale,
      values x * (1 / scale) + offset.
    - DIVIDE: scale (high - low) * (1 / span), offset top - high / scale, values
      x / scale + offset.
    - HALF, int8 only: factor span / (high - low), 0 for a row of one value; scale
      (high - low) / span, offset -(high + low) * factor / 2, values in float16
      x * float16(factor) + float16(offset), halves rounded away from zero.

    Args:
        x: as `dynamic_quant` takes it.
        bits: 8, or 4.
        arithmetic: which kernel to compute as.

    Returns:
        int8 (..., k), int4 values unpacked, and float32 (...) twice: scale and offset.
    """
    top = _LIMITS[bits][1]
    span = float(2**bits - 1)
    value = x.to(torch.float32)
    high, low = value.amax(-1), value.amin(-1)
    spread = high - low
    if arithmetic is Arithmetic.HALF:
        scale = spread / torch.full_like(spread, span)
        factor = _ratio(span, spread).masked_fill(spread <= _EPSILON, 0.0)
        offset = -(high + low) * factor * 0.5
        half = x.to(torch.float16) * factor.to(torch.float16).unsqueeze(-1)
        half += offset.to(torch.float16).unsqueeze(-1)
        return _half_to_integer(half, bits), scale, offset
    if arithmetic is Arithmetic.DIVIDE:
        scale = spread * (1 / span)
        steps = value / scale.unsqueeze(-1)
        offset = -(high / scale) + top
    else:
        scale = spread / torch.full_like(spread, span)
        # the kernel's maximum returns its second operand for NaN
        scale = torch.where(scale > _EPSILON, scale, torch.full_like(scale, _EPSILON))
        steps = value * _ratio(1.0, scale).unsqueeze(-1)
        offset = top - high / scale
    return _to_integer(steps + offset.unsqueeze(-1), bits), scale, offset


def static_quant(
    x: Tensor,
    scale_reciprocal: Tensor,
    offset: Tensor | None = None,
    axis: int = -1,
    bits: int = 8,
    *,
    packed: bool = False,
) -> Tensor:
    """Quantize with a given scale: x * scale_reciprocal + offset, in float32. The compiled kernel
    computes it as it does `dynamic_quant`.

    Args:
        x: float, 1 dim or more.
        scale_reciprocal: float, one value, or one for each index of the axis.
        offset: float, as scale_reciprocal, or None.
        axis: the dim of x that scale_reciprocal and offset run along.
        bits: 8, or 4.
        packed: int4 values are packed, as `pack_int4` does; only with bits 4.

    Returns:
        int8, x's shape; or int32 (..., k/8) if packed.

    Raises:
        PartialGroupError: packed, and k is not a multiple of 8.
        ShortStorageError: a tensor's storage is shorter than its shape.
    """
    out = native.static_quant(x, scale_reciprocal, offset, axis, bits, packed)
    if out is not None:
        return out
    for name, tensor in (("x", x), ("scale_reciprocal", scale_reciprocal), ("offset", offset)):
        if tensor is not None:
            check_held(name, tensor)
    shape = [1] * x.dim()
    shape[axis] = -1
    value = x.contiguous().to(torch.float32) * scale_reciprocal.to(torch.float32).reshape(shape)
    if offset is not None:
        value.add_(offset.to(torch.float32).reshape(shape))
    values = _to_integer(value, bits)
    return pack_int4(values) if packed else values
