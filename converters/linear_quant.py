"""Lowering of lq_graph's operators to GE nodes.

Builders only unpack a Plan into nodes: no checks here, `lq_graph.plan` has made them. Each is
a plain function over GE tensors, so a test can call it inside a graph context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lq_graph.numerics import INT4_PER_INT32
from lq_graph.plan import Plan, plan, plan_trans_quant_param

from ._torchair import (
    Const,
    DataType,
    Tensor,
    TensorSpec,
    ge,
    ge_dtype_to_proto,
    torch_type_to_ge_type,
)

__all__ = ["linear_quant", "trans_quant_param"]


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    meta_outputs: TensorSpec = None,
) -> Tensor:
    """NB: lq_graph::linear_quant(Tensor x1, Tensor weight, Tensor scale, Tensor? offset=None,
    Tensor? pertoken_scale=None, Tensor? bias=None, *, ScalarType? output_dtype=None) -> Tensor

    One QuantBatchMatmulV3 (V4 on Ascend 950) with transpose_x2, the weight staying (n, k). Before
    it, only where needed: TransQuantParamV2 for a float32 scale that must be folded, Bitcast and
    Reshape for int4 (GE knows int4 as a dtype, torch carries it in int32).
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

    One TransQuantParamV2. Its InferShape takes the scale's shape for the result, so a scale of
    one value beside n offsets is expanded first.
    """
    shape = plan_trans_quant_param(scale.meta, _meta(offset), round_mode)
    if tuple(scale.meta.shape) != shape:
        scale = _declare(ge.BroadcastTo(scale, list(shape)), DataType.DT_FLOAT, shape)
    packed = ge.TransQuantParamV2(scale, offset, round_mode=round_mode)
    return _declare(packed, DataType.DT_INT64, shape)


def _meta(tensor: Tensor | None) -> torch.Tensor | None:
    """What plan() looks at: the fake tensor torchair keeps beside a GE tensor."""
    return None if tensor is None else tensor.meta


def _declare(tensor: Tensor, dtype: int, shape: Sequence[int]) -> Tensor:
    """Note on an inner node's output what GE will infer, as torchair does on every node that has
    a fake tensor: without it, dumps show DT_FLOAT and no shape."""
    tensor.desc.dtype = ge_dtype_to_proto(dtype)
    tensor.desc.attr["_meta"].s = f"shape=torch.Size({list(shape)})".encode()
    return tensor


def _as_int4(packed: Tensor) -> Tensor:
    """int32 (..., k/8) as GE int4 (..., k). Bitcast to a smaller dtype appends a dim of 8."""
    *rows, words = packed.meta.shape
    shape = [*rows, words * INT4_PER_INT32]
    int4 = _declare(
        ge.Bitcast(packed, type=DataType.DT_INT4),
        DataType.DT_INT4,
        (*rows, words, INT4_PER_INT32),
    )
    unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) <= 1:
        # one symbolic size, usually m, is what -1 stands for
        target = Const([-1 if i in unknown else size for i, size in enumerate(shape)])
    else:
        target = ge.Mul(ge.Shape(packed), Const([1] * len(rows) + [INT4_PER_INT32]))
    return _declare(ge.Reshape(int4, target), DataType.DT_INT4, shape)


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
    if p.product.ge_op == "QuantBatchMatmulV4":
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
