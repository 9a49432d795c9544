"""SwiGlu, its gradient, and SwiGLU that dequantizes and quantizes: DequantSwigluQuant, SwiGluQuant.

Source: hicann/ops-nn activation/swi_glu and swi_glu_grad, quant/dequant_swiglu_quant and
swi_glu_quant: op_host (definition, InferShape and tiling), and docs for the codes of an eager call.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from .definitions import DEFINED
from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, NULL_POINTER, TILING, Refusal, one_of

__all__ = [
    "SWIGLU_QUANT_MODES",
    "DequantSwigluQuantCall",
    "SwiGluCall",
    "SwiGluGradCall",
    "SwiGluQuantCall",
    "check_dequant_swiglu_quant",
    "check_group_list",
    "check_swi_glu",
    "check_swi_glu_grad",
    "check_swi_glu_quant",
    "dequant_swiglu_quant_ignores",
]

SWIGLU_QUANT_MODES = ("static", "dynamic")
MAX_GROUPS = 1024  # MAX_EXPERT_NUM
_UB_BYTES = 192 * 1024  # the vector unit's memory of A2 and A3
_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}


# ---- SwiGlu ----


class SwiGluCall(NamedTuple):
    """A call of SwiGlu.

    Attributes:
        soc: name of the chip.
        x: input.
        dim: which is halved.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    dim: int
    is_graph: bool = False


