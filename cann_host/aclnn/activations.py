"""Quantization of activations."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cann_host.graph.ops.quant import QUANTIZE_LIMITS, quantize, quantize_dynamically
from cann_host.rules import (
    A950,
    INNER,
    INVALID,
    QUANT_MODES,
    AscendQuantCall,
    DynamicQuantCall,
    QuantizeCall,
    check_ascend_quant,
    check_dynamic_quant,
    check_quantize,
    dynamic_quant_scale_shape,
    soc_family,
)
from lq_graph import kernels

from .checks import compute_base_format_only, need, need_base_format
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS", "ROUND_MODES"]


def _need_quantized_shape(x: AclTensor, y: AclTensor) -> None:
    """y has x's shape; an int32 y holds eight int4 values of the last dim in each element."""
    if (*y.shape[:-1], kernels.logical_k(y.shape[-1], y.dtype)) != x.shape:
        raise RefusedError(f"y has shape {y.shape} and x {x.shape}")


# ---- DynamicQuant ----


class DynamicQuantV4Arguments(NamedTuple):
    x: AclTensor
    smooth_scales: AclTensor | None
    group_index: AclTensor | None
    dst_type: int  # CANN uses y's dtype; csrc/aclnn.cpp gives aclnnDynamicQuant, without one, 0
    is_symmetrical: int
    mode: int  # index in QUANT_MODES
    dst_type_max: float  # of HiFloat8 only; csrc/aclnn.cpp gives V3, which has none, 0.0
    y: AclTensor
    scale: AclTensor
    offset: AclTensor | None


class DynamicQuantV2Arguments(NamedTuple):
    x: AclTensor
    smooth_scales: AclTensor | None
    group_index: AclTensor | None
    dst_type: int
    y: AclTensor
    scale: AclTensor
    offset: AclTensor | None

    def as_v4(self) -> DynamicQuantV4Arguments:
        """V2 is per token, with an offset if there is a tensor for one."""
        inputs, outputs = self[:4], self[4:]
        return DynamicQuantV4Arguments(*inputs, int(self.offset is None), 0, 0.0, *outputs)


