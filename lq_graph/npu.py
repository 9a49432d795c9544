"""NPU (PrivateUse1) kernels: validate with plan(), then one aclnn call through torch_npu.

torch_npu is imported at the first call: an npu tensor cannot exist without it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import plan, plan_trans_quant_param

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
) -> Tensor:
    """NPU kernel of lq_graph::linear_quant; contract in `lq_graph.linear_quant`."""
    import torch_npu

    p = plan(x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype)
    if p.m == 0:
        return x1.new_empty(p.output_shape, dtype=p.output_dtype)
    # A float32 scale that has to be folded is folded inside, by torch_npu itself.
    out: Tensor = torch_npu.npu_quant_matmul(
        x1,
        weight.transpose(-1, -2),
        scale,
        offset=offset,
        pertoken_scale=pertoken_scale,
        bias=bias,
        output_dtype=p.output_dtype,
    )
    return out


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """NPU kernel of lq_graph::trans_quant_param; contract in `lq_graph.trans_quant_param`."""
    import torch_npu

    plan_trans_quant_param(scale, offset, round_mode)
    out: Tensor = torch_npu.npu_trans_quant_param(scale, offset, round_mode)
    return out
