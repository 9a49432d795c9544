"""Inputs as a model takes them: on its device, floats in its dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .linear_quant import LinearQuant
from .quantized_linear import QuantizedLinear

__all__ = ["copy_of", "inputs_for"]


def inputs_for(module: nn.Module, value: Any) -> Any:
    """Copies of arguments, on a module's device, floats in its dtype.

    A model whose parameters have several dtypes computes in that of the first one, but a float16 or
    bfloat16 input keeps its dtype if one of them has it.
    """
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = _dtypes_of(module)
    return copy_of(value, tensors[0].device if tensors else torch.device("cpu"), dtypes)


def copy_of(
    value: Any, device: torch.device | None = None, dtypes: tuple[torch.dtype, ...] = ()
) -> Any:
    """Copies of the tensors in a value; containers become dicts and tuples.

    Args:
        device: of the copies; None: as they are.
        dtypes: of a module's parameters, the one for inputs first; none: as they are.
    """
    if isinstance(value, Tensor):
        dtype = value.dtype
        if dtypes and dtype.is_floating_point and (dtype not in dtypes or dtype.itemsize > 2):
            dtype = dtypes[0]
        return value.detach().to(device or value.device, dtype, copy=True)
    if isinstance(value, Mapping):
        return {key: copy_of(item, device, dtypes) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(copy_of(item, device, dtypes) for item in value)
    return value


def _dtypes_of(module: nn.Module) -> tuple[torch.dtype, ...]:
    """The dtypes of a module's float parameters, the first one first; if there are none, those of
    the inputs of its quantized layers."""
    floats: dict[torch.dtype, None] = {}
    quantized: dict[torch.dtype, None] = {}
    skip: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, QuantizedLinear | LinearQuant):
            skip.update(part.modules())
            if isinstance(part, QuantizedLinear) and part.input_dtype.is_floating_point:
                quantized[part.input_dtype] = None
        elif part not in skip:
            for parameter in part._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    floats[parameter.dtype] = None
    return tuple(floats or quantized)