def _check_dynamic_quant(call: DynamicQuantV4Arguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/dynamic_quant/op_host/op_api, aclnnDynamicQuantV2 to V4."""
    x, y, offset = call.x, call.y, call.offset
    need(x=x, y=y, scale=call.scale)
    if call.is_symmetrical == (offset is not None):
        raise RefusedError(
            f"is_symmetrical is {bool(call.is_symmetrical)} and offset is "
            f"{'absent' if offset is None else 'given'}"
        )
    mode = QUANT_MODES[call.mode] if 0 <= call.mode < len(QUANT_MODES) else "another"
    refusal = check_dynamic_quant(
        DynamicQuantCall(
            soc,
            x.desc,
            y.dtype_name,
            describe(call.smooth_scales),
            describe(call.group_index),
            mode=mode,
            dst_type_max=call.dst_type_max,
            is_symmetric=bool(call.is_symmetrical),
        )
    )
    # the tiling comes after the checks of the other tensors
    by_tiling = refusal is not None and refusal.code not in (None, INVALID)
    if not by_tiling:
        raise_refusal(refusal)
    compute_base_format_only(
        x=x,
        smooth_scales=call.smooth_scales,
        group_index=call.group_index,
        y=y,
        scale=call.scale,
        offset=offset,
    )
    _need_quantized_shape(x, y)
    declared = dynamic_quant_scale_shape(x.shape, mode)
    for name, tensor in (("scale", call.scale), ("offset", offset)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != declared):
            raise RefusedError(f"{name} is {tensor.desc}; it must be float32 {declared}")
    raise_refusal(refusal)


def _check_dynamic_quant_of_950(call: DynamicQuantV4Arguments, soc: str) -> None:
    if soc_family(soc) != A950:
        raise RefusedError(f"it is for Ascend 950, and this is {soc}", INNER)
    _check_dynamic_quant(call, soc)


def _dynamic_quant(call: DynamicQuantV4Arguments, soc: str) -> None:
    if 0 in call.x.shape:
        return
    smooth, groups = (
        None if t is None else t.view() for t in (call.smooth_scales, call.group_index)
    )
    is_int4 = call.y.dtype == torch.int32
    values, scales, offsets = quantize_dynamically(
        soc,
        call.x.view(),
        smooth,
        groups,
        bits=4 if is_int4 else 8,
        symmetric=bool(call.is_symmetrical),
        mode=QUANT_MODES[call.mode],
    )
    call.y.write(kernels.pack_int4(values) if is_int4 else values)
    call.scale.write(scales)
    if call.offset is not None and offsets is not None:
        call.offset.write(offsets)


def _check_dynamic_quant_v2(call: DynamicQuantV2Arguments, soc: str) -> None:
    _check_dynamic_quant(call.as_v4(), soc)


def _dynamic_quant_v2(call: DynamicQuantV2Arguments, soc: str) -> None:
    _dynamic_quant(call.as_v4(), soc)


# ---- AscendQuant ----

ROUND_MODES = ("round", "floor", "ceil", "trunc")  # as csrc/aclnn.cpp numbers them


class AscendQuantArguments(NamedTuple):
    x: AclTensor
    scale: AclTensor
    offset: AclTensor | None
    sqrt_mode: int
    round_mode: int  # index in ROUND_MODES
    dst_type: int
    axis: int
    y: AclTensor


def _check_ascend_quant(call: AscendQuantArguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/ascend_quant_v2/op_host/op_api."""
    x, scale, offset, y = call.x, call.scale, call.offset, call.y
    need(x=x, scale=scale, y=y)
    compute_base_format_only(x=x, scale=scale, offset=offset, y=y)
    if call.dst_type != y.dtype_code:
        raise RefusedError(f"dst_type is {call.dst_type} and y has aclDataType {y.dtype_code}")
    given = AscendQuantCall(soc, x.desc, scale.desc, describe(offset), y.dtype_name, call.axis)
    raise_refusal(check_ascend_quant(given))
    _need_quantized_shape(x, y)
    if not 0 <= call.round_mode < len(ROUND_MODES):
        raise RefusedError(f"round_mode is none of {', '.join(ROUND_MODES)}")
    if call.sqrt_mode or ROUND_MODES[call.round_mode] != "round":
        raise RefusedError(
            "cann_host implements AscendQuant with round_mode round and no sqrt_mode", None
        )


def _ascend_quant(call: AscendQuantArguments, _soc: str) -> None:
    x, y = call.x, call.y
    # CANN casts both to x's dtype first
    scale = call.scale.view().to(x.dtype)
    offset = None if call.offset is None else call.offset.view().to(x.dtype)
    is_int4 = y.dtype == torch.int32
    bits = 4 if is_int4 else 8
    y.write(kernels.static_quant(x.view(), scale, offset, call.axis, bits=bits, packed=is_int4))


# ---- Quantize ----


class QuantizeArguments(NamedTuple):
    x: AclTensor
    scales: AclTensor
    zero_points: AclTensor | None
    dtype: int
    axis: int
    out: AclTensor


def _check_quantize(call: QuantizeArguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/quantize/op_api."""
    x, scales, zero_points, dtype, axis, out = call
    need(x=x, scales=scales, out=out)
    given = QuantizeCall(soc, x.desc, scales.desc, describe(zero_points), out.desc, axis)
    raise_refusal(check_quantize(given))
    if dtype != out.dtype_code:
        raise RefusedError(f"dtype is {dtype} and out has aclDataType {out.dtype_code}")
    need_base_format(x=x, scales=scales, zero_points=zero_points, out=out)
    if out.dtype not in QUANTIZE_LIMITS and 0 not in out.shape:
        raise RefusedError(f"cann_host does not compute {out.dtype_name}", None)


def _quantize(call: QuantizeArguments, _soc: str) -> None:
    x, scales, out = call.x, call.scales, call.out
    if 0 in x.shape or 0 in scales.shape:
        return  # CANN returns immediately
    points = None if call.zero_points is None else call.zero_points.view()
    out.write(quantize(x.view(), scales.view(), points, call.axis, out.dtype))


OPERATORS = (
    *(
        Operator(name, DynamicQuantV2Arguments, _check_dynamic_quant_v2, _dynamic_quant_v2, True)
        for name in ("aclnnDynamicQuant", "aclnnDynamicQuantV2")
    ),
    *(
        Operator(name, DynamicQuantV4Arguments, _check_dynamic_quant_of_950, _dynamic_quant)
        for name in ("aclnnDynamicQuantV3", "aclnnDynamicQuantV4")
    ),
    *(
        Operator(name, AscendQuantArguments, _check_ascend_quant, _ascend_quant, True)
        for name in ("aclnnAscendQuant", "aclnnAscendQuantV3")
    ),
    Operator("aclnnQuantize", QuantizeArguments, _check_quantize, _quantize),
)
