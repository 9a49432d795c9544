"""Quantized matmuls, quantized activations, and int4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cann_host import chips
from cann_host.graph import executor
from cann_host.graph.executor import (
    DTYPES,
    INT4,
    INT8,
    FractalNZ,
    GraphError,
    Int4,
    describe,
    dtype_name,
    op,
    optional_desc,
    torch_dtype,
)
from cann_host.rules import (
    ND,
    NZ,
    AscendQuantCall,
    DynamicQuantCall,
    QuantizeCall,
    QuantMatmulCall,
    TransQuantParamCall,
    ascend_quant_axis,
    check_ascend_quant,
    check_dynamic_quant,
    check_quant_matmul,
    check_quantize,
    check_trans_quant_param,
    dynamic_quant_ignores,
    dynamic_quant_scale_shape,
    packed_words,
    soc_family,
    trans_quant_param_shape,
)
from lq_graph.kernels import (
    INT4_PER_INT32,
    Arithmetic,
    NzWeight,
    dynamic_quant,
    dynamic_quant_with_offset,
    library,
    logical_k,
    pack_scale,
    quant_matmul,
    static_quant,
)


@op("TransQuantParamV2")
def _trans_quant_param(scale: Tensor, offset: Tensor | None = None, *, round_mode: int = 0) -> Any:
    soc = executor.soc_name()
    call = TransQuantParamCall(
        soc, describe(scale), optional_desc(offset), round_mode, is_graph=True
    )
    if refusal := check_trans_quant_param(call):
        raise GraphError(refusal)
    shapes = (scale.shape, None if offset is None else offset.shape)
    return pack_parameters(scale, offset, round_mode, trans_quant_param_shape(soc, *shapes))


def pack_parameters(
    scale: Tensor, offset: Tensor | None, round_mode: int, room: Sequence[int]
) -> Tensor:
    """The words that TransQuantParamV2 writes into a result of the shape `room`, as int64.

    Raises:
        GraphError: the kernel would read outside scale or offset, or overruns are refused.
    """
    found = packed_words(scale.shape, None if offset is None else offset.shape, room)
    if found.refusal:
        raise GraphError(found.refusal)
    if found.overrun:
        executor.overrun(found.overrun)
    places = math.prod(room)
    first = scale.reshape(-1)[:places]
    added = None if offset is None or not offset.numel() else offset.reshape(-1)[:places]
    return pack_scale(first, added, round_mode).reshape(tuple(room))


@op("QuantBatchMatmulV3", accepts_internal_formats=True)
def _quant_batch_matmul(
    x1: Any,
    x2: Any,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    dtype: int = 2,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = 0,
) -> Tensor:
    if group_size:
        raise GraphError(f"group_size {group_size} is not implemented by cann_host")
    out_dtype = torch_dtype(dtype)
    x1_format, x1 = (NZ, x1.nd) if isinstance(x1, FractalNZ) else (ND, x1)
    x2_format, storage, nz = ND, None, None
    if isinstance(x2, FractalNZ):
        x2_format, storage, nz, x2 = NZ, x2.storage_shape, x2, x2.like
    call = QuantMatmulCall(
        soc=executor.soc_name(),
        x1=describe(x1)._replace(format=x1_format, is_transposed=transpose_x1),
        x2=describe(x2)._replace(
            format=x2_format, is_transposed=transpose_x2, storage_shape=storage
        ),
        scale=describe(scale),
        out_dtype=str(out_dtype).removeprefix("torch."),
        offset=optional_desc(offset),
        bias=optional_desc(bias),
        pertoken_scale=optional_desc(pertoken_scale),
        entry="graph",
    )
    if refusal := check_quant_matmul(call):
        raise GraphError(refusal)
    if executor.is_meta(x1):
        batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
        m, n = x1.shape[-1 if transpose_x1 else -2], x2.shape[-2 if transpose_x2 else -1]
        return torch.empty((*batch, m, n), dtype=out_dtype, device="meta")
    left: Tensor
    right: Tensor | NzWeight
    # as the compiled kernel reads a weight: (n, k), also if it comes through a Transpose. Without
    # that kernel, `nd` is a copy that is kept.
    stored = nz.weight if nz is not None and len(x2.shape) == 2 and library.loaded() else None
    if nz is not None and stored is not None and transpose_x2 != nz.swapped and not transpose_x1:
        left, right = x1.packed if isinstance(x1, Int4) else x1, stored
    else:
        x2 = x2 if nz is None else nz.nd
        if isinstance(x1, Int4) and isinstance(x2, Int4):
            straight = transpose_x2 != x2.swapped and not transpose_x1
            if straight and x2.is_packed and x2.held.dim() == 2:
                x1, x2, transpose_x2 = x1.packed, x2.held, True
            else:
                x1, x2 = x1.values, x2.values
        left = x1.mT if transpose_x1 else x1
        right = x2 if transpose_x2 else x2.mT  # (..., n, k)
    scale = chips.scale_as_read(executor.soc_name(), scale, pertoken_scale, bias, out_dtype)
    return quant_matmul(
        left,
        right,
        scale.reshape(-1),
        bias=bias,
        pertoken_scale=pertoken_scale,
        output_dtype=out_dtype,
    )


@op("QuantBatchMatmulV4", accepts_internal_formats=True)
def _quant_batch_matmul_v4(
    x1: Any,
    x2: Any,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    x1_offset: Tensor | None = None,
    x2_offset: Tensor | None = None,
    y_offset: Tensor | None = None,
    x2_table: Tensor | None = None,
    *,
    dtype: int,
    compute_type: int = -1,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = -1,
) -> Tensor:
    """On Ascend 950 a fusion pass turns the int8 and int4 cases into V3
    (quant_batch_matmul_v4_to_v3_fusion_pass.cpp). cann_host does not have the kernels of V4 itself.
    """
    if isinstance(x2, Int4) and not isinstance(x1, Int4) and dtype_name(x1) == "int8":
        raise GraphError("x1 is int8 and x2 int4 (A8W4), which cann_host does not compute")
    if soc_family(executor.soc_name()) != "Ascend 950":
        raise GraphError(
            "QuantBatchMatmulV4 has no kernel for these inputs (CANN error 561003, kernel not "
            f"found; {executor.soc_name()})"
        )
    others = {
        "y_scale": y_scale,
        "x1_offset": x1_offset,
        "y_offset": y_offset,
        "x2_table": x2_table,
    }
    for name, tensor in others.items():
        if tensor is not None:
            raise GraphError(f"QuantBatchMatmulV4's {name} is not implemented by cann_host")
    if x2_scale is None:
        raise GraphError("QuantBatchMatmulV4 needs x2_scale (CANN error 561002, tiling)")
    return _quant_batch_matmul(
        x1,
        x2,
        x2_scale,
        x2_offset,
        bias,
        x1_scale,
        dtype=dtype,
        transpose_x1=transpose_x1,
        transpose_x2=transpose_x2,
        group_size=max(group_size, 0),
    )


def quantized_name(dst_type: int) -> str:
    """The dtype that dst_type means, as the rules spell it."""
    names = {INT8: "int8", INT4: "int4", 34: "hifloat8", 35: "float8_e5m2", 36: "float8_e4m3fn"}
    return names.get(dst_type, f"GE dtype {dst_type}")


@op("AscendQuantV2")
def _ascend_quant(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    sqrt_mode: bool = False,
    round_mode: str = "round",
    dst_type: int = 2,
    axis: int = -1,
) -> Tensor | Int4:
    soc = executor.soc_name()
    call = AscendQuantCall(
        soc,
        describe(x),
        describe(scale),
        optional_desc(offset),
        quantized_name(dst_type),
        axis,
        is_graph=True,
    )
    if refusal := check_ascend_quant(call):
        raise GraphError(refusal)
    if round_mode != "round" or sqrt_mode:
        raise GraphError(
            f"round_mode {round_mode}, sqrt_mode {sqrt_mode}: cann_host implements round and False"
        )
    along = ascend_quant_axis(soc, axis)
    if along != axis and axis not in (-1, x.dim() - 1):
        executor.caution(
            f"AscendQuantV2 with axis {axis} on {soc}: its tiling takes the last axis, whatever "
            "the attribute says"
        )
    first, factor, addend = (
        None if t is None else t.reshape(t.shape or (1,)) for t in (x, scale, offset)
    )
    assert first is not None and factor is not None
    values = static_quant(first, factor, addend, along, bits=4 if dst_type == INT4 else 8)
    return Int4(values) if dst_type == INT4 else values.reshape(x.shape)


# dtype of Quantize's result: the least and largest value
QUANTIZE_LIMITS = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int32: (-(2**31), 2**31 - 1),
}
_QUANTIZED = {"torch.qint8": torch.int8, "torch.quint8": torch.uint8, "torch.qint32": torch.int32}


def quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, dtype: torch.dtype
) -> Tensor:
    """What Quantize computes: x / scales + zero_points in float32, rounded half to even.

    Args:
        x: (..., k).
        scales, zero_points: one value, valid for any axis, or one for each index of the axis.
        axis: of x.
        dtype: of the result.
    """
    along = [1] * x.dim()
    if scales.numel() != 1:
        along[axis] = -1
    value = x.to(torch.float32) / scales.to(torch.float32).reshape(along)
    if zero_points is not None:
        value += zero_points.to(torch.float32).reshape(along)
    low, high = QUANTIZE_LIMITS[dtype]
    # a NaN has no integer; quant/quantize/tests/assets/golden.py gives 0
    return value.to(torch.float64).nan_to_num_(0.0).round_().clamp_(low, high).to(dtype)


@op("Quantize")
def _quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor | None = None, *, dtype: str, axis: int = 1
) -> Tensor:
    if dtype not in _QUANTIZED:
        raise GraphError(f"dtype {dtype} is not implemented by cann_host")
    out = _QUANTIZED[dtype]
    call = QuantizeCall(
        executor.soc_name(),
        describe(x),
        describe(scales),
        optional_desc(zero_points),
        describe(x)._replace(dtype=str(out).removeprefix("torch.")),
        axis,
        is_graph=True,
    )
    if refusal := check_quantize(call):
        raise GraphError(refusal)
    return quantize(x, scales, zero_points, axis, out)


def smoothed(x: Tensor, factors: Tensor, group_index: Tensor | None = None) -> Tensor:
    """x times the factors of its columns, in float32.

    Args:
        x: (..., k).
        factors: (k,), or with group_index (groups, k).
        group_index: for each group of x's rows, the row after its last row; never decreasing.
    """
    value, factors = x.to(torch.float32), factors.to(torch.float32)
    if group_index is None or executor.is_meta(x):
        return value * (factors if group_index is None else factors[0])
    ends, count = group_index.tolist(), value.numel() // x.shape[-1]
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] != count:
        raise GraphError(
            f"group_index ends with {ends[-1]} and must rise to {count}, the number of rows "
            "(CANN does not check this; it would leave rows out)"
        )
    rows = torch.diff(group_index, prepend=group_index.new_zeros(1))
    return value * factors.repeat_interleave(rows, 0).view(x.shape)


def quantize_dynamically(
    soc: str,
    x: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    *,
    bits: int,
    symmetric: bool = True,
    mode: str = "pertoken",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a chip's kernels of DynamicQuant and DynamicQuantV2 compute.

    Args:
        soc: name of the chip.
        x: (..., m, k); `check_dynamic_quant` accepted it and the other arguments.
        smooth_scales, group_index: as in `DynamicQuantCall`.
        bits: 8, or 4.
        symmetric: without an offset.
        mode: one scale for each row, for all of x, or for each of its columns.

    Returns:
        int8 of x's shape; float32 scale; offset of scale's shape, None if symmetric.
    """
    smooth, grouped = smooth_scales is not None, group_index is not None
    if ignored := dynamic_quant_ignores(soc, smooth, grouped):
        executor.caution(ignored)
    arithmetic = chips.dynamic_arithmetic(
        soc, x.shape[-1], smooth=smooth, groups=smooth and grouped
    )
    half = arithmetic is Arithmetic.HALF
    if smooth_scales is not None and not half:  # the kernels with HALF never read them
        if mode == "perchannel":
            x = x.to(torch.float32) * smooth_scales.to(torch.float32).unsqueeze(-1)
        else:
            has_groups = group_index is not None and group_index.numel() > 0
            x = smoothed(x, smooth_scales, group_index if has_groups else None)
    if not x.numel():
        scale = torch.zeros(dynamic_quant_scale_shape(x.shape, mode), device=x.device)
        return x.to(torch.int8), scale, None if symmetric else scale.clone()
    rows = x.mT if mode == "perchannel" else x.reshape(1, -1) if mode == "pertensor" else x
    offset: Tensor | None = None
    if symmetric:
        values, scale = dynamic_quant(rows, bits, arithmetic)
    else:
        values, scale, offset = dynamic_quant_with_offset(rows, bits, arithmetic)
    values = values.mT.contiguous() if mode == "perchannel" else values.reshape(x.shape)
    return values, scale, offset


