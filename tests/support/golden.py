"""The independent golden: LinearQuant in plain integer numpy, straight from the specification.

It shares no code with `lq_graph` or `cann_host`, on purpose. It is slow and simple, on purpose.
numpy has no bfloat16: such tensors are passed and returned as float32 with exact bfloat16 values.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def unpack_int4(packed: Array) -> Array:
    """int32 (..., k/8) -> int64 (..., k)."""
    words = packed.astype(np.int64)[..., None]
    nibbles = (words >> (4 * np.arange(8))) & 0xF
    signed = np.where(nibbles > 7, nibbles - 16, nibbles)
    return signed.reshape(*packed.shape[:-1], -1)


def pack_int4(values: Array) -> Array:
    """int (..., k) -> int32 (..., k/8)."""
    nibbles = (values.astype(np.int64) & 0xF).reshape(*values.shape[:-1], values.shape[-1] // 8, 8)
    words = (nibbles << (4 * np.arange(8))).sum(-1)
    return words.astype(np.uint32).view(np.int32)


def bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16, half to even; the value as float32."""
    raw = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits: Array = (raw + 0x7FFF + ((raw >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), np.float32(np.nan), bits.astype(np.uint32).view(np.float32))


def trans_quant_param(scale: Array, offset: Array | None = None, round_mode: int = 0) -> Array:
    bits = scale.astype(np.float32).view(np.uint32).astype(np.int64)
    if round_mode == 1:  # to 10 mantissa bits, half to even
        tail, kept = bits & 0x1FFF, bits >> 13
        rounded = (kept + ((tail > 0x1000) | ((tail == 0x1000) & (kept & 1 == 1)))) << 13
        exponent = (bits >> 23) & 0xFF
        bits = np.where(exponent == 255, bits, rounded)  # infinity and NaN are cut
        bits = np.where(exponent == 0, bits & 0x80000000, bits)
    word = (bits & 0xFFFFE000) + (1 << 46)
    if offset is not None:
        whole = np.where(np.isnan(offset), 0, np.rint(offset.astype(np.float64)))
        nine = np.clip(whole, -256, 255).astype(np.int64)
        word = word + ((nine & 0x1FF) << 37)
    return word


def linear_quant(
    x1: Array,
    weight: Array,
    scale: Array,
    offset: Array | None = None,
    pertoken_scale: Array | None = None,
    bias: Array | None = None,
    output_dtype: str = "int8",
    packed: bool = False,
    product: str = "A2",
) -> Array:
    """x1 (..., m, k), weight (..., n, k) int8, or int32 carrying int4; packed: scale is int64."""
    if x1.dtype == np.int32:
        x1, weight = unpack_int4(x1), unpack_int4(weight)
    acc = np.matmul(x1.astype(np.int64), np.swapaxes(weight.astype(np.int64), -1, -2))
    assert np.abs(acc).max(initial=0) < 2**31, "accumulator left int32"
    int_bias = bias is not None and np.issubdtype(bias.dtype, np.integer)
    if bias is not None and int_bias:
        acc = acc + bias.astype(np.int64)
    if output_dtype == "int32":
        return acc.astype(np.int32)
    f32 = np.float32
    value = acc.astype(np.int32).astype(f32)

    folded = output_dtype == "int8" or (output_dtype == "float16" and pertoken_scale is None)
    if folded or packed:
        word = scale.astype(np.int64) if packed else trans_quant_param(scale, offset)
        s = (word & 0xFFFFE000).astype(np.uint32).view(f32)
        if not np.isfinite(s).all():
            raise ValueError("the packed scale holds NaN or infinity")
        nine = (word >> 37) & 0x1FF
        nine = np.where(nine > 255, nine - 512, nine)
        with np.errstate(over="ignore"):
            value = value * s
        if output_dtype == "float16":
            return np.clip(value, f32(-65504), f32(65504)).astype(np.float16)
        if output_dtype == "bfloat16":  # Ascend 950 only
            return bfloat16(value)
        t = np.clip(np.rint(value), -256, 255).astype(np.int64)
        return np.clip(t + nine, -128, 127).astype(np.int8)

    on_the_way_out = pertoken_scale is None and (bias is None or int_bias)
    if product == "950" and scale.size == 1 and on_the_way_out:  # 19 bits of it are kept
        scale = (scale.astype(f32).view(np.uint32) & np.uint32(0xFFFFE000)).view(f32)
    value = value * scale.astype(f32)
    if pertoken_scale is not None:
        value = value * pertoken_scale.astype(f32)[:, None]
    if bias is not None and not int_bias:
        value = value + bias.astype(f32)
    if output_dtype == "float16":
        with np.errstate(over="ignore"):
            return value.astype(np.float16)
    assert output_dtype == "bfloat16", output_dtype
    return bfloat16(value)


def dynamic_quant(x: Array, top: int, arithmetic: str = "multiply") -> tuple[Array, Array]:
    """float (..., k) -> integers (..., k) and float32 scales (...); top is 127, or 7 for int4.

    The chips' ways: A2 and A3 "multiply", where the scale may be a "reciprocal"; 950 "divide"; 310P
    "half".
    """
    f32 = np.float32
    peak = np.abs(x.astype(f32)).max(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        factor, scale = f32(top) / peak, peak * (f32(1) / f32(top))
        if arithmetic == "half":
            factor = np.where(peak == 0, f32(0), factor).astype(np.float16)
            return away(x.astype(np.float16) * factor[..., None]), scale
        if arithmetic == "divide":
            steps = x.astype(f32) / scale[..., None]
        else:
            steps = x.astype(f32) * factor[..., None]
        if arithmetic == "reciprocal":
            scale = f32(1) / factor
    return to_even(steps, top), scale


def dynamic_quant_with_offset(
    x: Array, top: int, arithmetic: str = "multiply"
) -> tuple[Array, Array, Array]:
    """As dynamic_quant, asymmetric: integers, float32 scales, float32 offsets."""
    f32, span = np.float32, np.float32(2 * top + 1)
    value = x.astype(f32)
    high, low = value.max(-1), value.min(-1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if arithmetic == "half":
            spread = high - low
            factor = np.where(spread == 0, f32(0), span / spread)
            offset = -(high + low) * factor * f32(0.5)
            steps = x.astype(np.float16) * factor.astype(np.float16)[..., None]
            return away(steps + offset.astype(np.float16)[..., None]), spread / span, offset
        if arithmetic == "divide":
            scale = (high - low) * (f32(1) / span)
            steps, offset = value / scale[..., None], f32(top) - high / scale
        else:
            scale = np.maximum((high - low) / span, f32(1e-12))
            steps, offset = value * (f32(1) / scale)[..., None], f32(top) - high / scale
        return to_even(steps + offset[..., None], top), scale, offset


def to_even(steps: Array, top: int) -> Array:
    """Rounded half to even and clipped; no number is 0."""
    values = np.clip(np.rint(np.where(np.isnan(steps), 0, steps)), -top - 1, top)
    return values.astype(np.int64)


def away(steps: Array) -> Array:
    """float16 rounded half away from zero and clipped to int8; no number is 0."""
    assert steps.dtype == np.float16
    wide = np.where(np.isnan(steps), 0, steps).astype(np.float64)
    whole = np.where(wide < 0, np.ceil(wide - 0.5), np.floor(wide + 0.5))
    return np.clip(whole, -128, 127).astype(np.int64)


def static_quant(x: Array, scale_reciprocal: Array, offset: float) -> Array:
    f32 = np.float32
    value = x.astype(f32) * scale_reciprocal.astype(f32) + f32(offset)
    return np.clip(np.rint(value), -128, 127).astype(np.int8)
