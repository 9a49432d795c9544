"""Elementwise operators and reductions. For the dtypes that torchair emits, torch promotes as GE
does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cann_host.graph.executor import GraphError, Host, ints, is_meta, op, promoted, torch_dtype

UNDEFINED = 28  # GE's dtype of an attribute that was not given


@op("Add", "AddV2")
def _add(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 + x2


@op("Sub")
def _sub(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 - x2


@op("Mul")
def _mul(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 * x2


@op("Axpy")
def _axpy(x1: Tensor, x2: Tensor, *, alpha: float) -> Tensor:
    return (x1 + x2 * alpha).to(torch.promote_types(x1.dtype, x2.dtype))


@op("AxpyV2")
def _axpy_v2(x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    return (x1 + x2 * alpha).to(torch.promote_types(x1.dtype, x2.dtype))


@op("Sxpy")
def _sxpy(x1: Tensor, x2: Tensor, alpha: Tensor | None = None) -> Tensor:
    if alpha is None:
        return x1 - x2
    return (x1 - x2 * alpha).to(torch.promote_types(x1.dtype, x2.dtype))


@op("Muls")
def _muls(x: Tensor, *, value: float) -> Tensor:
    return (x * value).to(x.dtype)


@op("Adds")
def _adds(x: Tensor, *, value: float) -> Tensor:
    return (x + value).to(x.dtype)


@op("RealDiv")
def _real_div(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 / x2


@op("Div")
def _div(x1: Tensor, x2: Tensor) -> Tensor:
    """Integers stay integers."""
    if x1.is_floating_point() or x2.is_floating_point():
        return torch.div(x1, x2)
    left, right = promoted([x1, x2])
    # the smallest integer divided by -1 wraps; torch's division would end the process
    negates = right == -1
    quotient = torch.div(left, torch.where(negates, 1, right), rounding_mode="trunc")
    return torch.where(negates, -left, quotient)


@op("TruncateDiv")
def _truncate_div(x1: Tensor, x2: Tensor) -> Tensor:
    if x1.is_floating_point() or x2.is_floating_point():
        return torch.div(x1, x2, rounding_mode="trunc")
    return _div(x1, x2)


@op("FloorDiv")
def _floor_div(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.floor_divide(x1, x2)


@op("Pow")
def _pow(x1: Tensor, x2: Tensor) -> Tensor:
    if x2.dim() or is_meta(x1) or is_meta(x2):
        return torch.pow(x1, x2)
    # torch's kernel for one exponent, which rounds otherwise: the same numbers as in eager mode
    return torch.pow(x1, x2.item()).to(torch.result_type(x1, x2))


@op("Maximum")
def _maximum(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.maximum(*promoted([x1, x2]))


@op("Minimum")
def _minimum(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.minimum(*promoted([x1, x2]))


@op("ClipByValueV2", "ClipByValue")
def _clip(x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max).to(x.dtype)


@op("Mod")
def _mod(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.fmod(x1, x2)  # the sign of x1


@op("FloorMod")
def _floor_mod(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.remainder(x1, x2)  # the sign of x2


@op("Greater")
def _greater(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 > x2


@op("GreaterEqual")
def _greater_equal(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 >= x2


@op("Less")
def _less(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 < x2


@op("LessEqual")
def _less_equal(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 <= x2


@op("Equal")
def _equal(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 == x2


@op("NotEqual")
def _not_equal(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 != x2


@op("LogicalAnd")
def _logical_and(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 & x2


@op("LogicalOr")
def _logical_or(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 | x2


@op("LogicalNot")
def _logical_not(x: Tensor) -> Tensor:
    return torch.logical_not(x)


@op("BitwiseAnd")
def _bitwise_and(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 & x2


@op("BitwiseOr")
def _bitwise_or(x1: Tensor, x2: Tensor) -> Tensor:
    return x1 | x2


@op("Invert")
def _invert(x: Tensor) -> Tensor:
    return torch.bitwise_not(x)


@op("RightShift")
def _right_shift(x: Tensor, y: Tensor) -> Tensor:
    return torch.bitwise_right_shift(x, y)


def _wide(x: Tensor) -> Tensor:
    """Halves as float32, for a formula that is rounded once."""
    return x.float() if x.is_floating_point() else x


@op("Addcmul")
def _addcmul(input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    total = _wide(input_data) + _wide(value) * _wide(x1) * _wide(x2)
    return total.to(input_data.dtype)


@op("Addcdiv")
def _addcdiv(input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    total = _wide(input_data) + _wide(value) * (_wide(x1) / _wide(x2))
    return total.to(input_data.dtype)


@op("Lerp")
def _lerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    total = _wide(start) + _wide(weight) * (_wide(end) - _wide(start))
    return total.to(start.dtype)


@op("MaskedFill")
def _masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value.reshape(()).to(x.dtype), x)


@op("SelectV2")
def _select(condition: Tensor, then: Tensor, else_: Tensor) -> Tensor:
    return torch.where(condition, then, else_)


@op("Cast")
def _cast(x: Tensor, *, dst_type: int) -> Tensor:
    return cast(x, torch_dtype(dst_type))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype. An integer of NaN is 0: aclnnCast.md, Constraints."""
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
    if is_integer and x.is_floating_point():
        x = torch.nan_to_num(x, nan=0.0, posinf=math.inf, neginf=-math.inf)
    return x.to(dtype)


@op("Neg")
def _neg(x: Tensor) -> Tensor:
    return -x


@op("Abs")
def _abs(x: Tensor) -> Tensor:
    return x.abs()


