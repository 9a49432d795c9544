"""Norms that quantize: AddRmsNormDynamicQuant, AddRmsNormQuant and RmsNormQuant.

Source: hicann/ops-nn norm/add_rms_norm_dynamic_quant, norm/add_rms_norm_quant,
norm/add_rms_norm_quant_v2 and norm/rms_norm_quant: op_host (definition and tiling), and op_api for
an eager call.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "AddRmsNormDynamicQuantCall",
    "AddRmsNormQuantCall",
    "RmsNormQuantCall",
    "check_add_rms_norm_dynamic_quant",
    "check_add_rms_norm_quant",
    "check_rms_norm_quant",
]

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "hifloat8")  # Ascend 950 quantizes to these too
MAX_DIMS = 8
LEAST_GAMMA_310P = 32  # SIZE_MIN_LIMIT_310P


def _no_rules(soc: str) -> Refusal:
    return Refusal(f"cann_host has no rules for {soc}", None)


def _not_computed(soc: str, y: str) -> Refusal | None:
    """A result that Ascend 950 has, and cann_host does not."""
    if y in _FLOAT8 and soc_family(soc) == A950:
        return Refusal(f"y is {y}, which cann_host does not compute", None)
    return None


def _check_sum(x1: TensorDesc, x2: TensorDesc, code: int | None) -> Refusal | None:
    if x1.shape != x2.shape:
        note = "" if code else " (CANN does not compare them; cann_host does)"
        return Refusal(f"x1 is {x1} and x2 {x2}{note}", code)
    return None


# ---- AddRmsNormDynamicQuant ----

# x1, x2, gamma, smooth scales and beta: one of these, the same for all. No kernel on 310P.
_DYNAMIC_X: dict[str, tuple[str, ...]] = {
    A2: ("float16", "bfloat16"),
    A950: ("float16", "bfloat16"),
}
_DYNAMIC_Y = ("int8", "int4", "int32")  # int32 holds eight int4 values, in an eager call only


class AddRmsNormDynamicQuantCall(NamedTuple):
    """A call of AddRmsNormDynamicQuant.

    Attributes:
        soc: name of the chip.
        x1, x2: added.
        gamma: (k,).
        y_dtype: of the quantized results; "int32" for packed int4.
        smooth_scale1, smooth_scale2, beta: (k,), or None.
        epsilon: positive.
        output_mask: which of the two results are wanted; empty if it is not given.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x1: TensorDesc
    x2: TensorDesc
    gamma: TensorDesc
    y_dtype: str = "int8"
    smooth_scale1: TensorDesc | None = None
    smooth_scale2: TensorDesc | None = None
    beta: TensorDesc | None = None
    epsilon: float = 1e-6
    output_mask: tuple[bool, ...] = ()
    is_graph: bool = False

    @property
    def wanted(self) -> tuple[bool, bool]:
        """Which of the two results are written."""
        if len(self.output_mask) == 2:
            return self.output_mask[0], self.output_mask[1]
        return True, self.smooth_scale1 is not None and self.smooth_scale2 is not None

    @property
    def optional(self) -> dict[str, TensorDesc]:
        """The optional tensors that are given. The tiling ignores an empty one."""
        given = {
            "smooth_scale1": self.smooth_scale1,
            "smooth_scale2": self.smooth_scale2,
            "beta": self.beta,
        }
        return {name: t for name, t in given.items() if t is not None and 0 not in t.shape}


def check_add_rms_norm_dynamic_quant(call: AddRmsNormDynamicQuantCall) -> Refusal | None:
    """Why an AddRmsNormDynamicQuant is refused; None if it is accepted."""
    family = soc_family(call.soc)
    if family is None:
        return _no_rules(call.soc)
    refusal = _check_mask(call)
    if refusal is not None:
        return refusal
    if not call.is_graph and (0 in call.x1.shape or 0 in call.x2.shape or 0 in call.gamma.shape):
        return None  # aclnn returns before it calls the kernel
    return _check_dynamic_dtypes(call, family) or _check_dynamic_shapes(call, family)


