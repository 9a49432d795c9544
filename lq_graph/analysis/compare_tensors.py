"""Inputs for a model, and the tensors to compare in its return value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LinearQuantTypeError
from ..modules.linear_quant import LinearQuant
from ..modules.quantized_linear import QuantizedLinear

__all__ = ["as_float", "check_picked", "copy_of", "first_float", "inputs_for", "tensor_of"]


def as_float(layer: nn.Module, out: Tensor) -> Tensor:
    """A layer's output as float numbers; int8 between quantized layers is dequantized."""
    return layer.to_float(out) if isinstance(layer, QuantizedLinear) else out


def tensor_of(name: str, out: Any) -> Tensor:
    """A layer's output: a tensor, or the first of a tuple."""
    first = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(first, Tensor):
        raise LinearQuantTypeError(
            f"compare: {name} returns {type(first).__name__}; allowed are a tensor or a tuple that "
            "begins with one. What to do: leave the layer out with `layers`."
        )
    return first


def first_float(out: Any) -> Tensor:
    """The first float tensor in the return value of a model."""
    values = out.values() if isinstance(out, Mapping) else out
    for value in values if isinstance(values, Iterable) and not isinstance(out, Tensor) else [out]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise LinearQuantTypeError(
        f"compare: the models return {type(out).__name__} without a float tensor. What to do: pass "
        "output=, a function that picks the tensor to compare."
    )


def check_picked(picked: Any) -> Tensor:
    """Check that output= returned a tensor, and return it."""
    if not isinstance(picked, Tensor):
        raise LinearQuantTypeError(
            f"compare: output= returned {type(picked).__name__}; allowed is a tensor. What to do: "
            "let it pick the tensor to compare from what the model returns."
        )
    return picked


def inputs_for(module: nn.Module, value: Any) -> Any:
    """Copies of arguments, on a module's device, floats in its dtype."""
    return copy_of(value, _device_of(module), _dtype_of(module))


def copy_of(
    value: Any, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Copies of the tensors in a value, floats in a dtype; containers become dicts and tuples."""
    if isinstance(value, Tensor):
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to(device or value.device, wanted, copy=True)
    if isinstance(value, Mapping):
        return {key: copy_of(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(copy_of(item, device, dtype) for item in value)
    return value


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a module computes; None if it is unknown."""
    quantized: torch.dtype | None = None
    skip: set[nn.Module] = set()
    for part in module.modules():
        if isinstance(part, QuantizedLinear | LinearQuant):
            skip.update(part.modules())
            quantized = quantized or getattr(part, "input_dtype", None)
        elif part not in skip:
            for parameter in part._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    return parameter.dtype
    return quantized
