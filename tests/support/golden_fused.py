"""The independent golden of fused norms, SwiGLU and their quantization, in plain numpy.

Written from the formulas of hicann/ops-nn's documents, and the roundings of its golden generators
and kernels.

It shares no code with `cann_host`, on purpose. numpy has no bfloat16: such tensors are float32 with
exact bfloat16 values.
"""

from __future__ import annotations

import numpy as np

from support.golden import Array, bfloat16, to_even

F32 = np.float32


def rounded(x: Array, dtype: str) -> Array:
    """Rounded to a dtype, as float32."""
    if dtype == "bfloat16":
        return bfloat16(x)
    return x.astype(np.float16).astype(F32) if dtype == "float16" else x.astype(F32)


def norm_of_sum(
    x1: Array, x2: Array, gamma: Array, epsilon: float, dtype: str, rounds: str = ""
) -> tuple[Array, Array, Array]:
    """x / rms(x) * gamma for x = x1 + x2, rstd and x, in float32.

    Args:
        x1, x2, gamma: float32 with values of dtype.
        epsilon: added to the mean square.
        dtype: of the tensors.
        rounds: what is rounded to dtype: "t" the sum, "n" x / rms(x), "p" the product with gamma.
    """
    total = x1.astype(F32) + x2.astype(F32)
    value = rounded(total, dtype) if "t" in rounds else total
    axes = tuple(range(-gamma.ndim, 0))
    rstd = F32(1) / np.sqrt(np.mean(value * value, axes, keepdims=True, dtype=F32) + F32(epsilon))
    normal = value * rstd
    normal = rounded(normal, dtype) if "n" in rounds else normal
    y = normal * gamma.astype(F32)
    return (rounded(y, dtype) if "p" in rounds else y), rstd, rounded(total, dtype)


def quantize_rows(y: Array, top: int, way: str) -> tuple[Array, Array]:
    """Integers and float32 scales. The ways of the kernels:

    reciprocal   y * (top / peak), 1 / (top / peak): add_rms_norm_dynamic_quant of A2
    divide       y / scale, peak * (1 / top): of Ascend 950; dequant_swiglu_quant with groups
    step         y * (1 / scale), peak / top: dequant_swiglu_quant without groups
    factor       y * (top / peak), top / peak: swi_glu_quant
    """
    peak = np.abs(y).max(-1).astype(F32)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = F32(top) / peak
        if way == "divide":
            scale = peak * (F32(1) / F32(top))
            return to_even(y / scale[..., None], top), scale
        if way == "step":
            scale = peak / F32(top)
            return to_even(y * (F32(1) / scale)[..., None], top), scale
        integers = to_even(y * factor[..., None], top)
        return integers, F32(1) / factor if way == "reciprocal" else factor


def quantize(
    y: Array, scale: Array, points: Array | None, *, divides: bool = True, half: bool = False
) -> Array:
    """round(y / scale + points), or y * scale, to int8; half: rounded to float16 before."""
    value = y / scale.astype(F32) if divides else y * scale.astype(F32)
    if points is not None:
        value = value + points.astype(F32)
    return to_even(value.astype(np.float16).astype(F32) if half else value, 127).astype(np.int8)


def swiglu(
    value: Array,
    *,
    left: bool = True,
    mode: int = 0,
    limit: float = 7.0,
    alpha: float = 1.702,
    bias: float = 1.0,
) -> Array:
    """float32 of (..., 2h): swish(A) * B, in float64 inside."""
    value = value.astype(np.float64)
    half = value.shape[-1] // 2
    if mode == 1:
        a, b = value[..., ::2], value[..., 1::2]
    else:
        a, b = value[..., :half], value[..., half:]
        a, b = (a, b) if left else (b, a)
    if mode in (1, 2):
        a, b = np.minimum(a, limit), np.clip(b, -limit, limit)
        result = a / (1 + np.exp(-alpha * a)) * (b + bias)
    elif mode == 3:
        result = np.minimum(a / (1 + np.exp(-a)), limit) * np.clip(b, -limit, limit)
    else:
        result = a / (1 + np.exp(-a)) * b
    return np.asarray(result, F32)


def swiglu_grad(grad: Array, value: Array) -> Array:
    """float32 gradient of `swiglu` for (..., 2h), in float64 inside."""
    grad, value = grad.astype(np.float64), value.astype(np.float64)
    a, b = np.split(value, 2, -1)
    s = 1 / (1 + np.exp(-a))
    return np.concatenate([grad * (s + s * (1 - s) * a) * b, grad * s * a], -1, dtype=F32)


def dequantized(
    x: Array,
    weight_scale: Array,
    activation_scale: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """x * weight_scale * activation_scale; an int32 bias is added first, another last."""
    integer = bias is not None and np.issubdtype(bias.dtype, np.integer)
    value = ((x + bias) if integer else x).astype(F32) * weight_scale
    if activation_scale is not None:
        value = value * activation_scale[..., None]
    return value if bias is None or integer else value + bias.astype(F32)