def _check_mask(call: AddRmsNormDynamicQuantCall) -> Refusal | None:
    """CheckFlag of aclnn_add_rms_norm_dynamic_quant_v2.cpp; a graph checks it while it infers
    shapes, and on Ascend 950 in the tiling."""
    mask, smooth = call.output_mask, (call.smooth_scale1, call.smooth_scale2)
    code = TILING if call.is_graph else INVALID
    if mask and len(mask) != 2:
        return Refusal(f"output_mask has {len(mask)} values; it must have 2", code)
    if not mask:
        if smooth[0] is None and smooth[1] is not None:
            return Refusal("smooth_scale2 is given without smooth_scale1 and output_mask", code)
        return None
    if call.is_graph and soc_family(call.soc) != A950:
        return None if any(mask) else Refusal("output_mask is [False, False]", None)
    for index in (0, 1):
        if smooth[index] is not None and not mask[index]:
            return Refusal(f"smooth_scale{index + 1} is given and output_mask is {[*mask]}", code)
    return None if any(mask) else Refusal("output_mask is [False, False]; one must be True", code)


def _check_dynamic_dtypes(call: AddRmsNormDynamicQuantCall, family: str) -> Refusal | None:
    allowed = _DYNAMIC_X.get(family, ())
    if not allowed:
        return Refusal(f"AddRmsNormDynamicQuant has no kernel on {call.soc}", NO_KERNEL)
    if call.x1.dtype not in allowed:
        return Refusal(f"x1 is {call.x1.dtype}; {call.soc} allows {one_of(allowed)}", NO_KERNEL)
    for name, tensor in {"x2": call.x2, "gamma": call.gamma, **call.optional}.items():
        if tensor.dtype != call.x1.dtype:
            return Refusal(f"{name} is {tensor.dtype}; it must be {call.x1.dtype}", NO_KERNEL)
    outputs = [y for y in _DYNAMIC_Y if not (call.is_graph and y == "int32")]
    if refusal := _not_computed(call.soc, call.y_dtype):
        return refusal
    if call.y_dtype not in outputs:
        return Refusal(f"y is {call.y_dtype}; {call.soc} allows {one_of(outputs)}", NO_KERNEL)
    return None


def _check_dynamic_shapes(call: AddRmsNormDynamicQuantCall, family: str) -> Refusal | None:
    x1, gamma = call.x1.shape, call.gamma.shape
    if family == A950 and not 2 <= len(x1) <= MAX_DIMS:
        return Refusal(f"x1 has {len(x1)} dims; it must have 2 to {MAX_DIMS}", TILING)
    if not x1 or len(x1) != len(call.x2.shape):
        return Refusal(f"x1 has {len(x1)} dims and x2 {len(call.x2.shape)}", TILING)
    if len(gamma) != 1 or gamma[0] != x1[-1]:
        return Refusal(f"gamma has shape {gamma}; it must be ({x1[-1]},)", TILING)
    if refusal := _check_sum(call.x1, call.x2, TILING if family == A950 else None):
        return refusal
    for name, tensor in call.optional.items():
        if tensor.shape != gamma:
            checked = family == A950 or name != "beta"
            note = "" if checked else " (CANN does not compare them; cann_host does)"
            return Refusal(
                f"{name} has shape {tensor.shape}; it must be {gamma}{note}",
                TILING if checked else None,
            )
    parts = {"int4": 2, "int32": 8}.get(call.y_dtype, 1)
    if x1[-1] % parts:
        code = INVALID if call.y_dtype == "int32" else TILING
        return Refusal(f"x1 has last dim {x1[-1]}; it must be a multiple of {parts}", code)
    if call.epsilon <= 0 and family == A2:
        return Refusal(f"epsilon is {call.epsilon}; it must be positive", TILING)
    if 0 in x1:
        return Refusal(f"x1 has shape {x1}; cann_host computes no empty one in a graph", None)
    return None