def _check_dynamic(
    x: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int,
    mode: str = "pertoken",
    dst_type_max: float = 0.0,
    symmetric: bool = True,
) -> None:
    call = DynamicQuantCall(
        executor.soc_name(),
        describe(x),
        quantized_name(dst_type),
        optional_desc(smooth_scales),
        optional_desc(group_index),
        mode,
        dst_type_max,
        symmetric,
        is_graph=True,
    )
    if refusal := check_dynamic_quant(call):
        raise GraphError(refusal)


@op("DynamicQuant")
def _dynamic_quant(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    dst_type: int = 2,
) -> tuple[Tensor | Int4, Tensor]:
    _check_dynamic(x, smooth_scales, group_index, dst_type)
    values, scale, _ = quantize_dynamically(
        executor.soc_name(), x, smooth_scales, group_index, bits=4 if dst_type == INT4 else 8
    )
    return Int4(values) if dst_type == INT4 else values, scale


@op("DynamicQuantV2")
def _dynamic_quant_v2(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    dst_type: int = 2,
    is_symmetrical: bool = False,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,  # of HiFloat8 only
) -> tuple[Tensor | Int4, Tensor, Tensor]:
    """Only Ascend 950 reads is_symmetrical; elsewhere the kernel always writes an offset."""
    soc = executor.soc_name()
    reads = soc_family(soc) == "Ascend 950"
    symmetric = is_symmetrical and reads
    _check_dynamic(x, smooth_scales, group_index, dst_type, quant_mode, dst_type_max, symmetric)
    if is_symmetrical and not reads:
        executor.caution(
            f"DynamicQuantV2 with is_symmetrical=True on {soc}: its kernel quantizes with an "
            "offset all the same"
        )
    values, scale, offset = quantize_dynamically(
        soc,
        x,
        smooth_scales,
        group_index,
        bits=4 if dst_type == INT4 else 8,
        symmetric=symmetric,
        mode=quant_mode if reads else "pertoken",
    )
    offset = torch.zeros_like(scale) if offset is None else offset  # no kernel writes it then
    return Int4(values) if dst_type == INT4 else values, scale, offset


