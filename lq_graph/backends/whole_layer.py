"""lq_graph::quantized_linear: dynamic_quant or static_quant, and linear_quant of its result.

Only Inductor's graphs call it, on the CPU: see fusion/inductor.py. Its arguments are those of the
two operators: static_quant's are scale_reciprocal and input_offset, and without a scale_reciprocal
it is dynamic_quant.
"""

from __future__ import annotations

from functools import partial
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
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    scale_reciprocal: Tensor | None = None,
    input_offset: Tensor | None = None,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """The kernels of the two operators, one after the other."""
    pertoken_scale = None
    if scale_reciprocal is None:
        x1, pertoken_scale = kernels.dynamic_quant(x, dtype=weight.dtype)
    else:
        x1 = kernels.static_quant(x, scale_reciprocal, input_offset)
    out: Tensor = kernels.linear_quant(
        x1, weight, scale, offset, pertoken_scale, bias, output_dtype=output_dtype
    )
    return out


fake = partial(_by_operators, in_graphs)
npu = partial(_by_operators, on_npu)


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
    """One native call if that can be."""
    given = x, weight, scale, offset, bias
    quantizer = scale_reciprocal, input_offset
    out = on_cpu.layer(*given, output_dtype, *quantizer)
    if out is None:
        out = _by_operators(on_cpu, *given, *quantizer, output_dtype=output_dtype)
    return out


def into(*args: Any, out: Tensor) -> None:
    """What Inductor's programs call: `cpu`, its output written into a tensor.

    Programs in torch's cache import this by its name: other arguments need another name.

    Args:
        args: the tensors that are given; for each positional argument of `cpu` whether it is given;
            and the dtype of the output.
        out: (m, n), contiguous.
    """
    *tensors, present, output_dtype = args
    left = iter(tensors)
    given: list[Any] = [next(left) if one else None for one in present]
    x, weight, scale, offset, bias, reciprocal, zero = given
    found = on_cpu.layer(x, weight, scale, offset, bias, output_dtype, reciprocal, zero, out)
    if found is None:
        out.copy_(_by_operators(on_cpu, *given, output_dtype=output_dtype))