# ---- AddRmsNormQuant ----


class _QuantDtypes(NamedTuple):
    x: tuple[str, ...]  # of x1, x2, gamma and beta, the same for all
    scales: str  # "" for x's dtype
    zero_points: str


_INTEGER_POINTS = _QuantDtypes(("float16", "bfloat16"), "float32", "int32")
# add_rms_norm_quant_def.cpp
_QUANT: dict[str, tuple[_QuantDtypes, ...]] = {
    P310: (_QuantDtypes(("float16",), "float32", "int32"),),
    A2: (_INTEGER_POINTS, _QuantDtypes(("bfloat16",), "", "")),
    A950: (
        _INTEGER_POINTS,
        _QuantDtypes(("float32", "float16", "bfloat16"), "float32", "float32"),
        _QuantDtypes(("float16", "bfloat16"), "", ""),
    ),
}


class AddRmsNormQuantCall(NamedTuple):
    """A call of AddRmsNormQuant.

    Attributes:
        soc: name of the chip.
        x1, x2: added.
        gamma: its dims are the last ones of x1.
        scales1: gamma's shape; or (1,), with zero_points1 of (1,), beta and nothing of the second
            result, which aclnnAddRmsNormQuantV2 gives to another kernel.
        scales2, zero_points1, zero_points2: scales1's shape, or None.
        beta: gamma's shape, or None.
        y_dtype: of the quantized results.
        div_mode: whether y is divided by the scales, or multiplied.
        entry: "graph", or the aclnn function: "v1", "v2".
    """

    soc: str
    x1: TensorDesc
    x2: TensorDesc
    gamma: TensorDesc
    scales1: TensorDesc
    scales2: TensorDesc | None = None
    zero_points1: TensorDesc | None = None
    zero_points2: TensorDesc | None = None
    beta: TensorDesc | None = None
    y_dtype: str = "int8"
    div_mode: bool = True
    entry: str = "graph"

    @property
    def optional(self) -> dict[str, TensorDesc]:
        given = {
            "scales2": self.scales2,
            "zero_points1": self.zero_points1,
            "zero_points2": self.zero_points2,
            "beta": self.beta,
        }
        return {name: t for name, t in given.items() if t is not None}

    @property
    def is_per_tensor(self) -> bool:
        """Whether aclnnAddRmsNormQuantV2 calls its kernel for one scale (CheckSupportV2)."""
        one, gamma = ((1,),), self.gamma.shape
        points = self.zero_points1
        return (
            self.entry == "v2"
            and soc_family(self.soc) != A950
            and self.scales2 is None
            and self.zero_points2 is None
            and self.div_mode
            and self.scales1.shape in one
            and points is not None
            and points.shape in one
            and self.beta is not None
            and gamma in (self.x1.shape[-1:], (1, *self.x1.shape[-1:]))
        )

    @property
    def code(self) -> int:
        """CANN's code of a wrong shape."""
        in_tiling = self.entry == "graph" or soc_family(self.soc) == A950
        return TILING if in_tiling else INVALID


def check_add_rms_norm_quant(call: AddRmsNormQuantCall) -> Refusal | None:
    """Why an AddRmsNormQuant is refused; None if it is accepted."""
    rows = _QUANT.get(soc_family(call.soc) or "")
    if rows is None:
        return _no_rules(call.soc)
    if call.entry != "graph" and (0 in call.x1.shape or 0 in call.gamma.shape):
        return None  # aclnn returns before it calls the kernel
    return (
        _check_quant_dtypes(call, rows)
        or _check_quant_shapes(call)
        or _not_computed(call.soc, call.y_dtype)
    )