@op("Bitcast", accepts_internal_formats=True)
def _bitcast(x: Any, *, type: int, keep_dim: bool = False) -> Any:
    if keep_dim:  # an int4 tensor then gets no dim of eight; torchair never sets it
        raise GraphError("Bitcast with keep_dim is not implemented by cann_host")
    if isinstance(x, FractalNZ) and isinstance(x.like, Tensor):
        storage = x.storage_shape
        if type == INT4 and storage is not None:
            storage = (*storage[:-1], logical_k(storage[-1], torch.int32))
        return x.map(lambda nd: _bitcast(nd, type=type), storage)
    if isinstance(x, Int4):
        if DTYPES.get(type) != torch.int32 or x.shape[-1] != INT4_PER_INT32:
            raise GraphError(f"Bitcast of int4 {tuple(x.shape)} to GE dtype {type} is refused")
        if x.held.is_meta:
            return torch.empty(x.shape[:-1], dtype=torch.int32, device="meta")
        return x.packed.squeeze(-1)
    assert isinstance(x, Tensor)
    if type == INT4:
        if x.dtype != torch.int32:
            raise GraphError(f"Bitcast of {dtype_name(x)} to int4 is not implemented by cann_host")
        # A wider dtype gets a last dim that holds the parts, as in TensorFlow's bitcast.
        return Int4(x.unsqueeze(-1))
    target = torch_dtype(type)
    if target.itemsize < x.dtype.itemsize:
        return x.contiguous().unsqueeze(-1).view(target)
    view = x.contiguous().view(target)
    return view.squeeze(-1) if target.itemsize > x.dtype.itemsize else view
