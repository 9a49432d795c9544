"""lq_graph::quantized_linear: dynamic_quant or static_quant, and linear_quant of its result. Only
Inductor's graphs call it, on the CPU: see `inductor`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu as on_cpu
from . import fake as in_graphs
from . import npu as on_npu

__all__ = ["cpu", "fake", "into", "npu"]


def _by_operators(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    scale_reciprocal: Tensor | None,
    input_offset: Tensor | None,
    output_dtype: torch.dtype | None,
) -> Tensor:
    """The two operators, one after the other."""
    pertoken_scale = None
    if scale_reciprocal is None:
        x1, pertoken_scale = kernels.dynamic_quant(x, dtype=weight.dtype)
    else:
        x1 = kernels.static_quant(x, scale_reciprocal, input_offset)
    out: Tensor = kernels.linear_quant(
        x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
    )
    return out


def cpu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    scale_reciprocal: Tensor | None = None,
    input_offset: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """CPU kernel of lq_graph::quantized_linear: one native call if that can be."""
    found = on_cpu.layer(
        x, weight, scale, offset, bias, output_dtype, scale_reciprocal, input_offset
    )
    if found is not None:
        return found
    return _by_operators(
        on_cpu, x, weight, scale, offset, bias, scale_reciprocal, input_offset, output_dtype
    )


def fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    scale_reciprocal: Tensor | None = None,
    input_offset: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fake kernel of lq_graph::quantized_linear."""
    return _by_operators(
        in_graphs, x, weight, scale, offset, bias, scale_reciprocal, input_offset, output_dtype
    )


def npu(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    scale_reciprocal: Tensor | None = None,
    input_offset: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """NPU kernel of lq_graph::quantized_linear."""
    return _by_operators(
        on_npu, x, weight, scale, offset, bias, scale_reciprocal, input_offset, output_dtype
    )


def into(*args: Any, out: Tensor) -> None:
    """What Inductor's programs call instead: `cpu`, its output written into a tensor.

    Args:
        args: the tensors that are given; for each argument of `cpu` whether it is given; and the
            dtype of the output.
        out: (m, n), contiguous.
    """
    *given, present, output_dtype = args
    x, weight, scale, offset, bias, scale_reciprocal, input_offset = (
        given.pop(0) if one else None for one in present
    )
    found = on_cpu.layer(
        x, weight, scale, offset, bias, output_dtype, scale_reciprocal, input_offset, out=out
    )
    if found is None:
        out.copy_(
            _by_operators(
                on_cpu, x, weight, scale, offset, bias, scale_reciprocal, input_offset, output_dtype
            )
        )