def _check_quant_dtypes(
    call: AddRmsNormQuantCall, rows: tuple[_QuantDtypes, ...]
) -> Refusal | None:
    x, is_graph = call.x1.dtype, call.entry == "graph"
    allowed = list(dict.fromkeys(dtype for row in rows for dtype in row.x))
    code = NO_KERNEL if is_graph else INVALID
    if x not in allowed:
        return Refusal(f"x1 is {x}; {call.soc} allows {one_of(allowed)}", code)
    same = {"x2": call.x2, "gamma": call.gamma}
    if call.beta is not None:
        same["beta"] = call.beta
    for name, tensor in same.items():
        if tensor.dtype != x:
            return Refusal(f"{name} is {tensor.dtype}; it must be {x}", NO_KERNEL)
    scales, points = call.scales1.dtype, call.zero_points1 or call.zero_points2
    if call.entry == "v2" and soc_family(call.soc) != A950:  # SpecialTransform casts these first
        scales = "float32" if scales == "float16" else scales
        if points is not None and points.dtype == "int8":
            points = points._replace(dtype="int32")
    rows = tuple(row for row in rows if x in row.x)
    pairs = [(row.scales or x, row.zero_points or x) for row in rows]
    if scales not in {pair[0] for pair in pairs}:
        names = one_of(dict.fromkeys(pair[0] for pair in pairs))
        return Refusal(
            f"scales1 is {call.scales1.dtype} and x1 {x}; {call.soc} allows {names}", code
        )
    if call.scales2 is not None and call.scales2.dtype != scales:
        return Refusal(f"scales2 is {call.scales2.dtype}; it must be {scales}", NO_KERNEL)
    if points is not None and (scales, points.dtype) not in pairs:
        names = one_of(pair[1] for pair in pairs if pair[0] == scales)
        return Refusal(
            f"zero_points is {points.dtype} and scales1 {scales}; {call.soc} allows {names}",
            code if points.dtype not in {pair[1] for pair in pairs} else NO_KERNEL,
        )
    if (
        call.zero_points1
        and call.zero_points2
        and (call.zero_points1.dtype != call.zero_points2.dtype)
    ):
        return Refusal(
            f"zero_points1 is {call.zero_points1.dtype} and zero_points2 "
            f"{call.zero_points2.dtype}; they must agree",
            NO_KERNEL,
        )
    outputs = ("int8", *(_FLOAT8 if soc_family(call.soc) == A950 else ()))
    if call.y_dtype not in outputs:
        return Refusal(f"y is {call.y_dtype}; {call.soc} allows {one_of(outputs)}", code)
    return None


def _check_quant_shapes(call: AddRmsNormQuantCall) -> Refusal | None:
    x1, gamma, soc = call.x1.shape, call.gamma.shape, call.soc
    family = soc_family(soc)
    # in a graph the older chips' tiling compares nothing, and the kernel would read past a tensor
    code = None if call.entry == "graph" and family != A950 else call.code
    if not (1 <= len(x1) <= MAX_DIMS and 1 <= len(gamma) <= MAX_DIMS):
        return Refusal(f"x1 has {len(x1)} dims and gamma {len(gamma)}; 1 to {MAX_DIMS}", code)
    if refusal := _check_sum(call.x1, call.x2, code):
        return refusal
    if call.is_per_tensor:
        return None
    if len(gamma) > len(x1) or x1[len(x1) - len(gamma) :] != gamma:
        return Refusal(f"gamma has shape {gamma}; it must be the last dims of x1, {x1}", code)
    if family == P310 and prod(gamma) < LEAST_GAMMA_310P:
        return Refusal(
            f"gamma has {prod(gamma)} values; {soc} takes {LEAST_GAMMA_310P} or more", code
        )
    for name, tensor in {"scales1": call.scales1, **call.optional}.items():
        if tensor.shape != gamma:
            return Refusal(f"{name} has shape {tensor.shape}; it must be gamma's, {gamma}", code)
    if family == A950 and call.zero_points2 is not None and call.scales2 is None:
        # then there is a second result, and in a graph InferShape gives it one element
        text = "zero_points2 is given without scales2"
        return (
            Refusal(text, TILING)
            if call.entry == "graph"
            else Refusal(f"{text}, which cann_host does not compute on {soc}", None)
        )
    if 0 in x1:
        return Refusal(f"x1 has shape {x1}; cann_host computes no empty one in a graph", None)
    return None


