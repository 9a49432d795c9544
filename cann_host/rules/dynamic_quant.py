"""DynamicQuant, and DynamicQuantV2 in a graph or aclnnDynamicQuantV2 to V4.

Source: hicann/ops-nn quant/dynamic_quant and quant/dynamic_quant_v2, op_host: their tiling, and
op_api for an eager call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from .activation_dtypes import Dtypes, check_dtypes
from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal

__all__ = [
    "QUANT_MODES",
    "DynamicQuantCall",
    "check_dynamic_quant",
    "dynamic_quant_ignores",
    "dynamic_quant_scale_shape",
]

QUANT_MODES = ("pertoken", "pertensor", "perchannel")  # as csrc/aclnn.cpp numbers them
MAX_GROUPS = 1024  # [tiling] MAX_EXPERT_NUM
DST_TYPE_MAX = 32768  # of HiFloat8
MAX_OFFSET_K_310P = 4096  # DYNAMIC_QUANT_FP16_LAST_DIM_LIMITATION_310P

_DTYPES = {
    P310: Dtypes(x=("float16",), y=("int8",)),
    A2: Dtypes(x=("float16", "bfloat16"), y=("int8", "int4", "int32")),
    A950: Dtypes(x=("float16", "bfloat16"), y=("int8", "int4", "int32")),
}


class DynamicQuantCall(NamedTuple):
    """A call of DynamicQuant.

    Attributes:
        soc: name of the chip.
        x: input, (..., m, k).
        y_dtype: dtype of the quantized result; "int32" for packed int4.
        smooth_scales: (k,), a factor for each column; with group_index (groups, k), a row of
            factors for each group; for "perchannel" (m,).
        group_index: (groups,).
        mode: quant_mode.
        dst_type_max: attribute of that name.
        is_symmetric: whether there is no offset.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    x: TensorDesc
    y_dtype: str
    smooth_scales: TensorDesc | None = None
    group_index: TensorDesc | None = None
    mode: str = "pertoken"
    dst_type_max: float = 0.0
    is_symmetric: bool = True
    is_graph: bool = False

    @property
    def family(self) -> str | None:
        return soc_family(self.soc)

    @property
    def first_code(self) -> int:
        """CANN's code for the checks of aclnn that come before the tiling."""
        return TILING if self.is_graph else INVALID


def dynamic_quant_scale_shape(x_shape: Sequence[int], mode: str) -> tuple[int, ...]:
    """Shape of DynamicQuant's scale, and of its offset, for a quant_mode."""
    if mode == "pertensor":
        return (1,)
    return (*x_shape[:-2], x_shape[-1]) if mode == "perchannel" else tuple(x_shape[:-1])


def dynamic_quant_ignores(soc: str, smooth: bool, groups: bool) -> str | None:
    """Which input of an accepted DynamicQuant has no effect, if there is one.

    Args:
        soc: name of the chip.
        smooth: whether smooth_scales is given.
        groups: whether group_index is given.
    """
    if smooth and soc_family(soc) == P310:
        return f"smooth_scales has no effect on {soc}: the kernel there does not read it"
    if groups and not smooth:
        return "group_index has no effect without smooth_scales"
    return None


@lru_cache(maxsize=4096)  # a model makes the same few calls again and again
def check_dynamic_quant(call: DynamicQuantCall) -> Refusal | None:
    """Why a DynamicQuant is refused; None if it is accepted.

    The tiling refuses, with its own code, what aclnn does not check. smooth_scales have no effect
    on 310P; group_index has no effect on 310P or without smooth_scales: see
    `dynamic_quant_ignores`.
    """
    refusal = check_dtypes(
        _DTYPES, call.soc, call.x, call.y_dtype, call.first_code, is_graph=call.is_graph
    ) or _check_mode_and_dims(call)
    if refusal is not None:
        return refusal
    if 0 in call.x.shape and not call.is_graph:  # aclnn returns before it calls the kernel
        refusal = _check_smooth(call)
        return refusal if refusal is not None and refusal.code == INVALID else None
    return _check_tiling(call) or _check_smooth(call)


