"""RmsNorm, AddRmsNorm and LayerNormV4.

Source: hicann/ops-nn norm/rms_norm, norm/add_rms_norm and norm/layer_norm_v4, op_host: definition
and tiling, and op_api for an eager call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = ["RmsNormCall", "check_add_rms_norm_cast", "check_layer_norm", "check_rms_norm"]

# family: (dtype of x: dtypes of gamma) of RmsNorm, rms_norm_def.cpp. add_rms_norm_def.cpp has the
# same dtypes of x, and gamma has x's.
_SINCE_A2 = {
    "float16": ("float16", "float32"),
    "float32": ("float32",),
    "bfloat16": ("bfloat16", "float32"),
}
_RMS_NORM: dict[str, dict[str, tuple[str, ...]]] = {
    P310: {"float16": ("float16",), "float32": ("float32",)},
    A2: _SINCE_A2,
    A950: _SINCE_A2,
}


class RmsNormCall(NamedTuple):
    """A call of RmsNorm; with x2, of AddRmsNorm.

    Attributes:
        soc: name of the chip.
        x: input, or x1.
        gamma: its dims are the last ones of x.
        epsilon: not negative.
        x2: the tensor that AddRmsNorm adds.
        is_graph: whether it is the graph's operator: then no kernel is found for a dtype that its
            definition does not have, and an empty x is refused too.
    """

    soc: str
    x: TensorDesc
    gamma: TensorDesc
    epsilon: float
    x2: TensorDesc | None = None
    is_graph: bool = False


def check_rms_norm(call: RmsNormCall) -> Refusal | None:
    """Why an RmsNorm or AddRmsNorm is refused; None if it is accepted."""
    table = _RMS_NORM.get(soc_family(call.soc) or "")
    if table is None:
        return Refusal(f"cann_host has no rules for {call.soc}", None)
    refusal = _check_dtypes(call, table) or _check_x2(call)
    if refusal is not None:
        return refusal
    if call.x2 is not None and not call.is_graph:
        dims = len(call.x.shape), len(call.gamma.shape)
        if not all(1 <= count <= 8 for count in dims):
            return Refusal(
                f"x1 has {dims[0]} dims and gamma {dims[1]}; 1 to 8 are allowed", INVALID
            )
        if 0 in call.x.shape or 0 in call.gamma.shape:
            return None  # aclnn returns before it calls the kernel
    return _check_tiling(call)


def check_add_rms_norm_cast(call: RmsNormCall) -> Refusal | None:
    """Why an AddRmsNormCast is refused; None if it is accepted. It is AddRmsNorm of halves."""
    soc, x = call.soc, call.x.dtype
    if soc_family(soc) == P310:
        return Refusal(f"AddRmsNormCast has no kernel on {soc}", NO_KERNEL)
    if x == "float32":
        code = NO_KERNEL if call.is_graph else INVALID
        return Refusal(f"x is {x}; {soc} allows float16 or bfloat16", code)
    return check_rms_norm(call)


def _check_dtypes(call: RmsNormCall, table: dict[str, tuple[str, ...]]) -> Refusal | None:
    x, gamma = call.x.dtype, call.gamma.dtype
    code = NO_KERNEL if call.is_graph else INVALID
    if x not in table:
        return Refusal(f"x is {x}; {call.soc} allows {one_of(table)}", code)
    allowed = table[x] if call.x2 is None else (x,)
    if gamma not in allowed:
        return Refusal(f"gamma is {gamma} and x {x}; {call.soc} allows {one_of(allowed)}", code)
    return None


def _check_x2(call: RmsNormCall) -> Refusal | None:
    """AddRmsNorm's x2 has x1's dtype and shape."""
    x1, x2 = call.x, call.x2
    if x2 is None or (x1.dtype, x1.shape) == (x2.dtype, x2.shape):
        return None
    in_graph = NO_KERNEL if x1.dtype != x2.dtype else TILING
    return Refusal(f"x1 is {x1} and x2 {x2}", in_graph if call.is_graph else INVALID)


def _check_tiling(call: RmsNormCall) -> Refusal | None:
    shape, last = call.x.shape, call.gamma.shape
    if not 1 <= len(last) <= len(shape) <= 8:
        return Refusal(
            f"x has {len(shape)} dims and gamma {len(last)}; 1 to 8, gamma's within x's", TILING
        )
    if shape[len(shape) - len(last) :] != last:
        return Refusal(f"gamma has shape {last}; it must be the last dims of x, {shape}", TILING)
    if 0 in last or (call.is_graph and 0 in shape):
        return Refusal(f"x has shape {shape} and gamma {last}; they cannot be empty", TILING)
    if call.epsilon < 0:
        return Refusal(f"epsilon is {call.epsilon}; it cannot be negative", TILING)
    return None


def check_layer_norm(
    x: str, parameters: Sequence[str], dims: int, normalized: int
) -> Refusal | None:
    """Why a LayerNormV4 is refused; None if it is accepted.

    Args:
        x: dtype of x.
        parameters: dtypes of gamma and beta, if they are given.
        dims: number of dims of x.
        normalized: how many of the last dims are normalized.
    """
    if len(set(parameters)) > 1 or not set(parameters) <= {x, "float32"}:
        return Refusal(
            f"gamma and beta are {' and '.join(parameters)} and x {x}; they must be both {x} or "
            "both float32",
            NO_KERNEL,
        )
    if normalized > dims:
        return Refusal(f"x has {dims} dims and normalized_shape {normalized}", TILING)
    return None