# ---- RmsNormQuant ----


class _RmsNormQuantDtypes(NamedTuple):
    x: tuple[str, ...]  # of gamma, beta and scale too
    y: tuple[str, ...]


# rms_norm_quant_def.cpp; offset is int8
_RMS_NORM_QUANT: dict[str, _RmsNormQuantDtypes] = {
    P310: _RmsNormQuantDtypes(("float16",), ("int8",)),
    A2: _RmsNormQuantDtypes(("float16", "bfloat16"), ("int8", "int4", "int32")),
}


class RmsNormQuantCall(NamedTuple):
    """A call of RmsNormQuant.

    Attributes:
        soc: name of the chip.
        x: input, (..., k).
        gamma, beta: (k,) or (1, k).
        scale, offset: one value is read.
        y_dtype: of the quantized result; "int32" for packed int4.
        epsilon: positive.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    gamma: TensorDesc
    beta: TensorDesc
    scale: TensorDesc
    offset: TensorDesc
    y_dtype: str
    epsilon: float
    is_graph: bool = False


def check_rms_norm_quant(call: RmsNormQuantCall) -> Refusal | None:
    """Why an RmsNormQuant is refused; None if it is accepted."""
    allowed = _RMS_NORM_QUANT.get(soc_family(call.soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no RmsNormQuant for {call.soc}", None)
    return _check_rms_norm_quant_dtypes(call, allowed) or _check_rms_norm_quant_shapes(call)


def _check_rms_norm_quant_dtypes(
    call: RmsNormQuantCall, allowed: _RmsNormQuantDtypes
) -> Refusal | None:
    code, x = NO_KERNEL if call.is_graph else INVALID, call.x.dtype
    outputs = [y for y in allowed.y if not (call.is_graph and y == "int32")]
    if x not in allowed.x:
        return Refusal(f"x is {x}; {call.soc} allows {one_of(allowed.x)}", code)
    for name in ("gamma", "beta", "scale"):
        tensor: TensorDesc = getattr(call, name)
        if tensor.dtype != x:
            return Refusal(f"{name} is {tensor.dtype}; it must be {x}", code)
    if call.offset.dtype != "int8":
        return Refusal(f"offset is {call.offset.dtype}; it must be int8", code)
    if call.y_dtype not in outputs:
        return Refusal(f"y is {call.y_dtype}; {call.soc} allows {one_of(outputs)}", code)
    return None


def _check_rms_norm_quant_shapes(call: RmsNormQuantCall) -> Refusal | None:
    x, gamma, beta = call.x.shape, call.gamma.shape, call.beta.shape
    code = TILING if call.is_graph else INVALID
    if not 1 <= len(x) <= MAX_DIMS:
        return Refusal(f"x has {len(x)} dims; it must have 1 to {MAX_DIMS}", code)
    if gamma not in ((x[-1],), (1, x[-1])):
        return Refusal(f"gamma has shape {gamma}; it must be ({x[-1]},) or (1, {x[-1]})", code)
    if beta != gamma:
        return Refusal(f"beta has shape {beta}; it must be gamma's, {gamma}", code)
    if call.offset.shape != call.scale.shape:
        return Refusal(
            f"offset has shape {call.offset.shape} and scale {call.scale.shape}; they must agree",
            code,
        )
    if 0 in call.scale.shape:
        return Refusal(f"scale has shape {call.scale.shape}; the kernel reads one value", None)
    if 0 in x:
        return Refusal(f"x has shape {x}; it cannot be empty", TILING)
    if call.y_dtype != "int8" and x[-1] % 8:
        return Refusal(f"x has last dim {x[-1]}; for int4 it must be a multiple of 8", TILING)
    if call.epsilon <= 0:
        return Refusal(f"epsilon is {call.epsilon}; it must be positive", TILING)
    return None
