"""The arithmetic of LinearQuant, written once.

The CPU kernel of `lq_graph` and the operators of `cann_host` both call these functions, so
what runs eagerly on a laptop and what a compiled graph computes there cannot drift apart.
Nothing here validates: `lq_graph.rules.plan` has done that before.

Sources: aclnnQuantMatmulV4 / aclnnTransQuantParamV2 documents of CANN (hicann/ops-nn,
`matmul/quant_batch_matmul_v3/docs`, `quant/trans_quant_param_v2`), and the kernels of
`quant/dynamic_quant` and `quant/ascend_quant_v2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from . import native

__all__ = [
    "INT4_PER_INT32",
    "Arithmetic",
    "NzWeight",
    "dynamic_quant",
    "dynamic_quant_with_offset",
    "epilogue",
    "for_rows",
    "is_cut",
    "matmul_int32",
    "nd_to_nz",
    "nz_shape",
    "nz_to_nd",
    "pack_int4",
    "pack_scale",
    "quant_matmul",
    "quantize_rows",
    "s19",
    "static_quant",
    "unpack_int4",
    "unpack_scale",
]

INT4_PER_INT32 = 8


class TensorLike(Protocol):
    """What decides: a tensor, a fake tensor, or any record of a dtype and a shape."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


# Layout of the packed 64-bit quantization parameter.
_SCALE_MASK = 0xFFFFE000  # the float32 bits the fixed-point pipe keeps: sign, exponent, 10 mantissa
_OFFSET_SHIFT = 37
_OFFSET_MASK = 0x1FF
_VALID_BIT = 1 << 46

_FLOAT16_MAX = 65504.0

# the range of a quantized value: int8, and int4 (held as int8 until it is packed)
_LIMITS = {8: (-128, 127), 4: (-8, 7)}

_EPSILON = 1e-12  # DYNAMIC_QUANT_EPSINON of the DynamicQuant kernels


def s19(scale: Tensor) -> Tensor:
    """Truncate float32 to the 19 bits the fixed-point pipe keeps (sign, exponent, 10 mantissa).

    Args:
        scale: float32, any shape.

    Returns:
        float32, the same shape.
    """
    bits = scale.contiguous().view(torch.int32)
    # the mask as a signed int32
    return (bits & (_SCALE_MASK - (1 << 32))).view(torch.float32)


def is_cut(
    scale: TensorLike,
    pertoken_scale: TensorLike | None,
    bias: TensorLike | None,
    output_dtype: torch.dtype,
    *,
    per_tensor: bool,
) -> bool:
    """Whether a chip that multiplies by a scale of one value on the way out of the matrix unit does
    so here, and keeps but its `s19`: the int8 matmul to bfloat16 where nothing comes after it.

    Args:
        scale, pertoken_scale, bias, output_dtype: of the call.
        per_tensor: whether the scale is of one value; in a graph its size may be a symbol.
    """
    return (
        scale.dtype == torch.float32
        and output_dtype == torch.bfloat16
        and pertoken_scale is None
        and (bias is None or bias.dtype == torch.int32)
        and per_tensor
    )


def pack_scale(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fold a scale and an offset into the 64-bit parameter QuantBatchMatmul reads.

    Bits 13..31 hold the scale's top 19 bits, bits 37..45 the offset as 9-bit two's complement
    (rounded half to even, clamped to [-256, 255]), bit 46 is set.

    Args:
        scale: float32, (1,), (n,) or (1, n).
        offset: float32, broadcastable with scale, or None.
        round_mode: 0 truncates the scale to 19 bits, 1 rounds it half to even and subnormals to
            zero, but truncates infinity and NaN, which may make infinity of NaN.

    Returns:
        int64, the broadcast shape of scale and offset.

    Source: op_kernel/trans_quant_param_v2.h, the same on every chip.
    """
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        exponent = bits & 0x7F800000
        rounded = bits + 0xFFF + ((bits >> 13) & 1)
        rounded = torch.where(exponent == 0x7F800000, bits, rounded)
        bits = torch.where(exponent == 0, bits & 0x80000000, rounded)
    packed = (bits & _SCALE_MASK) | _VALID_BIT
    if offset is not None:
        # the chip's cast makes 0 of NaN
        whole = torch.round(offset).nan_to_num(0.0, 255, -256).clamp(-256, 255)
        offset9 = whole.to(torch.int64) & _OFFSET_MASK
        packed = packed | (offset9 << _OFFSET_SHIFT)
    return packed


def unpack_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Read back what `pack_scale` wrote.

    Args:
        packed: int64 (or uint64), any shape.

    Returns:
        The 19-bit scale as float32 and the offset as int32, both of packed's shape.
    """
    word = packed.view(torch.int64)
    low = word & _SCALE_MASK
    # int64 -> int32 must wrap, not saturate: go through the signed value
    scale = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32).view(torch.float32)
    offset = (word >> _OFFSET_SHIFT) & _OFFSET_MASK
    return scale, torch.where(offset >= 256, offset - 512, offset).to(torch.int32)


