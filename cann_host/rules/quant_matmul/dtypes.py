"""Dtypes of a quantized matmul: finds the row of the support table for a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..products import A2, A950, P310
from ..refusal import NO_KERNEL, Refusal
from .call import QuantMatmulCall
from .kernels import KERNELS, Kernel

__all__ = ["check_dtypes"]

# more dtypes that Ascend 950 multiplies; torch has names for some of them
_OTHER_DTYPES = {"float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2", "hifloat8"}


def check_dtypes(call: QuantMatmulCall) -> Refusal | None:
    """Why no kernel takes these dtypes, or this x2 format; None if one does."""
    refusal = _check_x(call) or _check_blocks(call)
    if refusal is not None:
        return refusal
    kernel = _find_kernel(call)
    if isinstance(kernel, Refusal):
        return kernel
    return _check_pertoken_scale(call) or _check_offset(call, kernel)


def _check_x(call: QuantMatmulCall) -> Refusal | None:
    x1, x2 = call.x1.dtype, call.x2.dtype
    if call.family == A950 and _OTHER_DTYPES & {x1, x2}:
        return Refusal(f"x1 is {x1} and x2 {x2}; cann_host computes int8 and int4 only", None)
    if (x1, x2) == ("int8", "int4") and call.family == A2 and not call.is_graph:
        return Refusal("x1 is int8 and x2 int4 (A8W4), which cann_host does not compute", None)
    if x1 != x2:
        return call.refused(f"x1 is {x1} and x2 is {x2}; they must be the same")
    return None


def _check_blocks(call: QuantMatmulCall) -> Refusal | None:
    """Scales for blocks: IsPerblock of [check]. In a graph only 950 has them."""
    scale, pertoken = call.scale, call.pertoken_scale
    if pertoken is None or call.x1.dtype != "int8":
        return None
    has_blocks = call.family == A950 or (call.family == A2 and not call.is_graph)
    is_wide = len(scale.shape) > 1 and len(pertoken.shape) > 1
    if has_blocks and is_wide and (scale.dtype, pertoken.dtype) == ("float32", "float32"):
        return Refusal(
            f"scale has shape {scale.shape} and pertoken_scale {pertoken.shape}: scales for "
            "blocks, which cann_host does not compute",
            None,
        )
    return None


def _present(given: object) -> str:
    return "given" if given else "absent"


class _Column(NamedTuple):
    """One column of the support table, as a call is compared with it.

    Attributes:
        argument: its name in messages.
        given: the call's value, for messages.
        fits: whether a row allows the call's value.
        allowed: the values that a row allows.
        context: the values of earlier columns, for messages.
    """

    argument: str
    given: Callable[[QuantMatmulCall], str | None]
    fits: Callable[[QuantMatmulCall, Kernel], bool]
    allowed: Callable[[Kernel], tuple[str, ...]]
    context: str


_SETTLED = " with x1 {x}, output {out}, pertoken_scale {pertoken}"

# in the order in which CANN compares
_COLUMNS = (
    _Column("x1 dtype", lambda c: c.x1.dtype, lambda c, k: k.x == c.x1.dtype, lambda k: (k.x,), ""),
    _Column(
        "pertoken_scale",
        lambda c: _present(c.pertoken_scale),
        lambda c, k: k.pertoken == (c.pertoken_scale is not None),
        lambda k: (_present(k.pertoken),),
        " with x1 {x}",
    ),
    _Column(
        "output dtype",
        lambda c: c.out_dtype,
        lambda c, k: k.out == c.out_dtype,
        lambda k: (k.out,),
        " with x1 {x}, pertoken_scale {pertoken}",
    ),
    _Column(
        "scale dtype",
        lambda c: c.scale.dtype,
        lambda c, k: c.scale.dtype in k.scale,
        lambda k: k.scale,
        _SETTLED,
    ),
    _Column(
        "bias dtype",
        lambda c: c.bias and c.bias.dtype,
        lambda c, k: c.bias is None or c.bias.dtype in k.bias,
        lambda k: (*k.bias, "absent"),
        _SETTLED,
    ),
    _Column(
        "offset",
        lambda c: _present(c.offset),
        lambda c, k: c.offset is None or _takes_offset(c, k),
        lambda k: ("given or absent" if k.offset else "absent",),
        _SETTLED,
    ),
    _Column(
        "x2 format",
        lambda c: c.x2.format,
        lambda c, k: c.x2_format in k.x2_formats,
        lambda k: k.x2_formats,
        _SETTLED,
    ),
)


def _find_kernel(call: QuantMatmulCall) -> Kernel | Refusal:
    """The row of the support table for a call, or the refusal of the argument that has none."""
    rows = [kernel for kernel in KERNELS if kernel.family == call.family]
    for column in _COLUMNS:
        left = [kernel for kernel in rows if column.fits(call, kernel)]
        if not left:
            allowed = sorted({value for kernel in rows for value in column.allowed(kernel)})
            first = rows[0]
            context = column.context.format(
                x=first.x, out=first.out, pertoken=_present(first.pertoken)
            )
            return call.refused(
                f"{column.argument} {column.given(call)} is not supported here; "
                f"allowed{context}: {', '.join(allowed)}"
            )
        rows = left
    return rows[0]


def _takes_offset(call: QuantMatmulCall, kernel: Kernel) -> bool:
    """Whether a row allows an offset: with int8 results, and if CANN does not check it."""
    if kernel.offset:
        return True
    packed_int4 = kernel.x == "int4" and not kernel.pertoken
    if kernel.family == A950:
        return call.is_graph and packed_int4  # [arch35] CheckShapeInRangeForOptionalInputs
    if call.is_graph:
        return True  # [tiling]
    # [check] CheckL0c2outPertensorPerchannel, CheckOnlyL0c2outPertoken,
    # CheckDtypeValidOnOnlyL0c2outForA4W4; [nz] CheckDtypeValid wants an int8 result
    unread = kernel.out == "int32" or kernel.pertoken or packed_int4
    return kernel.family == A2 and not call.has_checks_of_v4 and unread


def _check_pertoken_scale(call: QuantMatmulCall) -> Refusal | None:
    pertoken = call.pertoken_scale
    if pertoken is None:
        return None
    if pertoken.dtype != "float32":
        return call.refused(f"pertoken_scale is {pertoken.dtype}; it must be float32")
    if call.is_graph and call.family == P310:
        return Refusal(
            "pertoken_scale in a graph for 310P: its kernel takes x1 in FRACTAL_NZ; whether GE "
            "makes it so is not public. cann_host has the eager call",
            None,
        )
    return None


def _check_offset(call: QuantMatmulCall, kernel: Kernel) -> Refusal | None:
    if call.offset is None or call.offset.dtype == "float32":
        return None
    # Before Ascend 950 the tiling never reads offset; [def] gives its dtype.
    by_definition = call.family != A950 and (call.is_graph or not kernel.offset)
    return call.refused(
        f"offset is {call.offset.dtype}; it must be float32", NO_KERNEL if by_definition else None
    )
