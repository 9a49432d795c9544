"""The quantized matmul, and the packing of its scale."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cann_host import chips, weights
from cann_host.graph import executor
from cann_host.graph.ops.quant import pack_parameters
from cann_host.memory import FRACTAL_NZ
from cann_host.rules import (
    ND,
    NULL_POINTER,
    NZ,
    QuantMatmulCall,
    TensorDesc,
    TransQuantParamCall,
    check_quant_matmul,
    check_trans_quant_param,
    packed_words,
)
from cann_host.rules.quant_matmul import Entry
from lq_graph import kernels

from .checks import need, need_base_format
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


# ---- the scale ----


class TransQuantParamArguments(NamedTuple):
    scale: AclTensor
    offset: AclTensor | None
    round_mode: int
    out: AclTensor


def _check_trans_quant_param(call: TransQuantParamArguments, soc: str) -> None:
    """Source: hicann/ops-nn quant/trans_quant_param_v2/op_host/op_api."""
    scale, offset, round_mode, out = call
    need(scale=scale, out=out)
    need_base_format(scale=scale, offset=offset, out=out)
    if out.dtype not in (torch.int64, torch.uint64):
        raise RefusedError(f"out is {out.dtype_name}; it must be int64 or uint64")
    given = TransQuantParamCall(soc, scale.desc, describe(offset), round_mode)
    raise_refusal(check_trans_quant_param(given))
    found = packed_words(scale.shape, None if offset is None else offset.shape, out.shape)
    raise_refusal(found.refusal)
    if found.overrun and executor.refuses_overruns():
        executor.overrun(found.overrun)


def _trans_quant_param(call: TransQuantParamArguments, _soc: str) -> None:
    offset = None if call.offset is None else call.offset.view()
    packed = pack_parameters(call.scale.view(), offset, call.round_mode, call.out.shape)
    call.out.view().view(torch.int64).copy_(packed)


# ---- the matmul ----


class QuantMatmulArguments(NamedTuple):
    x1: AclTensor
    x2: AclTensor
    x1_scale: AclTensor | None
    x2_scale: AclTensor
    y_scale: AclTensor | None
    x1_offset: AclTensor | None
    x2_offset: AclTensor | None
    y_offset: AclTensor | None
    bias: AclTensor | None
    transpose_x1: int
    transpose_x2: int
    group_size: int
    out: AclTensor


def _check_quant_matmul(call: QuantMatmulArguments, soc: str, *, entry: Entry) -> None:
    x1, x2 = call.x1, call.x2
    need(x1=x1, x2=x2, x2_scale=call.x2_scale, out=call.out)
    _check_unused_arguments(call, entry)
    need_base_format(
        x1=x1,
        x1_scale=call.x1_scale,
        x2_scale=call.x2_scale,
        x2_offset=call.x2_offset,
        bias=call.bias,
        out=call.out,
    )
    if x2.format != FRACTAL_NZ:
        need_base_format(x2=x2)
    given = QuantMatmulCall(
        soc=soc,
        x1=_describe_matrix(x1),
        x2=_describe_matrix(x2),
        scale=call.x2_scale.desc,
        out_dtype=call.out.dtype_name,
        offset=describe(call.x2_offset),
        bias=describe(call.bias),
        pertoken_scale=describe(call.x1_scale),
        out_shape=call.out.shape,
        entry=entry,
    )
    raise_refusal(check_quant_matmul(given))


def _check_unused_arguments(call: QuantMatmulArguments, entry: Entry) -> None:
    """Arguments that int8 and int4 calls of torch_npu never have."""
    x1, x2 = _matrix_dtype(call.x1), _matrix_dtype(call.x2)
    is_a8w4 = (x1, x2) == ("int8", "int4")
    unused = {"y_scale": call.y_scale, "x1_offset": call.x1_offset, "y_offset": call.y_offset}
    for name, tensor in unused.items():
        if tensor is None or 0 in tensor.shape:  # torch_npu passes an empty one for an absent one
            continue
        if entry == "v5" and x1 in ("int8", "int4") and not is_a8w4:
            # CheckInputExistence of aclnn_quant_matmul_v5.cpp, with this code
            raise RefusedError(f"{name} is given; {x1} x1 takes none", NULL_POINTER)
        raise RefusedError(f"cann_host does not implement {name}", None)
    if call.group_size:
        raise RefusedError(f"cann_host does not implement group_size {call.group_size}", None)
    if call.transpose_x1 or call.transpose_x2:
        raise RefusedError(
            "cann_host takes transposition from the strides, as torch_npu passes it", None
        )


def _matrix_dtype(tensor: AclTensor) -> str:
    """The dtype as the rules take it; int32 is int4."""
    return "int4" if tensor.dtype == torch.int32 else tensor.dtype_name


def _describe_matrix(tensor: AclTensor) -> TensorDesc:
    """x1 or x2 as the rules take it: in the order of the memory, an int32 as eight int4 values."""
    dtype, shape, format_, storage = _matrix_dtype(tensor), tensor.stored_shape, ND, None
    if tensor.format == FRACTAL_NZ:
        format_ = NZ
        storage = (*tensor.storage[:-1], kernels.logical_k(tensor.storage[-1], tensor.dtype))
    if shape:
        shape = (*shape[:-1], kernels.logical_k(shape[-1], tensor.dtype))
    return TensorDesc(dtype, shape, format_, tensor.is_transposed, storage)


def _untransposed_weight(x2: AclTensor) -> Tensor | kernels.NzWeight:
    """x2 as (..., n, k) or (n, k/8) in its own dtype; int4 that is packed along n as int8."""
    rows, columns = x2.stored_shape[-2:]
    if x2.is_transposed and x2.format == FRACTAL_NZ and len(x2.shape) == 2:
        return kernels.NzWeight(x2.nz_view(), rows, columns)
    if x2.is_transposed and x2.format != FRACTAL_NZ:
        return x2.view().mT
    kind = ("x2", *x2[1:])  # all but the address
    return weights.converted(kind, *x2.bytes, lambda: _converted_weight(x2))


def _converted_weight(x2: AclTensor) -> Tensor:
    rows, columns = x2.stored_shape[-2:]
    stored = kernels.nz_to_nd(x2.nz_view(), rows, columns) if x2.format == FRACTAL_NZ else x2.view()
    if x2.is_transposed:
        return stored
    if x2.dtype == torch.int32:
        stored = kernels.unpack_int4(stored)
    return stored.mT.contiguous()


def _quant_matmul(call: QuantMatmulArguments, soc: str) -> None:
    """The chip reads only the offset bits packed in the scale, not x2_offset."""
    out = call.out
    if 0 in out.shape:
        return  # Ascend 950 returns an empty output for an empty input
    x, weight = call.x1.view(), _untransposed_weight(call.x2)
    if call.x1.dtype == torch.int32 and isinstance(weight, Tensor) and weight.dtype == torch.int8:
        x = kernels.unpack_int4(x)
    pertoken, bias = (None if t is None else t.view() for t in (call.x1_scale, call.bias))
    scale = call.x2_scale.view().reshape(-1)
    result = kernels.quant_matmul(
        x,
        weight,
        chips.scale_as_read(soc, scale, pertoken, bias, out.dtype),
        bias=bias,
        pertoken_scale=pertoken,
        output_dtype=out.dtype,
    )
    out.write(result)


_check_v4 = partial(_check_quant_matmul, entry="v4")
_check_v5 = partial(_check_quant_matmul, entry="v5")
_check_weight_nz = partial(_check_quant_matmul, entry="nz")

_READ = frozenset(QuantMatmulArguments._fields) - {"out"}

OPERATORS = (
    *(
        Operator(name, QuantMatmulArguments, check, _quant_matmul, True, _READ)
        for name, check in (
            ("aclnnQuantMatmulV4", _check_v4),
            ("aclnnQuantMatmulV5", _check_v5),
            ("aclnnQuantMatmulWeightNz", _check_weight_nz),
        )
    ),
    *(
        Operator(name, TransQuantParamArguments, _check_trans_quant_param, _trans_quant_param)
        for name in ("aclnnTransQuantParamV2", "aclnnTransQuantParamV3")
    ),
)
