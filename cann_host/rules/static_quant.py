"""Static quantization: AscendQuantV2 and aclnnAscendQuantV3, which multiply; Quantize and
aclnnQuantize, which divide.

Source: hicann/ops-nn quant/ascend_quant_v2/op_host, its tiling, and op_api for an eager call;
quant/quantize/op_api/aclnn_quantize.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

from .activation_dtypes import Dtypes, check_dtypes
from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "AscendQuantCall",
    "QuantizeCall",
    "ascend_quant_axis",
    "check_ascend_quant",
    "check_quantize",
    "flat_scales",
]

# ---- AscendQuant ----

_ASCEND_QUANT = {
    P310: Dtypes(x=("float16", "float32"), y=("int8",)),
    A2: Dtypes(x=("float16", "bfloat16", "float32"), y=("int8", "int4", "int32")),
    A950: Dtypes(x=("float16", "bfloat16", "float32"), y=("int8", "int4", "int32")),
}


class AscendQuantCall(NamedTuple):
    """A call of AscendQuant.

    Attributes:
        soc: name of the chip.
        x: input.
        scale: one value, or one for each index of the dim `axis`.
        offset: like scale, or None.
        y_dtype: dtype of the quantized result.
        axis: the dim of x that scale is along.
        is_graph: whether it is the graph's operator, whose definition has one dtype for all.
    """

    soc: str
    x: TensorDesc
    scale: TensorDesc
    offset: TensorDesc | None
    y_dtype: str
    axis: int = -1
    is_graph: bool = False

    @property
    def code(self) -> int:
        return TILING if self.is_graph else INVALID

    def without_scalars(self) -> AscendQuantCall:
        """The call as the tiling reads it: a scalar is a vector of one value (EnsureNotScalar)."""
        x, scale = _vector(self.x), _vector(self.scale)
        return self._replace(x=x, scale=scale, offset=self.offset and _vector(self.offset))


def _vector(tensor: TensorDesc) -> TensorDesc:
    return tensor._replace(shape=tensor.shape or (1,))


def ascend_quant_axis(soc: str, axis: int) -> int:
    """The axis AscendQuantV2's tiling uses in a graph: on 310P always the last."""
    return -1 if soc_family(soc) == P310 else axis


def check_ascend_quant(call: AscendQuantCall) -> Refusal | None:
    """Why an AscendQuant is refused; None if it is accepted."""
    if call.is_graph:
        call = call.without_scalars()
    refusal = (
        check_dtypes(
            _ASCEND_QUANT, call.soc, call.x, call.y_dtype, call.code, is_graph=call.is_graph
        )
        or _check_scale_and_offset_dtypes(call)
        or _check_axis_and_scale_shape(call)
    )
    if refusal is not None:
        return refusal
    if call.is_graph and soc_family(call.soc) == A950 and 0 in call.x.shape:
        return Refusal(f"x has shape {call.x.shape}; it cannot be empty", call.code)
    return None


def _check_scale_and_offset_dtypes(call: AscendQuantCall) -> Refusal | None:
    x, scale, offset = call.x, call.scale, call.offset
    floats = _ASCEND_QUANT[soc_family(call.soc) or ""].x
    if scale.dtype not in floats:
        return Refusal(f"scale is {scale.dtype}; {call.soc} allows {one_of(floats)}", call.code)
    if offset is not None and (offset.dtype, offset.shape) != (scale.dtype, scale.shape):
        return Refusal(f"offset is {offset} and scale {scale}; they must agree", call.code)
    if scale.dtype != x.dtype and (call.is_graph or x.dtype != "float32"):
        return Refusal(
            f"scale is {scale.dtype} and x {x.dtype}; they must be of one dtype", call.code
        )
    return None


def _check_axis_and_scale_shape(call: AscendQuantCall) -> Refusal | None:
    shape, scale = call.x.shape, call.scale.shape
    dims = len(shape)
    if not dims or (dims > 8 and not call.is_graph):
        return Refusal(f"x has {dims} dims; it must have 1 to 8", call.code)
    axis = ascend_quant_axis(call.soc, call.axis) if call.is_graph else call.axis
    is_last = axis in (-1, dims - 1)
    is_last_but_one = axis in (-2, dims - 2) and -dims <= axis < dims
    if not is_last and not (is_last_but_one and soc_family(call.soc) != P310):
        return Refusal(
            f"axis is {axis}; it must be one of the last two dims, on 310P the last", call.code
        )
    size = shape[axis]
    broadcast = [1] * dims
    broadcast[axis] = size
    is_vector = len(scale) == 1 and scale[0] in (1, size)
    if not is_vector and list(scale) not in (broadcast, [1] * dims):
        return Refusal(f"scale has shape {scale}; it must have 1 or {size} values", call.code)
    return None


# ---- Quantize ----


class _QuantizeDtypes(NamedTuple):
    x: tuple[str, ...]  # of scales too
    zero_points: tuple[str, ...]
    out: tuple[str, ...]