def pack_int4(values: Tensor) -> Tensor:
    """Pack groups of eight int4 values of the last dim into int32; see `unpack_int4`.

    Args:
        values: int8, (..., k) with k a multiple of 8 and values in -8..7 (not checked here).

    Returns:
        int32, (..., k / 8).
    """
    shape = (*values.shape[:-1], values.shape[-1] // INT4_PER_INT32)
    if not values.numel():  # no view of it has another dtype
        return values.new_empty(shape, dtype=torch.int32)
    pairs = _aligned(values).view(torch.int16).reshape(-1)  # two values each, the first one low
    packed = torch.empty(pairs.shape, dtype=torch.uint8, device=values.device)
    for part in _cache_sized(pairs.numel()):
        pair = pairs[part]
        # the second value moves down beside the first: 0x0B0A becomes 0xBA
        packed[part] = ((pair >> 4) & 0xF0).bitwise_or_(pair & 0xF)
    return packed.view(torch.int32).view(shape)


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack int32 carrying eight int4 each; value i sits in bits 4i..4i+3, two's complement.

    Args:
        packed: int32, (..., k / 8).

    Returns:
        int8, (..., k), values in -8..7.
    """
    shape = (*packed.shape[:-1], packed.shape[-1] * INT4_PER_INT32)
    if not packed.numel():
        return packed.new_empty(shape, dtype=torch.int8)
    pairs = _plain(packed).view(torch.uint8).reshape(-1)
    values = torch.empty(2 * pairs.numel(), dtype=torch.int8, device=packed.device)
    words = values.view(torch.int16)
    for part in _cache_sized(pairs.numel()):
        pair = pairs[part].to(torch.int16)
        word = words[part]
        # 0xBA becomes 0x0B0A; (x ^ 8) - 8 in each byte is the sign extension
        word.copy_(((pair << 4) | pair).bitwise_and_(0x0F0F).bitwise_xor_(0x0808))
        word.view(torch.int8).sub_(8)
    return values.view(shape)


def _cache_sized(count: int) -> Iterator[slice]:
    """Slices of a long vector, so that the passes over each stay in the cache: 5 to 10 times
    faster than whole passes over a large weight."""
    step = 1 << 20
    for start in range(0, count, step):
        yield slice(start, start + step)


def _plain(x: Tensor) -> Tensor:
    """x contiguous, with strides that allow a view of another dtype: a dim of 1 may have any."""
    x, expected = x.contiguous(), 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if stride != expected:
            return x.clone(memory_format=torch.contiguous_format)
        expected *= size
    return x


def _aligned(x: Tensor) -> Tensor:
    """x contiguous, and laid out so that it can be viewed in 8-byte words."""
    x = _plain(x)
    return x.clone() if x.storage_offset() * x.element_size() % 8 else x


def nz_shape(rows: int, cols: int, c0: int) -> tuple[int, int, int, int]:
    """The blocks of (rows, cols) in FRACTAL_NZ: (ceil(cols/c0), ceil(rows/16), 16, c0)."""
    return -(-cols // c0), -(-rows // 16), 16, c0


def nd_to_nz(x: Tensor, c0: int) -> Tensor:
    """Lay out ND (..., R, C) as FRACTAL_NZ, (..., ceil(C/c0), ceil(R/16), 16, c0), zero padded.

    Args:
        x: ND, 2 dims or more.
        c0: elements in a block's row, a multiple of 8 bytes (CANN's blocks have 32).
    """
    rows, cols = x.shape[-2:]
    if not x.numel():
        return x.new_empty((*x.shape[:-2], *nz_shape(rows, cols, c0)))
    if rows % 16 or cols % c0:
        x = torch.nn.functional.pad(x, (0, -cols % c0, 0, -rows % 16))
    # words of 8 bytes move faster than elements
    words = _aligned(x).view(torch.int64)
    blocks: Tensor = words.unflatten(-1, (-1, c0 * x.element_size() // 8)).unflatten(-3, (-1, 16))
    return blocks.movedim(-2, -4).contiguous().view(x.dtype)  # (..., C/c0, R/16, 16, c0)


def nz_to_nd(x: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of `nd_to_nz`: (..., C/c0, R/16, 16, c0) to (..., rows, cols), padding dropped."""
    if not x.numel():
        return x.new_empty((*x.shape[:-4], rows, cols))
    words = _aligned(x).view(torch.int64).movedim(-4, -2).flatten(-2).flatten(-3, -2)
    return words.contiguous().view(x.dtype)[..., :rows, :cols].contiguous()


