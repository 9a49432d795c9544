"""Calibration: the ranges of the activations a model sees."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.transaction import evaluating, uninterrupted

__all__ = [
    "Range",
    "Seen",
    "call",
    "check_batches",
    "observe",
    "restore_forward",
]


class Range:
    """The range of the values seen.

    Attributes:
        low, high: the smallest and the largest value, 0 included.
        finite: whether all values were finite.
        batches: how many batches there were.
    """

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.finite = True
        self.batches = 0

    def add(self, x: Tensor) -> None:
        """Add a batch. NaN and infinity clear `finite`."""
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
    """Refuse one input, or something else, instead of an iterable of inputs. A tensor is an
    iterable of its rows, and a mapping is an iterable of its keys, so without this check they would
    not fail.

    Raises:
        LinearQuantTypeError: naming the function and the argument.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise LinearQuantTypeError(
            f"{function}: {name} is a {type(batches).__name__}; allowed is an iterable of inputs. "
            "What to do: pass [inputs]."
        )


class Seen:
    """What was seen while a model ran.

    Attributes:
        ranges: of each layer's inputs.
        calls: how often each watched module was called.
        read: by layer, the operator that read its weight while the layer did not run.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.ranges = {layer: Range() for layer in layers}
        self.calls: Counter[nn.Module] = Counter()
        self.read: dict[nn.Module, str] = {}


def observe(
    model: nn.Module,
    name: str,
    batches: Iterable[Any],
    layers: Iterable[nn.Module],
    others: Iterable[nn.Module] = (),
) -> Seen:
    """Run a model, and record the ranges of its layers' inputs and who else reads their weights.

    Compiled parts run eagerly here, because graphs that were traced before do not call the watched
    forwards. Ctrl-C waits for the end of a batch.

    Args:
        model: float; unchanged afterwards, also after an error.
        name: of the argument that holds the batches, for the messages.
        batches: what the model is called with, one at a time; see `call`.
        layers: those to watch, modules of the model that take one tensor and have a weight.
        others: modules whose calls are counted.

    Raises:
        LinearQuantTypeError: an input that a model cannot be called with.
        LinearQuantValueError: no batches.
    """
    seen = Seen(layers)
    running: list[nn.Module] = []
    count = 0
    with uninterrupted() as may_end, ExitStack() as undo:
        for module in [*seen.ranges, *others]:
            undo.callback(restore_forward, module, vars(module).get("forward"))
            vars(module)["forward"] = _watched(module, seen, running)
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(_Reads(seen, running))
        # None: no progress bar if the output is not a terminal
        for inputs in tqdm(batches, "calibrating", unit="batch", disable=None):
            call(model, inputs)
            count += 1
            may_end()
    if not count:
        raise LinearQuantValueError(
            f"quantize: {name} has no inputs. What to do: pass a few batches of what the model "
            "will see."
        )
    return seen


def _watched(module: nn.Module, seen: Seen, running: list[nn.Module]) -> Callable[..., Any]:
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.calls[module] += 1
        if module in seen.ranges:
            seen.ranges[module].add(args[0] if args else kwargs["input"])
        running.append(module)
        try:
            return forward(*args, **kwargs)
        finally:
            running.pop()

    return watched


def restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is not None:
        vars(module)["forward"] = own
    else:
        vars(module).pop("forward", None)


class _Reads(TorchDispatchMode):
    """Records operators that read the weight of a layer while the layer does not run. Reading its
    dtype, shape or device is not an operator."""

    def __init__(self, seen: Seen, running: list[nn.Module]) -> None:
        super().__init__()
        self._seen, self._running = seen, running
        self._layers: dict[int, list[nn.Module]] = {}
        for layer in seen.ranges:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            self._layers.setdefault(weight.data_ptr(), []).append(layer)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            # by its memory: weight.data is another object
            if type(leaf) in (Tensor, nn.Parameter) and leaf.layout == torch.strided:
                layers = self._layers.get(leaf.data_ptr(), ())
                if not any(layer in self._running for layer in layers):
                    for layer in layers:
                        self._seen.read.setdefault(layer, str(func))
        return func(*args, **kwargs)
