"""A QuantizedLinear on the CPU in one call of the compiled kernel, if nothing looks between its two
operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as module_hooks

from ..backends import cpu
from ..backends.compat import is_followed, is_profiled
from ..backends.derivatives import asks_for_gradients
from ..kernels import INT4_PER_INT32
from .linear_quant import PARAMETERS, LinearQuant

__all__ = ["in_one_call"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def in_one_call(
    x: Tensor, linear: LinearQuant, scale_reciprocal: Tensor | None, offset: Tensor | None
) -> Tensor | None:
    """dynamic_quant or static_quant of x, and `linear` of the result; None if the two operators
    must be called, or compute what the compiled kernel does not.

    Args:
        x: (..., k).
        linear: the layer that multiplies.
        scale_reciprocal, offset: of static_quant; None for dynamic_quant.
    """
    if not (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype in _DTYPES
        and _is_plain(linear)
        and not is_followed()
        and not is_profiled()
        and not torch.is_autocast_enabled("cpu")
    ):
        return None
    own: dict[str, Any] = linear._parameters
    weight, scale, folded, bias = own["weight"], own["scale"], own["offset"], own["bias"]
    if own["pertoken_scale"] is None and scale_reciprocal is None:
        return None  # refused, in the operator's words
    if not (weight.is_cpu and scale.is_cpu and (bias is None or bias.is_cpu)):
        return None
    if asks_for_gradients(x, scale, folded, bias):
        return None
    return cpu.layer(x, weight, scale, folded, bias, linear.output_dtype, scale_reciprocal, offset)


def _is_plain(linear: LinearQuant) -> bool:
    """Whether a call of `linear` does what LinearQuant does, and nothing else."""
    own = vars(linear)
    return (
        type(linear).forward is LinearQuant.forward
        and len(own["_parameters"]) == len(PARAMETERS)
        and own["x1_dtype"] is None
        and own["x2_dtype"] is None
        and own["in_features"] % INT4_PER_INT32 == 0
        and "forward" not in own
        and own.get("_compiled_call_impl") is None
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and not (module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)
    )
