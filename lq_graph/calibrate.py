"""Calibration: the ranges of the activations a model sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import LinearQuantTypeError, LinearQuantValueError

__all__ = ["Range", "call", "check_batches", "evaluating", "observe_inputs"]


class Range:
    """The smallest and the largest value seen, 0 included; whether all were finite; of how many
    batches."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.finite = True
        self.batches = 0

    def add(self, x: Tensor) -> None:
        """Take a batch in. NaN and infinity clear `finite`."""
        if x.numel():
            low, high = (bound.item() for bound in torch.aminmax(x.detach()))
            self.finite = self.finite and math.isfinite(low) and math.isfinite(high)
            self.low, self.high = min(self.low, low), max(self.high, high)
            self.batches += 1


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with one element of an iterable of inputs: a mapping by keyword, a tuple or list
    by position, a tensor as the only argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    raise LinearQuantTypeError(
        f"inputs hold a {type(inputs).__name__}; allowed are a tensor, a tuple or list of "
        "positional arguments, or a mapping of keyword arguments. What to do: wrap it in a tuple."
    )


def check_batches(function: str, name: str, batches: object) -> None:
    """Refuse what is one input, or none, in the place of an iterable of inputs: a tensor is an
    iterable too, of its rows, and a mapping of its keys.

    Raises:
        LinearQuantTypeError: naming the function and the argument.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise LinearQuantTypeError(
            f"{function}: {name} is a {type(batches).__name__}; allowed is an iterable of inputs. "
            "What to do: pass [inputs]."
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def observe_inputs(
    model: nn.Module, layers: Iterable[nn.Module], batches: Iterable[Any]
) -> dict[nn.Module, Range]:
    """Run a model and note the range of each layer's input.

    Args:
        model: float; left as it was, whatever happens.
        layers: those to watch, modules of the model that take one tensor.
        batches: what the model is called with, one at a time; see `call`.

    Raises:
        LinearQuantTypeError: something that is no input.
        LinearQuantValueError: no batches.
    """
    ranges = {layer: Range() for layer in layers}

    def watch(layer: nn.Module) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: ranges[layer].add(args[0])

    hooks = [layer.register_forward_pre_hook(watch(layer)) for layer in ranges]
    count = 0
    try:
        with evaluating(model):
            # None: no bar where the output is no terminal
            for inputs in tqdm(batches, "calibrating", unit="batch", disable=None):
                call(model, inputs)
                count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise LinearQuantValueError(
            "quantize: calibration has no inputs. What to do: pass a few batches of what the model "
            "will see."
        )
    return ranges