# aclnn_quantize.cpp, GetSocSupportDtypeMap; torch has no HiFloat8
_HALVES = ("float32", "float16")
_WHOLE = ("int8", "uint8", "int32")
_QUANTIZE = {
    P310: _QuantizeDtypes(x=_HALVES, zero_points=_WHOLE, out=_WHOLE),
    A2: _QuantizeDtypes(x=(*_HALVES, "bfloat16"), zero_points=(*_WHOLE, "bfloat16"), out=_WHOLE),
    A950: _QuantizeDtypes(
        x=(*_HALVES, "bfloat16"),
        zero_points=(*_WHOLE, "float32", "bfloat16"),
        out=(*_WHOLE, "float8_e4m3fn", "float8_e5m2"),
    ),
}


class QuantizeCall(NamedTuple):
    """A call of Quantize.

    Attributes:
        soc: name of the chip.
        x: input.
        scales: (1,), or one for each index of the dim `axis`.
        zero_points: like scales, or None.
        out: result.
        axis: the dim of x that scales is along, if it has more than one value.
        is_graph: whether it is the graph's operator, whose scales have a dim for each of x, of one
            value but for the axis (quantize_tiling_arch35.cpp); see `flat_scales`.
    """

    soc: str
    x: TensorDesc
    scales: TensorDesc
    zero_points: TensorDesc | None
    out: TensorDesc
    axis: int
    is_graph: bool = False


def flat_scales(x: TensorDesc, scales: TensorDesc, axis: int) -> TensorDesc | None:
    """The scales of a graph's Quantize as a vector; None if they have another shape."""
    shape, dims = scales.shape, len(x.shape)
    others = [size for i, size in enumerate(shape) if i != axis % dims] if dims else []
    if len(shape) == 1:
        return scales
    if len(shape) != dims or any(size != 1 for size in others):
        return None
    return scales._replace(shape=(shape[axis],))


def check_quantize(call: QuantizeCall) -> Refusal | None:
    """Why a Quantize is refused; None if it is accepted."""
    if call.is_graph:
        return _check_quantize_in_graph(call)
    allowed = _QUANTIZE.get(soc_family(call.soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no rules for {call.soc}", None)
    return _check_quantize_shapes(call) or _check_quantize_dtypes(call, allowed)


def _check_quantize_in_graph(call: QuantizeCall) -> Refusal | None:
    """As an eager call: a dtype finds no kernel, and the tiling refuses a shape. quantize_def.cpp
    has no float16 scales."""
    scales, points = call.scales, call.zero_points
    if scales.dtype == "float16":
        return Refusal(f"scales is {scales.dtype}; float32 or bfloat16 are allowed", NO_KERNEL)
    dims = len(call.x.shape)
    if not -dims <= call.axis < dims:
        return Refusal(f"axis is {call.axis} and x has {dims} dims", TILING)
    flat = [None if t is None else flat_scales(call.x, t, call.axis) for t in (scales, points)]
    if flat[0] is None or (points is not None and flat[1] is None):
        return Refusal(
            f"scales has shape {scales.shape}; it must have x's dims, of one value but for axis "
            f"{call.axis}",
            TILING,
        )
    eager = call._replace(scales=flat[0], zero_points=flat[1], is_graph=False)
    allowed = _QUANTIZE.get(soc_family(call.soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no rules for {call.soc}", None)
    if refusal := _check_quantize_dtypes(eager, allowed):
        return Refusal(refusal.reason, NO_KERNEL)
    if refusal := _check_quantize_shapes(eager):
        return Refusal(refusal.reason, TILING)
    return None


def _check_quantize_shapes(call: QuantizeCall) -> Refusal | None:
    shape, scales, points, out = call.x.shape, call.scales.shape, call.zero_points, call.out.shape
    dims = len(shape)
    if dims > 8:
        return Refusal(f"x has {dims} dims; it must have 8 or fewer", INVALID)
    if out != shape:
        return Refusal(f"out has shape {out}; it must have x's, {shape}", INVALID)
    if len(scales) != 1:
        return Refusal(f"scales has shape {scales}; it must have one dim", INVALID)
    if points is not None and points.shape != scales:
        return Refusal(f"zero_points has shape {points.shape}; it must be {scales}", INVALID)
    if scales == (1,):
        return None
    if not -dims <= call.axis < dims:
        return Refusal(f"axis is {call.axis} and x has {dims} dims", INVALID)
    if scales != (shape[call.axis],):
        return Refusal(
            f"scales has shape {scales}; it must have 1 or {shape[call.axis]} values", INVALID
        )
    return None


def _check_quantize_dtypes(call: QuantizeCall, allowed: _QuantizeDtypes) -> Refusal | None:
    x, scales, points = call.x.dtype, call.scales.dtype, call.zero_points
    columns = [
        ("x", x, allowed.x),
        ("scales", scales, allowed.x),
        ("out", call.out.dtype, allowed.out),
    ]
    if points is not None:
        columns.append(("zero_points", points.dtype, allowed.zero_points))
    for name, dtype, dtypes in columns:
        if dtype not in dtypes:
            return Refusal(f"{name} is {dtype}; {call.soc} allows {one_of(dtypes)}", INVALID)
    others = [scales, *([] if points is None else [points.dtype])]
    if "bfloat16" in others and {x, *others} != {"bfloat16"}:
        return Refusal(
            f"x is {x}, scales and zero_points {' and '.join(others)}; if one of these is bfloat16 "
            "all must be",
            INVALID,
        )
    return None