@dataclass(frozen=True)
class NzWeight:
    """A weight that lies as FRACTAL_NZ.

    Attributes:
        blocks: (ceil(columns / c0), ceil(n / 16), 16, c0), contiguous; 32 bytes in a block's row.
        n, columns: the shape in ND, (n, k) of int8 or (n, k/8) of int32.
    """

    blocks: Tensor
    n: int
    columns: int

    def __post_init__(self) -> None:
        if not self.fits(self.blocks, (self.n, self.columns)):
            raise ValueError(
                f"blocks {tuple(self.blocks.shape)} do not hold a weight ({self.n}, {self.columns})"
            )

    @staticmethod
    def fits(blocks: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether blocks hold a weight of this ND shape: a kernel reads as much as that says."""
        if len(shape) != 2:
            return False
        wanted = nz_shape(*shape, 32 // blocks.element_size())
        return tuple(blocks.shape) == wanted and blocks.is_contiguous()

    def nd(self) -> Tensor:
        """The same in ND, a copy."""
        return nz_to_nd(self.blocks, self.n, self.columns)


def _no_overlap(x: Tensor) -> Tensor:
    """torch._int_mm (2.13, CPU) gives garbage for rows or columns that share memory."""
    rows, cols = x.stride()[-2:]
    plain = (cols == 1 and rows >= x.shape[-1]) or (rows == 1 and cols >= x.shape[-2])
    return x if plain else x.clone(memory_format=torch.contiguous_format)


def matmul_int32(x1: Tensor, weight: Tensor) -> Tensor:
    """Exact int32 product of int8 matrices, the weight untransposed.

    Args:
        x1: int8, (..., m, k).
        weight: int8, (..., n, k); batch dims broadcast with those of x1.

    Returns:
        int32, (..., m, n), batch dims broadcast.
    """
    if 0 in x1.shape or 0 in weight.shape:
        batch = torch.broadcast_shapes(x1.shape[:-2], weight.shape[:-2])
        sizes = (*batch, x1.shape[-2], weight.shape[-2])
        return torch.zeros(sizes, dtype=torch.int32, device=x1.device)
    if x1.shape[-1] == 1:
        # torch._int_mm (2.13, CPU) gives garbage for k = 1 and n > 1
        return x1.to(torch.int32) * weight.to(torch.int32).transpose(-1, -2)
    if weight.dim() == 2:
        flat = torch._int_mm(_no_overlap(x1.reshape(-1, x1.shape[-1])), _no_overlap(weight).t())
        return flat.view(*x1.shape[:-1], weight.shape[0])
    batch = torch.broadcast_shapes(x1.shape[:-2], weight.shape[:-2])
    left = x1.expand(*batch, *x1.shape[-2:]).reshape(-1, *x1.shape[-2:])
    right = weight.expand(*batch, *weight.shape[-2:]).reshape(-1, *weight.shape[-2:])
    out = torch.empty(
        left.shape[0], x1.shape[-2], weight.shape[-2], dtype=torch.int32, device=x1.device
    )
    for i in range(left.shape[0]):
        torch._int_mm(_no_overlap(left[i]), _no_overlap(right[i]).t(), out=out[i])
    return out.view(*batch, *out.shape[-2:])


def quant_matmul(
    x1: Tensor,
    weight: Tensor | NzWeight,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    output_dtype: torch.dtype,
) -> Tensor:
    """Quantized matmul with LinearQuant's epilogue.

    Every case ends in one rounding to the output dtype, half to even. The compiled kernel of
    `native` computes it where it can, and what is written here everywhere else: the same numbers.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying int4.
        weight: its dtype, (..., n, k) or (n, k/8), or an NzWeight of (n, k) or (n, k/8).
        scale: (1,) or (n,). The packed int64 form for int8 output and for float16 output
            without pertoken_scale, and possibly for bfloat16; float32 or bfloat16 otherwise (read
            only for a float output).
        bias: int32 (added to the accumulator) or a float dtype (added last); (n,) or
            (batch, 1, n).
        pertoken_scale: float32, (m,).
        output_dtype: torch.int8, float16, bfloat16 or int32.

    Returns:
        output_dtype, (..., m, n).

    Raises:
        LinearQuantValueError: a packed scale that is read holds infinity or NaN, or a tensor's
            storage is shorter than its shape.
    """
    if isinstance(weight, NzWeight):
        stored, nz_shape = weight.blocks, (weight.n, weight.columns)
    else:
        stored, nz_shape = weight, None
    out = native.matmul(x1, stored, scale, bias, pertoken_scale, output_dtype, nz_shape)
    if out is not None:
        return out
    operands = {"x1": x1, "weight": stored, "scale": scale, "bias": bias}
    for name, tensor in {**operands, "pertoken_scale": pertoken_scale}.items():
        if tensor is not None:
            native.refuse_shortened(name, tensor)
    if isinstance(weight, NzWeight):
        weight = weight.nd()
    if x1.dtype == torch.int32:
        x1, weight = unpack_int4(x1), unpack_int4(weight)
    acc = matmul_int32(x1, weight)
    offset = None
    folded = scale.dtype in (torch.int64, torch.uint64)
    if folded and output_dtype != torch.int32:
        scale, offset = unpack_scale(scale)
        if not scale.isfinite().all():
            native.refuse_not_finite()
    return epilogue(
        acc,
        scale,
        folded=folded,
        offset=offset,
        bias=bias,
        pertoken_scale=pertoken_scale,
        output_dtype=output_dtype,
    )


def epilogue(
    acc: Tensor,
    scale: Tensor,
    *,
    folded: bool,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    output_dtype: torch.dtype,
) -> Tensor:
    """What follows the matmul.

    Args:
        acc: int32, (..., m, n), the accumulators; may be overwritten.
        scale: (1,) or (n,): float32 with 19 bits where the row reads the packed form (`folded`),
            float32 or bfloat16 elsewhere.
        folded: whether the row reads the packed form.
        offset: of the packed form, an integer from -256 to 255 each; None for 0.
        bias, pertoken_scale, output_dtype: as `quant_matmul` takes them.

    Returns:
        output_dtype, (..., m, n).
    """
    if bias is not None and bias.dtype == torch.int32:
        acc = acc.add_(bias) if acc.dim() >= bias.dim() else acc + bias
        bias = None
    if output_dtype == torch.int32:
        return acc

    value = acc.to(torch.float32)
    if folded:
        value.mul_(scale)
        if output_dtype == torch.int8:
            # 9-bit clip first, the offset after it: 400 with offset -200 gives 55, not 127
            value.round_().clamp_(-256, 255)
            if offset is not None:
                value.add_(offset)
            value.clamp_(-128, 127)
        elif output_dtype == torch.float16:
            value.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
        return value.to(output_dtype)

    value.mul_(scale.to(torch.float32))
    if pertoken_scale is not None:
        value.mul_(pertoken_scale.unsqueeze(-1))
    if bias is not None:
        value.add_(bias.to(torch.float32))
    return value.to(output_dtype)


class Arithmetic(Enum):
    """How a DynamicQuant kernel gets from a row's largest magnitude, its peak, to values and scale.

    top is 127, or 7 for int4. Which kernel a chip runs is said by `lq_graph.rules.activations`.

    Attributes:
        MULTIPLY: float32 x * (top / peak), scale peak * (1 / top). dynamic_quant_db.h,
            dynamic_quant_multi_row.h, dynamic_quant_single_row.h.
        RECIPROCAL: the same values, scale 1 / (top / peak). dynamic_quant.h,
            dynamic_quant_large_shape_opt.h, dynamic_quant_moe.h, dynamic_quant_moe_large_shape.h.
        DIVIDE: float32 x / scale, scale peak * (1 / top). arch35/dynamic_quant_regbase_*.h.
        HALF: float16 x * float16(127 / peak), halves rounded away from zero, scale
            peak * (1 / 127) in float32. dynamic_quant_align_310p.h and both unalign files. The
            factor leaves float16 for a peak below 127 / 65504.
    """

    MULTIPLY = "multiply"
    RECIPROCAL = "reciprocal"
    DIVIDE = "divide"
    HALF = "half"


# By whether there are smooth scales: up to which k a kernel of A2 or A3 is chosen that writes its
# scale as peak * (1 / top), and up to which one that wants k a multiple of 8, at least 128. By what
# fits the vector unit's memory of 192 KiB: quant/dynamic_quant/op_host/dynamic_quant_tiling.cpp
# (hicann/ops-nn), SetTilingData (13 or 19 bytes for each of k) and CheckMultiRowPreconditions.
_MULTIPLIES = {False: (15040, 16320), True: (10288, 12800)}


def for_rows(
    arithmetic: Arithmetic, k: int, *, smooth: bool = False, groups: bool = False
) -> Arithmetic:
    """What the kernel computes that a chip chooses for rows of k.

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
    # all three values given: torchair's converter takes no None
    return whole.nan_to_num_(0.0, high, low).clamp_(low, high).to(torch.int8)


def _to_integer(value: Tensor, bits: int) -> Tensor:
    """float32 to int8 values, rounded half to even and clamped."""
    return _clamped(value.round_(), bits)


def _half_to_integer(value: Tensor) -> Tensor:
    """float16 to int8, halves rounded away from zero: CAST_ROUND of 310P."""
    value = value.to(torch.float32)
    return _clamped((value + value.sign() * 0.5).trunc_(), 8)


def _ratio(top: float, divisor: Tensor) -> Tensor:
    """top / divisor, rounded once: torch computes it as a reciprocal times top."""
    return torch.full_like(divisor, top).div_(divisor)


def dynamic_quant(x: Tensor, bits: int, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Quantize each row of the last dim by its largest magnitude, symmetric.

    A row of zeros gives zeros and a scale of 0; one that holds infinity or NaN gives zeros and a
    scale that is infinite or NaN.

    Args:
        x: float16 or bfloat16, or float32 once smooth scales are in it; (..., k).
        bits: 8, or 4 with 7 in place of 127.
        arithmetic: of the kernel that is stood in for.

    Returns:
        int8 (..., k), int4 values unpacked, and float32 (...), the size of one step.
    """
    return quantize_rows(x, x.to(torch.float32).abs().amax(-1), bits, arithmetic)


def quantize_rows(
    x: Tensor, peak: Tensor, bits: int, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of rows, or of a part of their k, whose largest magnitudes are known."""
    top = _LIMITS[bits][1]
    scale = peak * (1 / top)
    if arithmetic is Arithmetic.DIVIDE:
        return _to_integer(x.to(torch.float32) / scale.unsqueeze(-1), bits), scale
    factor = _ratio(top, peak)
    if arithmetic is Arithmetic.HALF:
        factor = factor.masked_fill(peak <= _EPSILON, 0.0).to(torch.float16)
        return _half_to_integer(x.to(torch.float16) * factor.unsqueeze(-1)), scale
    if arithmetic is Arithmetic.RECIPROCAL:
        scale = _ratio(1.0, factor)
    return _to_integer(x.to(torch.float32) * factor.unsqueeze(-1), bits), scale


def dynamic_quant_with_offset(
    x: Tensor, bits: int, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row of the last dim by its least and largest value, asymmetric.

    What DynamicQuantV2 computes with an offset (aclnnDynamicQuantV2 to V4): x is about
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
        arithmetic: of the kernel that is stood in for.

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
        return _half_to_integer(half + offset.to(torch.float16).unsqueeze(-1)), scale, offset
    if arithmetic is Arithmetic.DIVIDE:
        scale = spread * (1 / span)
        steps = value / scale.unsqueeze(-1)
        offset = -(high / scale) + top
    else:
        scale = spread / torch.full_like(spread, span)
        # the kernel's maximum gives the second for NaN
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
) -> Tensor:
    """Quantize with a scale that is known: x * scale_reciprocal + offset, in float32.

    Args:
        x: float, 1 dim or more.
        scale_reciprocal: float, 1 value or one for each index of the axis.
        offset: float, as scale_reciprocal, or None.
        axis: the dim of x they run along.
        bits: 8, or 4.

    Returns:
        int8, x's shape; int4 values unpacked.
    """
    shape = [1] * x.dim()
    shape[axis] = -1
    value = x.to(torch.float32) * scale_reciprocal.to(torch.float32).reshape(shape)
    if offset is not None:
        value.add_(offset.to(torch.float32).reshape(shape))
    return _to_integer(value, bits)
