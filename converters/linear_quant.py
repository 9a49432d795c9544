"""Lowering of lq_graph's operators to GE nodes.

A converter only unpacks a Plan into nodes; it checks nothing, because plan() does. Each is a plain
function over GE tensors, so a test can call it inside a graph context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lq_graph.kernels import INT4_PER_INT32, logical_k
from lq_graph.rules.activations import plan_dynamic_quant, plan_static_quant
from lq_graph.rules.plan import Plan, plan, plan_trans_quant_param

from ._torchair import (
    HAS_QUANT_BATCH_MATMUL_V4,
    Const,
    DataType,
    Tensor,
    TensorSpec,
    ge,
    ge_dtype_to_proto,
    torch_type_to_ge_type,
)

__all__ = ["dynamic_quant", "linear_quant", "static_quant", "trans_quant_param"]


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    float_scale: Tensor | None = None,
    meta_outputs: TensorSpec = None,
) -> Tensor:
    """NB: lq_graph::linear_quant(Tensor x1, Tensor weight, Tensor scale, Tensor? offset=None,
    Tensor? pertoken_scale=None, Tensor? bias=None, *, ScalarType? output_dtype=None,
    Tensor? float_scale=None) -> Tensor

    One QuantBatchMatmulV3 (V4 on Ascend 950, if torchair has it) with transpose_x2; the weight
    stays (n, k). Before it, only if needed: TransQuantParamV2 for a float32 scale that must be
    folded; Bitcast and Reshape for int4, which is a dtype in GE and packed in int32 in torch.
    """
    p = plan(
        x1.meta,
        weight.meta,
        scale.meta,
        _meta(offset),
        _meta(pertoken_scale),
        _meta(bias),
        output_dtype=output_dtype,
    )
    if p.int4:
        x1, weight = _as_int4(x1), _as_int4(weight)
    if p.fold_scale:
        scale = trans_quant_param(scale, offset)
    return _quant_batch_matmul(p, x1, weight, scale, offset, pertoken_scale, bias)


def trans_quant_param(
    scale: Tensor,
    offset: Tensor | None = None,
    round_mode: int = 0,
    meta_outputs: TensorSpec = None,
) -> Tensor:
    """NB: lq_graph::trans_quant_param(Tensor scale, Tensor? offset=None, int round_mode=0)
    -> Tensor

    One TransQuantParamV2. Its InferShape returns the shape of the scale, so if there is one scale
    and n offsets, the scale is expanded first.
    """
    shape = plan_trans_quant_param(scale.meta, _meta(offset), round_mode)
    if tuple(scale.meta.shape) != shape:
        scale = _declare(ge.BroadcastTo(scale, list(shape)), DataType.DT_FLOAT, shape)
    packed = ge.TransQuantParamV2(scale, offset, round_mode=round_mode)
    return _declare(packed, DataType.DT_INT64, shape)


def dynamic_quant(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    meta_outputs: Sequence[TensorSpec] | None = None,
) -> tuple[Tensor, Tensor]:
    """NB: lq_graph::dynamic_quant(Tensor x, *, ScalarType? dtype=None) -> (Tensor, Tensor)

    One DynamicQuant. Reshape and Bitcast turn its int4 output into the int32 that torch sees. A
    linear_quant that reads it takes the int4 output directly, so GE removes these two nodes.
    """
    p = plan_dynamic_quant(x.meta, dtype)
    ge_dtype = DataType.DT_INT4 if p.int4 else DataType.DT_INT8
    quantized, scale = ge.DynamicQuant(x, smooth_scales=None, group_index=None, dst_type=ge_dtype)
    _declare(scale, DataType.DT_FLOAT, p.scale_shape)
    _declare(quantized, ge_dtype, tuple(x.meta.shape))
    return (_as_int32(quantized, p.output_shape) if p.int4 else quantized), scale


def static_quant(
    x: Tensor,
    scale_reciprocal: Tensor,
    offset: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    reciprocals: Tensor | None = None,
    zero_points: Tensor | None = None,
    meta_outputs: TensorSpec = None,
) -> Tensor:
    """NB: lq_graph::static_quant(Tensor x, Tensor scale_reciprocal, Tensor? offset=None, *,
    Tensor? scale=None, Tensor? zero_point=None, Tensor? reciprocals=None, Tensor? zero_points=None)
    -> Tensor

    One AscendQuantV2.
    """
    p = plan_static_quant(x.meta, scale_reciprocal.meta, _meta(offset))
    quantized = ge.AscendQuantV2(
        x,
        scale_reciprocal,
        offset,
        sqrt_mode=False,
        round_mode="round",
        dst_type=DataType.DT_INT8,
        axis=-1,
    )
    return _declare(quantized, DataType.DT_INT8, p.output_shape)


def _meta(tensor: Tensor | None) -> torch.Tensor | None:
    """The fake tensor of a GE tensor, which torchair keeps; plan() reads it."""
    return None if tensor is None else tensor.meta


def _declare(tensor: Tensor, dtype: int, shape: Sequence[int]) -> Tensor:
    """Set dtype and shape of an inner node's output, as torchair does for nodes that have a fake
    tensor. GE infers them anyway; without them, dumps show DT_FLOAT and no shape."""
    tensor.desc.dtype = ge_dtype_to_proto(dtype)
    tensor.desc.attr["_meta"].s = f"shape=torch.Size({list(shape)})".encode()
    return tensor


# attribute of a packed tensor: the int4 tensor that it was made from
_INT4 = "_lq_graph_int4"


def _as_int32(int4: Tensor, shape: Sequence[int]) -> Tensor:
    """GE int4 (..., k) as int32 (..., k/8). Bitcast to a larger dtype removes a last dim of 8."""

    def in_eights() -> Tensor:
        eighth = Const([1] * (len(shape) - 1) + [INT4_PER_INT32], dtype=DataType.DT_INT32)
        words = ge.FloorDiv(ge.Shape(int4), eighth)
        return ge.ConcatV2([words, Const([INT4_PER_INT32], dtype=DataType.DT_INT32)], 0, N=2)

    parts = _reshape(int4, (*shape, INT4_PER_INT32), in_eights)
    packed = _declare(ge.Bitcast(parts, type=DataType.DT_INT32), DataType.DT_INT32, shape)
    setattr(packed, _INT4, int4)
    return packed


def _as_int4(packed: Tensor) -> Tensor:
    """int32 (..., k/8) as GE int4 (..., k). Bitcast to a smaller dtype adds a last dim of 8."""
    if (int4 := getattr(packed, _INT4, None)) is not None:
        return int4
    *rows, words = packed.meta.shape
    shape = [*rows, logical_k(words, torch.int32)]
    int4 = _declare(
        ge.Bitcast(packed, type=DataType.DT_INT4),
        DataType.DT_INT4,
        (*rows, words, INT4_PER_INT32),
    )
    eightfold = Const([1] * len(rows) + [INT4_PER_INT32])
    return _reshape(int4, shape, lambda: ge.Mul(ge.Shape(packed), eightfold))


def _reshape(x: Tensor, shape: Sequence[int], dynamic: Callable[[], Tensor]) -> Tensor:
    """Reshape of int4. -1 stands for one symbolic size, usually m; with several symbolic sizes, the
    graph must compute the target shape."""
    unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) <= 1:
        target = Const([-1 if i in unknown else size for i, size in enumerate(shape)])
    else:
        target = dynamic()
    return _declare(ge.Reshape(x, target), DataType.DT_INT4, shape)


def _quant_batch_matmul(
    p: Plan,
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    dtype = torch_type_to_ge_type(p.output_dtype)
    # Where torchair has no V4, V3 is right: it is what GE makes of V4 for int8 and int4
    # (quant_batch_matmul_v4_to_v3_fusion_pass.cpp, hicann/ops-nn).
    if p.product.ge_op == "QuantBatchMatmulV4" and HAS_QUANT_BATCH_MATMUL_V4:
        out = ge.QuantBatchMatmulV4(
            x1,
            weight,
            bias=bias,
            x1_scale=pertoken_scale,
            x2_scale=scale,
            y_scale=None,
            x1_offset=None,
            x2_offset=offset,
            y_offset=None,
            x2_table=None,
            dtype=dtype,
            transpose_x1=False,
            transpose_x2=True,
            group_size=0,
        )
    else:
        out = ge.QuantBatchMatmulV3(
            x1,
            weight,
            scale,
            offset,
            bias,
            pertoken_scale,
            dtype=dtype,
            transpose_x1=False,
            transpose_x2=True,
        )
    return _declare(out, dtype, p.output_shape)