def check_swi_glu(call: SwiGluCall) -> Refusal | None:
    """Why a SwiGlu is refused; None if it is accepted."""
    soc, shape, dim = call.soc, call.x.shape, call.dim
    allowed = DEFINED["SwiGlu"].get(soc_family(soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no rules for {soc}", None)
    if call.x.dtype not in allowed:
        code = NO_KERNEL if call.is_graph else INVALID
        return Refusal(f"x is {call.x.dtype}; {soc} allows {one_of(allowed)}", code)
    if not -len(shape) <= dim < len(shape) or shape[dim] % 2:
        text = f"x has shape {shape} and dim is {dim}; SwiGlu halves that dim"
        if call.is_graph:
            return Refusal(f"{text} (CANN refuses it while it infers shapes)", None)
        return Refusal(text, INVALID)
    half = prod(shape[dim % len(shape) :]) // 2 * _WIDTHS[call.x.dtype]
    if soc_family(soc) == P310 and (half % 64 or 0 in shape):
        return Refusal(f"half of x has {half} bytes; {soc} takes multiples of 64", TILING)
    return None


class SwiGluGradCall(NamedTuple):
    """A call of SwiGluGrad.

    Attributes:
        y_grad: gradient of the result.
        forward: the SwiGlu that it is the gradient of.
    """

    y_grad: TensorDesc
    forward: SwiGluCall


def check_swi_glu_grad(call: SwiGluGradCall) -> Refusal | None:
    """Why a SwiGluGrad is refused; None if it is accepted. It has the dtypes of SwiGlu."""
    y_grad, (soc, x, dim, is_graph) = call
    if y_grad.dtype != x.dtype:
        code = NO_KERNEL if is_graph else INVALID
        return Refusal(f"y_grad is {y_grad.dtype} and x {x.dtype}", code)
    if refusal := check_swi_glu(call.forward):
        return refusal
    axis = dim % len(x.shape)
    if y_grad.shape != (*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :]):
        text = f"x has shape {x.shape}, dim is {dim}, and y_grad has shape {y_grad.shape}"
        if soc_family(soc) == A950:
            return Refusal(text, TILING)
        return Refusal(f"{text}. CANN does not check it; cann_host does", None)
    if 0 in x.shape:
        return Refusal(f"x has shape {x.shape}; cann_host computes no empty one", None)
    return None


# ---- DequantSwigluQuant ----

# dequant_swiglu_quant_def.cpp: dtype of x: dtypes of bias; the scales and offset are float32
_BIAS = {
    "int32": ("float32", "float16", "bfloat16", "int32"),
    "bfloat16": ("float32",),
    "float16": ("float32",),
}


class DequantSwigluQuantCall(NamedTuple):
    """A call of DequantSwigluQuant.

    Attributes:
        soc: name of the chip.
        x: (..., 2h).
        weight_scale, bias: (2h,), or (groups, 2h).
        activation_scale: one for each row of x.
        quant_scale, quant_offset: (h,) or one value; with groups (groups, h) or (groups,).
        group_index: (groups,), rows of each group; or (groups, 2), number and rows of each.
        quant_mode: "static" or "dynamic".
        dst_type: name of y's dtype.
        round_mode, activate_dim, swiglu_mode: attributes of those names.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    weight_scale: TensorDesc | None = None
    activation_scale: TensorDesc | None = None
    bias: TensorDesc | None = None
    quant_scale: TensorDesc | None = None
    quant_offset: TensorDesc | None = None
    group_index: TensorDesc | None = None
    quant_mode: str = "static"
    dst_type: str = "int8"
    round_mode: str = "rint"
    activate_dim: int = -1
    swiglu_mode: int = 0
    is_graph: bool = False

    @property
    def h(self) -> int:
        return self.x.shape[-1] // 2

    @property
    def rows(self) -> int:
        return prod(self.x.shape[:-1])

    @property
    def groups(self) -> int:
        return 1 if self.group_index is None else self.group_index.shape[0]


def check_dequant_swiglu_quant(call: DequantSwigluQuantCall) -> Refusal | None:
    """Why a DequantSwigluQuant is refused; None if it is accepted."""
    family = soc_family(call.soc)
    if family == P310:
        return Refusal(f"DequantSwigluQuant has no kernel on {call.soc}", NO_KERNEL)
    if family != A2:
        return Refusal(f"cann_host does not compute DequantSwigluQuant of {call.soc}", None)
    return (
        _check_dequant_dtypes(call)
        or _check_dequant_attributes(call)
        or (_check_without_groups(call) if call.group_index is None else _check_with_groups(call))
    )


def dequant_swiglu_quant_ignores(call: DequantSwigluQuantCall) -> str | None:
    """Which attribute of an accepted call has no effect, if there is one."""
    if call.group_index is None and call.swiglu_mode:
        return (
            f"swiglu_mode {call.swiglu_mode} of DequantSwigluQuant has no effect without "
            f"group_index on {call.soc}"
        )
    return None


def _check_dequant_dtypes(call: DequantSwigluQuantCall) -> Refusal | None:
    code = NO_KERNEL if call.is_graph else INVALID
    x = call.x.dtype
    if x not in _BIAS:
        return Refusal(f"x is {x}; {call.soc} allows {one_of(_BIAS)}", code)
    if call.bias is not None and call.bias.dtype not in _BIAS[x]:
        return Refusal(
            f"bias is {call.bias.dtype} and x {x}; {call.soc} allows {one_of(_BIAS[x])}", code
        )
    for name in ("weight_scale", "activation_scale", "quant_scale", "quant_offset"):
        tensor: TensorDesc | None = getattr(call, name)
        if tensor is not None and tensor.dtype != "float32":
            return Refusal(f"{name} is {tensor.dtype}; it must be float32", code)
    if call.group_index is not None and call.group_index.dtype != "int64":
        return Refusal(f"group_index is {call.group_index.dtype}; it must be int64", code)
    if call.dst_type != "int8":
        return Refusal(f"dst_type is {call.dst_type}; {call.soc} allows int8", NO_KERNEL)
    return None


def _check_dequant_attributes(call: DequantSwigluQuantCall) -> Refusal | None:
    shape = call.x.shape
    if not 2 <= len(shape) <= 8:
        return Refusal(f"x has {len(shape)} dims; it must have 2 to 8", TILING)
    if shape[-1] % 2:
        return Refusal(f"x has last dim {shape[-1]}; it must be even", TILING)
    if 0 in shape:
        return Refusal(f"x has shape {shape}; cann_host computes no empty one", None)
    mode = call.quant_mode if call.group_index is not None else call.quant_mode.lower()
    if mode not in SWIGLU_QUANT_MODES:
        return Refusal(f"quant_mode is {call.quant_mode!r}; it must be static or dynamic", TILING)
    if call.swiglu_mode not in (0, 1, 2, 3):
        return Refusal(f"swiglu_mode is {call.swiglu_mode}; it must be 0 to 3", TILING)
    if call.round_mode != "rint" or call.activate_dim not in (-1, len(shape) - 1):
        return Refusal(
            f"round_mode is {call.round_mode!r} and activate_dim {call.activate_dim}; cann_host "
            "implements rint and the last dim",
            None,
        )
    if call.x.dtype == "int32" and call.weight_scale is None:
        return Refusal(
            "weight_scale is null and x is int32", TILING if call.is_graph else NULL_POINTER
        )
    return None


def _check_count(name: str, tensor: TensorDesc | None, *allowed: int) -> Refusal | None:
    if tensor is None or prod(tensor.shape) in allowed:
        return None
    sizes = one_of(str(size) for size in allowed)
    return Refusal(f"{name} has shape {tensor.shape}; it must have {sizes} values", TILING)


def _check_without_groups(call: DequantSwigluQuantCall) -> Refusal | None:
    """dequant_swiglu_quant_tiling_base.cpp."""
    h, scale, offset = call.h, call.quant_scale, call.quant_offset
    if call.x.dtype == "int32":
        refusal = (
            _check_count("bias", call.bias, 2 * h)
            or _check_count("weight_scale", call.weight_scale, 2 * h)
            or _check_count("activation_scale", call.activation_scale, call.rows)
        )
        if refusal is not None:
            return refusal
    if scale is None:
        return None
    if refusal := _check_count("quant_scale", scale, h, 1):
        return refusal
    if call.quant_mode.lower() == "dynamic":
        return None
    if offset is None:
        return Refusal("quant_offset is null and quant_mode static", TILING)
    if refusal := _check_count("quant_offset", offset, h, 1):
        return refusal
    if prod(offset.shape) < prod(scale.shape):
        return Refusal(
            f"quant_offset has shape {offset.shape} and quant_scale {scale.shape}: the kernel "
            "reads past it. CANN takes it; cann_host does not",
            None,
        )
    return None


def _check_with_groups(call: DequantSwigluQuantCall) -> Refusal | None:
    """dequant_swiglu_quant_tiling.cpp."""
    groups, bias, x = call.group_index, call.bias, call.x.dtype
    assert groups is not None
    if x == "float16":
        return Refusal("x is float16 with group_index; int32 or bfloat16 are allowed", TILING)
    if 2 * call.h % 64:
        return Refusal(f"x has last dim {2 * call.h}; it must be a multiple of 64", TILING)
    pairs = len(groups.shape) == 2
    if len(groups.shape) not in (1, 2) or (pairs and groups.shape[1] != 2) or not groups.shape[0]:
        return Refusal(
            f"group_index has shape {groups.shape}; it must be (groups,) or (groups, 2)", TILING
        )
    if pairs and ((x == "int32" and bias is not None) or call.swiglu_mode or x == "bfloat16"):
        return Refusal(
            "group_index has two dims; it must have one with a bias, a swiglu_mode or bfloat16 x",
            TILING,
        )
    if x == "int32":
        refusal = (
            _check_rows("weight_scale", call.weight_scale, call.groups, 2 * call.h)
            or _check_count("activation_scale", call.activation_scale, call.rows)
            or _check_rows("bias", bias, call.groups, 2 * call.h)
        )
        if refusal is not None:
            return refusal
    return _check_quantization_of_groups(call) or _check_columns(call)


def _check_rows(name: str, tensor: TensorDesc | None, groups: int, size: int) -> Refusal | None:
    """CheckScaleShapeWithDim: a row for each group."""
    allowed = [(groups, size)] if groups > 1 else [(1, size), (size,)]
    if tensor is None or tensor.shape in allowed:
        return None
    return Refusal(
        f"{name} has shape {tensor.shape}; it must be {one_of(str(one) for one in allowed)}", TILING
    )


def _check_quantization_of_groups(call: DequantSwigluQuantCall) -> Refusal | None:
    scale, offset, groups, h = call.quant_scale, call.quant_offset, call.groups, call.h
    if call.quant_mode == "dynamic":
        if offset is not None:
            return Refusal("quant_offset is given and quant_mode is dynamic", TILING)
        return _check_rows("quant_scale", scale, groups, h)
    if scale is None or offset is None:
        name = "quant_scale" if scale is None else "quant_offset"
        return Refusal(f"{name} is null and quant_mode static", TILING)
    for name, tensor in (("quant_scale", scale), ("quant_offset", offset)):
        if tensor.shape not in ((groups,), (groups, h)):
            return Refusal(
                f"{name} has shape {tensor.shape}; it must be ({groups},) or ({groups}, {h})",
                TILING,
            )
    if scale.shape != offset.shape:
        return Refusal(
            f"quant_offset has shape {offset.shape} and quant_scale {scale.shape}; they must agree",
            TILING,
        )
    return None


def _check_columns(call: DequantSwigluQuantCall) -> Refusal | None:
    """CountMaxDim: a row and its buffers fit the vector unit's memory."""
    bias = 8 if call.x.dtype == "int32" and call.bias is not None else 0
    gather = 5 if call.swiglu_mode == 1 else 0
    static = 4 if call.quant_mode == "static" else 0
    most = (_UB_BYTES - 1024 - 32 - 2 * 32 - 4) // (5 * 4 + 2 * 2 * 4 + 1 + bias + gather + static)
    most = most // 32 * 32 * 2
    if 2 * call.h > most:
        return Refusal(f"x has last dim {2 * call.h}; it can have {most}", TILING)
    return None


# ---- SwiGluQuant ----

_SWI_GLU_QUANT_X = ("float32", "float16", "bfloat16")


class SwiGluQuantCall(NamedTuple):
    """A call of SwiGluQuant.

    Attributes:
        soc: name of the chip.
        x: (..., 2h).
        smooth_scales: (groups, h), or (groups,) for a static quantization; its kernels always read
            them.
        offsets: smooth_scales' shape, for a static quantization.
        group_index: (groups,).
        quant_mode: "static" or "dynamic".
        group_list_type: 0 if group_index has ends of groups, 1 if it has their rows.
        dst_type: name of y's dtype.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    smooth_scales: TensorDesc | None = None
    offsets: TensorDesc | None = None
    group_index: TensorDesc | None = None
    quant_mode: str = "dynamic"
    group_list_type: int = 0
    dst_type: str = "int8"
    is_graph: bool = False


def check_swi_glu_quant(call: SwiGluQuantCall) -> Refusal | None:
    """Why a SwiGluQuant is refused; None if it is accepted.

    Its tiling reports what it refuses and goes on; the launch then finds no kernel.
    """
    family = soc_family(call.soc)
    if family == P310:
        return Refusal(f"SwiGluQuant has no kernel on {call.soc}", NO_KERNEL)
    if family != A2:
        return Refusal(f"cann_host does not compute SwiGluQuant of {call.soc}", None)
    return (
        _check_swi_glu_quant_dtypes(call)
        or _check_swi_glu_quant_attributes(call)
        or _check_swi_glu_quant_shapes(call)
    )


def _check_swi_glu_quant_dtypes(call: SwiGluQuantCall) -> Refusal | None:
    code = NO_KERNEL if call.is_graph else INVALID
    if call.x.dtype not in _SWI_GLU_QUANT_X:
        return Refusal(f"x is {call.x.dtype}; {call.soc} allows {one_of(_SWI_GLU_QUANT_X)}", code)
    wanted = {"smooth_scales": "float32", "offsets": "float32", "group_index": "int32"}
    for name, dtype in wanted.items():
        tensor: TensorDesc | None = getattr(call, name)
        if tensor is not None and tensor.dtype != dtype:
            return Refusal(f"{name} is {tensor.dtype}; it must be {dtype}", code)
    return None


def _check_swi_glu_quant_attributes(call: SwiGluQuantCall) -> Refusal | None:
    if call.quant_mode == "dynamic_msd":
        return Refusal("cann_host does not implement quant_mode dynamic_msd", None)
    if call.quant_mode not in SWIGLU_QUANT_MODES:
        return Refusal(f"quant_mode is {call.quant_mode!r}; it must be static or dynamic", TILING)
    if call.group_list_type not in (0, 1):
        return Refusal(f"group_list_type is {call.group_list_type}; it must be 0 or 1", TILING)
    if call.dst_type not in ("int8", "int4"):
        return Refusal(f"dst_type is {call.dst_type}; it must be int8 or int4", TILING)
    return None


def _check_swi_glu_quant_shapes(call: SwiGluQuantCall) -> Refusal | None:
    shape, smooth, groups = call.x.shape, call.smooth_scales, call.group_index
    parts = 4 if call.dst_type == "int4" else 2
    if len(shape) < 2 or shape[-1] % parts or not shape[-1]:
        return Refusal(
            f"x has shape {shape}; it must have 2 dims, and the last a multiple of {parts}", TILING
        )
    if smooth is None:
        return Refusal(
            "smooth_scales is null: its kernels read them. CANN takes it; cann_host does not", None
        )
    count = 1
    if groups is not None:
        count = groups.shape[-1] if groups.shape else 0
        if not 1 <= count <= MAX_GROUPS:
            return Refusal(
                f"group_index has {count} values; it must have 1 to {MAX_GROUPS}", TILING
            )
        if len(groups.shape) != 1:
            return Refusal(f"group_index has shape {groups.shape}; cann_host takes one dim", None)
    static, h = call.quant_mode == "static", shape[-1] // 2
    if count > 1 and smooth.shape[:1] != (count,):
        return Refusal(
            f"smooth_scales has shape {smooth.shape}; its first dim must be {count}", TILING
        )
    allowed = [(count, h), (count,)] if static else [(count, h), *([(h,)] if count == 1 else [])]
    if smooth.shape not in allowed:
        return Refusal(
            f"smooth_scales has shape {smooth.shape}; cann_host takes "
            f"{one_of(str(one) for one in allowed)}, and CANN's kernel would read others wrongly",
            None,
        )
    if static and (call.offsets is None or call.offsets.shape != smooth.shape):
        given = None if call.offsets is None else call.offsets.shape
        return Refusal(
            f"offsets has shape {given}; cann_host takes smooth_scales', {smooth.shape}", None
        )
    return None


def check_group_list(counts: list[int], rows: int, what: str = "group_index") -> Refusal | None:
    """Why rows of groups are refused; None if they fit. CANN's kernels do not check them.

    Args:
        counts: rows of each group.
        rows: of x.
        what: the argument, for the message.
    """
    least, total = min(counts, default=0), sum(counts)
    if least < 0 or total > rows:
        found = f"a group of {least} rows" if least < 0 else f"{len(counts)} groups {total} rows"
        return Refusal(
            f"{what} gives {found}, and x has {rows} (CANN does not check this; its kernel would "
            "leave the tensors)",
            None,
        )
    return None