@op("Sign")
def _sign(x: Tensor) -> Tensor:
    return x.sign()


@op("Floor")
def _floor(x: Tensor) -> Tensor:
    return x.floor()


@op("Ceil")
def _ceil(x: Tensor) -> Tensor:
    return x.ceil()


@op("Square")
def _square(x: Tensor) -> Tensor:
    return x.square()


@op("Sin")
def _sin(x: Tensor) -> Tensor:
    return x.sin()


@op("Cos")
def _cos(x: Tensor) -> Tensor:
    return x.cos()


@op("Erf")
def _erf(x: Tensor) -> Tensor:
    return x.erf()


@op("Sqrt")
def _sqrt(x: Tensor) -> Tensor:
    return x.sqrt()


@op("Reciprocal")
def _reciprocal(x: Tensor) -> Tensor:
    return x.reciprocal()


@op("Rsqrt")
def _rsqrt(x: Tensor) -> Tensor:
    return x.rsqrt()


@op("Round")
def _round(x: Tensor, *, decimals: int = 0) -> Tensor:
    return torch.round(x, decimals=decimals)


@op("Exp")
def _exp(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    value = x if (scale, shift) == (1.0, 0.0) else x * scale + shift
    return torch.exp(value) if base == -1.0 else torch.pow(base, value)


@op("Log")
def _log(x: Tensor, *, base: float = -1.0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    value = torch.log(x if (scale, shift) == (1.0, 0.0) else x * scale + shift)
    return value if base == -1.0 else value / math.log(base)


@op("Expm1")
def _expm1(x: Tensor) -> Tensor:
    return torch.expm1(x)


@op("Log1p")
def _log1p(x: Tensor) -> Tensor:
    return torch.log1p(x)


@op("Erfinv")
def _erfinv(input_x: Tensor) -> Tensor:
    return torch.erfinv(input_x)


@op("IsInf")
def _is_inf(x: Tensor) -> Tensor:
    return x.isinf()


@op("IsNan")
def _is_nan(x: Tensor) -> Tensor:
    return x.isnan()


@op("NanToNum")
def _nan_to_num(x: Tensor, *, nan: float, posinf: float, neginf: float) -> Tensor:
    return x.nan_to_num(nan, posinf, neginf)


@op("IsFinite")
def _is_finite(x: Tensor) -> Tensor:
    return x.isfinite()


def _dims(x: Tensor, axes: Host) -> list[int]:
    """Axes of a reduction. torch and GE differ on what an empty list means for some of them."""
    if not axes.numel() and x.dim():
        raise GraphError("a reduction over no axes is not implemented by cann_host")
    return ints(axes)


@op("ReduceSum")
def _reduce_sum(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return x.sum(_dims(x, axes), keep_dims, dtype=x.dtype)


@op("ReduceMean")
def _reduce_mean(
    x: Tensor, axes: Host, *, keep_dims: bool = False, noop_with_empty_axes: bool = True
) -> Tensor:
    return x.mean(_dims(x, axes), keep_dims)


@op("ReduceMeanWithCast")
def _reduce_mean_with_cast(
    x: Tensor,
    axes: Host,
    *,
    keep_dims: bool = False,
    noop_with_empty_axes: bool = True,
    dtype: int = UNDEFINED,
) -> Tensor:
    result = x.dtype if dtype == UNDEFINED else torch_dtype(dtype)
    return x.mean(_dims(x, axes), keep_dims, dtype=result)


@op("ReduceProdD")
def _reduce_prod(x: Tensor, *, axes: Sequence[int], keep_dims: bool = False) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep_dims, dtype=x.dtype)
    return x


@op("ReduceLogSumExp")
def _reduce_log_sum_exp(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return torch.logsumexp(_wide(x), _dims(x, axes), keep_dims).to(x.dtype)


@op("ReduceStdV2")
def _reduce_std(
    x: Tensor,
    *,
    dim: Sequence[int] = (),
    correction: int = 1,
    keepdim: bool = False,
    is_mean_out: bool = True,
) -> tuple[Tensor, Tensor]:
    """The second result, the mean, is computed in any case."""
    dims = tuple(dim) or tuple(range(x.dim()))
    std, mean = torch.std_mean(_wide(x), dims, correction=correction, keepdim=keepdim)
    return std.to(x.dtype), mean.to(x.dtype)


@op("LpNormV2")
def _lp_norm(
    x: Tensor,
    *,
    p: float = 2.0,
    axes: Sequence[int] = (),
    keepdim: bool = False,
    epsilon: float = 1e-12,
) -> Tensor:
    dims = tuple(axes) or None
    norm: Tensor = torch.linalg.vector_norm(_wide(x), p, dims, keepdim)
    return norm.clamp(min=epsilon).to(x.dtype)


@op("ReduceMax")
def _reduce_max(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return x.amax(_dims(x, axes), keep_dims)


@op("ReduceMin")
def _reduce_min(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return x.amin(_dims(x, axes), keep_dims)


@op("ReduceAny")
def _reduce_any(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return torch.any(x, _dims(x, axes), keep_dims)


@op("ReduceAll")
def _reduce_all(x: Tensor, axes: Host, *, keep_dims: bool = False) -> Tensor:
    return torch.all(x, _dims(x, axes), keep_dims)


@op("Cumsum")
def _cumsum(x: Tensor, axis: Host, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    if exclusive or reverse:
        raise GraphError("Cumsum, exclusive or reverse, is not implemented by cann_host")
    return x.cumsum(ints(axis)[0], dtype=x.dtype)
