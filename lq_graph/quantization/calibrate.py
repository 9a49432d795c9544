"""Calibration: the ranges of the activations a model sees."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.inputs import inputs_for
from ..modules.runs import Forward, call, running
from ..modules.transaction import uninterrupted

__all__ = [
    "Range",
    "Seen",
    "check_batches",
    "observe",
    "run",
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

    Args:
        model: float; unchanged afterwards, also after an error.
        name: of the argument that holds the batches, for the messages.
        batches: what the model is called with, one at a time; see `runs.call`.
        layers: those to watch, modules of the model that take one tensor and have a weight.
        others: modules whose calls are counted.

    Raises:
        LinearQuantTypeError: an input that a model cannot be called with.
        LinearQuantValueError: no batches.
    """
    seen = Seen(layers)
    inside: list[nn.Module] = []
    forwards = {module: _watched(module, seen, inside) for module in [*seen.ranges, *others]}
    run(model, batches, f"quantize: {name} has no inputs", forwards, _Reads(seen, inside))
    return seen


def run(
    model: nn.Module,
    batches: Iterable[Any],
    empty: str,
    forwards: Mapping[nn.Module, Forward],
    mode: TorchDispatchMode,
    after: Callable[[Any], None] | None = None,
) -> None:
    """Run a model on each batch. Ctrl-C waits for the end of a batch.

    Args:
        model: unchanged afterwards, also after an error.
        batches: what it is called with; see `inputs_for`.
        empty: what to say if there are none.
        forwards: for the modules to watch, what is called instead of theirs.
        mode: watches the operators.
        after: gets what each run returned.

    Raises:
        LinearQuantTypeError: an input that a model cannot be called with.
        LinearQuantValueError: no batches.
    """
    count = 0
    with uninterrupted() as may_end, running(model, forwards), mode:
        # None: no progress bar if the output is not a terminal
        for inputs in tqdm(batches, "calibrating", unit="batch", disable=None):
            returned = call(model, inputs_for(model, inputs))
            if after is not None:
                after(returned)
            count += 1
            may_end()
    if not count:
        raise LinearQuantValueError(
            f"{empty}. What to do: pass a few batches of what the model will see."
        )


def _watched(module: nn.Module, seen: Seen, inside: list[nn.Module]) -> Forward:
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.calls[module] += 1
        if module in seen.ranges:
            seen.ranges[module].add(args[0] if args else kwargs["input"])
        inside.append(module)
        try:
            return forward(*args, **kwargs)
        finally:
            inside.pop()

    return watched


class _Reads(TorchDispatchMode):
    """Records operators that read the weight of a layer while the layer does not run. Reading its
    dtype, shape or device is not an operator."""

    def __init__(self, seen: Seen, inside: list[nn.Module]) -> None:
        super().__init__()
        self._seen, self._inside = seen, inside
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
                if not any(layer in self._inside for layer in layers):
                    for layer in layers:
                        self._seen.read.setdefault(layer, str(func))
        return func(*args, **kwargs)
