"""The two operators: schema, fake kernel and registrations side by side.

    lq_graph::linear_quant        quantized linear layer, A8W8 or A4W4 (int4 in int32)
    lq_graph::trans_quant_param   scale and offset folded into the packed int64 scale

`Library.define` is used rather than `custom_op`, whose Python wrapper costs more per call than
the epilogue of a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lazy_converters, cpu, npu
from .plan import plan, plan_trans_quant_param

__all__ = ["linear_quant", "trans_quant_param"]

_lib = torch.library.Library("lq_graph", "DEF")

_lib.define(
    "linear_quant(Tensor x1, Tensor weight, Tensor scale, Tensor? offset=None, "
    "Tensor? pertoken_scale=None, Tensor? bias=None, *, ScalarType? output_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    "trans_quant_param(Tensor scale, Tensor? offset=None, int round_mode=0) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("lq_graph::linear_quant", lib=_lib)
def _linear_quant_fake(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    p = plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)
    return x1.new_empty(p.output_shape, dtype=p.output_dtype)


@torch.library.register_fake("lq_graph::trans_quant_param", lib=_lib)
def _trans_quant_param_fake(
    scale: Tensor, offset: Tensor | None = None, round_mode: int = 0
) -> Tensor:
    shape = plan_trans_quant_param(scale, offset, round_mode)
    return scale.new_empty(shape, dtype=torch.int64)


_lib.impl("linear_quant", cpu.linear_quant, "CPU")
_lib.impl("trans_quant_param", cpu.trans_quant_param, "CPU")
# "PrivateUse1" is what the npu device is called before torch_npu renames it.
_lib.impl("linear_quant", npu.linear_quant, "PrivateUse1")
_lib.impl("trans_quant_param", npu.trans_quant_param, "PrivateUse1")

_linear_quant = torch.ops.lq_graph.linear_quant.default
_trans_quant_param = torch.ops.lq_graph.trans_quant_param.default

_lazy_converters.install(_linear_quant, _trans_quant_param)


def linear_quant(
    x1: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Quantized linear layer: `x1 @ weight.T`, scaled, on CPU, NPU, meta and in graphs.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying eight int4; 2 to 6 dims.
        weight: dtype of x1; (..., n, k) untransposed, batch dims broadcast with x1; int4
            exactly (n, k/8).
        scale: float32, bfloat16, or int64 packed by `trans_quant_param`; (1,) per-tensor or
            (n,) per-channel.
        offset: float32, (1,) or (n,); int8 output only. Ignored where scale is packed: the
            packed word carries its own.
        pertoken_scale: float32, (m,); float16 and bfloat16 outputs only.
        bias: int32 (added before the scale), or a float dtype where the table has it (added
            last); (n,) or (batch, 1, n).
        output_dtype: torch.int8 (default), float16, bfloat16 or int32.

    Returns:
        (..., m, n) of output_dtype.

    Raises:
        LinearQuantTypeError: a dtype, or a combination of dtypes, the product has no row for.
        LinearQuantValueError: a shape outside the specification.

    Source: torch_npu.contrib.module.LinearQuant; aclnnQuantMatmulV4.md (hicann/ops-nn).
    """
    out: Tensor = _linear_quant(
        x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
    )
    return out


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fold scale and offset into the packed int64 scale the kernel reads.

    Args:
        scale: float32, (1,), (n,) or (1, n); finite.
        offset: float32, as scale; rounded half to even and clamped to [-256, 255]. With 1 dim
            each, one of length 1 broadcasts.
        round_mode: 0 truncates the scale to 19 bits (sign, exponent, 10 mantissa bits), 1
            rounds it half to even, and subnormals to zero.

    Returns:
        int64, shape of the longer operand.

    Raises:
        LinearQuantTypeError: a dtype other than float32.
        LinearQuantValueError: shapes that do not fit, another round_mode, and, on CPU, NaN or
            infinite values.

    Source: aclnnTransQuantParamV2 and V3 (hicann/ops-nn, quant/trans_quant_param_v2).
    """
    out: Tensor = _trans_quant_param(scale, offset, round_mode)
    return out
