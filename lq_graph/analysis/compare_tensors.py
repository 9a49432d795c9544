"""The tensors to compare in what models and layers return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import LinearQuantTypeError
from ..modules.quantized_linear import QuantizedLinear

__all__ = ["as_float", "check_picked", "first_float", "tensor_of"]


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
