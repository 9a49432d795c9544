"""All calls of torch_npu: the NPU (PrivateUse1) kernels and the storage formats of npu tensors.

A kernel validates with plan() and makes one aclnn call. torch_npu is imported at the first call: an
npu tensor cannot exist without it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.devices import check_devices
from ..rules.plan import plan, plan_trans_quant_param
from ..rules.tables import FRACTAL_NZ, LAST_DIM_MAX, ND
from .compat_npu import ACL_INT32
from .derivatives import check_gradients

__all__ = [
    "cast_format",
    "dynamic_quant",
    "format_of",
    "linear_quant",
    "static_quant",
    "trans_quant_param",
]

# c10::ScalarType. Both trains of schemas take it: `int? output_dtype` and `ScalarType?`; see
# compat_npu.
_SCALAR_TYPES = {torch.int8: 1, torch.int32: 3, torch.float16: 5, torch.bfloat16: 15}
_QINT8, _QUINT4X2 = 12, 16  # what npu_quantize and npu_dynamic_quant call int8 and packed int4


def _row_major(x: Tensor) -> Tensor:
    """A contiguous tensor with row-major strides. In torch a dim of size 1 may have any stride, and
    CANN may read that as transposed."""
    if x.stride()[-2:] == (x.shape[-1], 1):
        return x
    return x.reshape(-1).view(x.shape)


@cache
def _quant_matmul() -> Any:
    """What the overload calls. torch_npu.npu_quant_matmul would look the overload up on every
    call, and the overload is a function in Python around this one."""
    import torch_npu

    return torch_npu.npu_quant_matmul.default._op


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
) -> Tensor:
    """NPU kernel of lq_graph::linear_quant; contract in `lq_graph.linear_quant`."""
    if float_scale is not None:
        check_devices("linear_quant", x1=x1, float_scale=float_scale)
    if check_gradients("linear_quant", scale, offset, pertoken_scale, bias):
        with torch.no_grad():
            return linear_quant(
                x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
            )
    p = plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)
    if p.m == 0:
        return x1.new_empty(p.output_shape, dtype=p.output_dtype)
    if p.int4:
        x1, weight = _row_major(x1), _row_major(weight)
    elif p.m > LAST_DIM_MAX or p.n > LAST_DIM_MAX:
        # in a transposed x1 or weight, m or n would be the last dim, which CANN limits
        x1 = x1.contiguous() if p.m > LAST_DIM_MAX else x1
        weight = weight.contiguous() if p.n > LAST_DIM_MAX else weight
    # Absent arguments and defaults are left out, and the dtype is passed as torch numbers it: each
    # of them costs an eager call half a microsecond or more.
    given: dict[str, Any] = {}
    if p.output_dtype is not torch.int8:
        given["output_dtype"] = _SCALAR_TYPES[p.output_dtype]
    if offset is not None:
        given["offset"] = offset
    if pertoken_scale is not None:
        given["pertoken_scale"] = pertoken_scale
    if bias is not None:
        given["bias"] = bias
    # torch_npu itself folds a float32 scale that has to be folded.
    try:
        out: Tensor = _quant_matmul()(x1, weight.mT, scale, **given)
    except RuntimeError:
        given.pop("output_dtype", None)
        check_devices("linear_quant", x1=x1, weight=weight, scale=scale, **given)
        raise
    if out.is_meta:  # a meta tensor among the operands; torch_npu returned no values
        given.pop("output_dtype", None)
        check_devices("linear_quant", x1=x1, weight=weight, scale=scale, **given)
    return out


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """NPU kernel of lq_graph::trans_quant_param; contract in `lq_graph.trans_quant_param`."""
    import torch_npu

    if check_gradients("trans_quant_param", scale, offset):
        with torch.no_grad():
            return trans_quant_param(scale, offset, round_mode)
    plan_trans_quant_param(scale, offset, round_mode)
    try:
        out: Tensor = torch_npu.npu_trans_quant_param(scale, offset, round_mode)
    except RuntimeError:
        check_devices("trans_quant_param", scale=scale, offset=offset)
        raise
    return out


def dynamic_quant(x: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """NPU kernel of lq_graph::dynamic_quant; contract in `lq_graph.dynamic_quant`."""
    import torch_npu

    if check_gradients("dynamic_quant", x):
        with torch.no_grad():
            return dynamic_quant(x, dtype=dtype)
    p = plan_dynamic_quant(x, dtype)
    out: tuple[Tensor, Tensor] = torch_npu.npu_dynamic_quant.default(
        x, dst_type=_QUINT4X2 if p.int4 else _SCALAR_TYPES[torch.int8]
    )
    return out


def static_quant(
    x: Tensor,
    scale_reciprocal: Tensor,
    offset: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    reciprocals: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> Tensor:
    """NPU kernel of lq_graph::static_quant; contract in `lq_graph.static_quant`."""
    import torch_npu

    if scale is not None or zero_point is not None or reciprocals is not None:
        check_devices(
            "static_quant",
            x=x,
            scale=scale,
            zero_point=zero_point,
            reciprocals=reciprocals,
            zero_points=zero_points,
        )
    if check_gradients("static_quant", x, scale_reciprocal, offset):
        with torch.no_grad():
            return static_quant(x, scale_reciprocal, offset)
    plan_static_quant(x, scale_reciprocal, offset)
    try:
        out: Tensor = torch_npu.npu_quantize.default(x, scale_reciprocal, offset, _QINT8, -1, False)
    except RuntimeError:
        check_devices("static_quant", x=x, scale_reciprocal=scale_reciprocal, offset=offset)
        raise
    return out


def format_of(tensor: Tensor) -> int:
    """The storage format of a tensor, as aclFormat numbers it; ND for a tensor not on the NPU."""
    if tensor.device.type != "npu":
        return ND
    import torch_npu

    return int(torch_npu.get_npu_format(tensor))


def cast_format(tensor: Tensor, acl_format: int) -> Tensor:
    """Cast an npu tensor to a storage format; return it unchanged if it already has this format.

    An int32 tensor is treated as int4: its FRACTAL_NZ blocks have rows of 8 words (64 int4 values),
    not the 16 words of a plain cast (torch_npu-npu_format_cast.md, customize_dtype).
    """
    import torch_npu

    if format_of(tensor) == acl_format:
        return tensor
    out: Tensor
    if tensor.dtype == torch.int32 and acl_format == FRACTAL_NZ:
        out = torch_npu.npu_format_cast(tensor, acl_format, customize_dtype=ACL_INT32)
    else:
        out = torch_npu.npu_format_cast(tensor, acl_format)
    return out