def _check_mode_and_dims(call: DynamicQuantCall) -> Refusal | None:
    code, dims = call.first_code, len(call.x.shape)
    if call.mode not in QUANT_MODES:
        modes = ", ".join(QUANT_MODES)
        return Refusal(f"quant_mode is {call.mode!r}; it must be one of {modes}", code)
    if call.mode == "perchannel" and call.group_index is not None:
        return Refusal("group_index is given and quant_mode is perchannel", code)
    # tiling has no upper limit, and on 310P one dim is enough
    least = 1 if call.is_graph and call.family == P310 else 2
    if dims < least or (dims > 8 and not call.is_graph):
        return Refusal(
            f"x has {dims} dims; it must have {'2 or more' if call.is_graph else '2 to 8'}", code
        )
    return None


def _check_tiling(call: DynamicQuantCall) -> Refusal | None:
    """The refusals of the tiling, also for an eager call."""
    soc, family, shape = call.soc, call.family, call.x.shape
    k = shape[-1]
    if family == P310 and k % 32:  # CorrectNumCopyRow of dynamic_quant_tiling_310P.cpp
        return Refusal(f"x has last dim {k}; {soc} takes a multiple of 32", TILING)
    if family == P310 and not call.is_symmetric and k > MAX_OFFSET_K_310P:
        return Refusal(
            f"an offset for rows of {k} on {soc}: its kernel for more than {MAX_OFFSET_K_310P} "
            "values never writes one. CANN takes it; cann_host does not",
            None,
        )
    if call.is_graph and k == 0 and family != A950:
        return Refusal(f"x has shape {shape}; its last dim cannot be 0", TILING)
    if family == A950 and not 0 <= call.dst_type_max <= DST_TYPE_MAX:
        return Refusal(
            f"dst_type_max is {call.dst_type_max}; it must be in 0 to {DST_TYPE_MAX}", TILING
        )
    declared = dynamic_quant_scale_shape(shape, call.mode)
    if call.is_graph and family == A2 and declared != shape[:-1]:
        return Refusal(
            f"quant_mode {call.mode} gives scale the shape {declared}; {soc} has pertoken only, "
            f"{shape[:-1]}",
            TILING,
        )
    return None


def _check_smooth(call: DynamicQuantCall) -> Refusal | None:
    """DynamicQuant's refusals for smooth_scales and group_index."""
    smooth, groups, first = call.smooth_scales, call.group_index, call.first_code
    if smooth is None or (call.family == P310 and call.is_graph):  # not checked by the tiling
        if groups is not None and groups.dtype != "int32":
            return Refusal(f"group_index is {groups.dtype}; it must be int32", NO_KERNEL)
        return None
    if smooth.dtype != call.x.dtype:
        return Refusal(f"smooth_scales is {smooth.dtype}; it must be {call.x.dtype}", first)
    if groups is not None and not (call.family == A2 and groups.shape == (0,)):
        return _check_groups(call, smooth, groups)
    if groups is not None and groups.dtype not in ("int32", "int64"):
        return Refusal(f"group_index is {groups.dtype}; it must be int32", first)
    columns = call.x.shape[-2 if call.mode == "perchannel" else -1]
    if smooth.shape != (columns,):
        return Refusal(
            f"smooth_scales has shape {smooth.shape}; it must be ({columns},)",
            first if groups is None else TILING,
        )
    return None


def _check_groups(call: DynamicQuantCall, smooth: TensorDesc, groups: TensorDesc) -> Refusal | None:
    """DynamicQuant's refusals for smooth_scales with a group_index."""
    count = groups.shape[-1] if groups.shape else 0
    is_vector = len(groups.shape) == 1 and groups.dtype in ("int32", "int64")
    # only aclnn counts its dims
    if not is_vector and not (call.is_graph and groups.dtype == "int32" and count):
        return Refusal(f"group_index is {groups}; it must be int32, one dim", call.first_code)
    if call.family == P310:
        return None
    if groups.dtype != "int32":
        return Refusal(f"group_index is {groups.dtype}; it must be int32", TILING)
    if not 1 <= count <= MAX_GROUPS:
        return Refusal(f"group_index has {count} values; it must have 1 to {MAX_GROUPS}", TILING)
    wanted = (count, call.x.shape[-1])
    if smooth.shape != wanted:
        return Refusal(
            f"smooth_scales has shape {smooth.shape}; with group_index it must be {wanted}", TILING
        )
    return None
