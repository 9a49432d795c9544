"""compare(): the errors of a quantized model against its float model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LinearQuantValueError
from ..modules.inputs import copy_of, inputs_for
from ..modules.runs import call, evaluating
from ..quantization.calibrate import check_batches
from .compare_pairs import LayerFilter, layers_with_relu, pairs_of
from .compare_plot import check_plot
from .compare_tensors import as_float, check_picked, first_float, tensor_of
from .comparison import Comparison, LayerComparison
from .metrics import ErrorMetrics, MetricSums

__all__ = ["compare"]


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Iterable[Any],
    *,
    layers: LayerFilter | Iterable[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    sensitivity: bool = False,
    plot: str | Path | None = None,
) -> Comparison:
    """Compare a quantized model with its float model, layer by layer, and find the worst layer.

    Each batch goes through model_a, then through model_b, in evaluation mode and without gradients.
    The outputs of the compared layers are kept for one batch; with sensitivity, all batches and
    model_a's final outputs are kept too. The models are unchanged afterwards. Each model gets a
    copy of the inputs, so it may change them in place.

    If `quantize` fused a ReLU into the int8 range of the layer before it, that layer is compared
    with the output of the reference's ReLU.

    Args:
        model_a: the reference; any device and dtype.
        model_b: with modules of the same names; any device and dtype.
        inputs: an iterable of what the models are called with, one batch each: a tensor, a tuple of
            positional arguments or a mapping of keyword arguments. It is read once. Tensors are
            moved to each model's device, and float tensors are cast to its dtype.
        layers: names of layers, or a function of a module of model_a and its name that returns
            whether to compare it; default: the modules whose class differs between the models.
        output: a function that picks the tensor to compare from what a model returns; default: the
            first float tensor.
        sensitivity: also measure how each layer alone changes the final output. It runs model_a
            once for each layer.
        plot: also save a picture, as `Comparison.plot` does. Whether that is possible is checked
            before the models run.

    Returns:
        A Comparison: a list with one `LayerComparison` for each layer, with errors in dB.

    Raises:
        LinearQuantValueError: no layers to compare, no inputs, the models in the wrong order, a
            picture that cannot be saved, or module names, shapes or numbers of calls that differ.
        LinearQuantTypeError: inputs or layers of another type, or an output without a float tensor.

    Source: the formulas are in `ErrorMetrics`.
    """
    if model_a is model_b:
        raise LinearQuantValueError(
            "compare: model_a and model_b are one object. What to do: quantize a copy.deepcopy."
        )
    if plot is not None:
        check_plot(plot)
    check_batches("compare", "inputs", inputs)
    run = _Run(model_a, model_b, pairs_of(model_a, model_b, layers), output)
    batches: list[Any] = []
    references: list[Tensor] = []
    with evaluating(model_a), evaluating(model_b):
        for batch in tqdm(inputs, "comparing", unit="batch", disable=None):
            if sensitivity:
                batches.append(copy_of(batch))  # a loader may fill the same tensors again
            reference = run.add(batch)
            if sensitivity:
                references.append(reference)
        if not run.final.calls:
            raise LinearQuantValueError(
                "compare: inputs is empty. What to do: pass a few batches of what the model sees."
            )
        alone = run.sensitivities(batches, references) if sensitivity else {}
    comparison = run.comparison(alone)
    if plot is not None:
        comparison.plot(plot)
    return comparison


class _Run:
    """The two models, and the errors measured so far.

    Attributes:
        final: of the models' final outputs.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        pairs: dict[str, tuple[nn.Module, nn.Module]],
        output: Callable[[Any], Tensor] | None,
    ) -> None:
        self._a, self._b, self._pairs, self._output = model_a, model_b, pairs, output
        self._with_relu = layers_with_relu(model_a, model_b)
        self._own = {name: MetricSums() for name in pairs}
        self._accumulated = {name: MetricSums() for name in pairs}
        self.final = MetricSums()

    def add(self, batch: Any) -> Tensor:
        """Run both models on a batch; returns model_a's final output, on the CPU."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self._pairs}

        def measure_own(name: str, out_a: Any, out_b: Any) -> None:
            a, b = self._pairs[name]
            reference = as_float(a, tensor_of(name, out_a))
            if b in self._with_relu:
                reference = torch.relu(reference)
            # a copy: later modules may change the output in place
            outputs[name].append(reference.to("cpu", copy=True))
            self._own[name].add(name, outputs[name][-1], as_float(b, tensor_of(name, out_b)))

        with _beside(self._pairs, measure_own):
            reference = self._pick(call(self._a, inputs_for(self._a, batch))).to("cpu", copy=True)
        unpaired = {name: iter(tensors) for name, tensors in outputs.items()}
        with ExitStack() as hooks:
            for name, (_, b) in self._pairs.items():
                measure = _measure_accumulated(name, self._accumulated[name], unpaired[name])
                hooks.callback(b.register_forward_hook(measure).remove)
            result = self._pick(call(self._b, inputs_for(self._b, batch)))
        for name, rest in unpaired.items():
            if next(rest, None) is not None:
                raise _other_calls(name, "fewer")
        self.final.add("the output", reference, result)
        return reference

    def sensitivities(
        self, batches: list[Any], references: list[Tensor]
    ) -> dict[str, ErrorMetrics]:
        """For each layer that was called: the error of model_a's final output if only this layer is
        replaced."""

        def replace(name: str, out_a: Any, out_b: Any) -> Any:
            reference = tensor_of(name, out_a)
            other = as_float(self._pairs[name][1], tensor_of(name, out_b))
            other = other.to(reference.device, reference.dtype)
            if isinstance(out_a, Tensor):
                return other
            values = [other, *out_a[1:]]
            return type(out_a)(*values) if hasattr(out_a, "_fields") else type(out_a)(values)

        called = {name: pair for name, pair in self._pairs.items() if self._own[name].calls}
        found = {}
        for name, pair in tqdm(called.items(), "each layer alone", unit="layer", disable=None):
            sums = MetricSums()
            with _beside({name: pair}, replace):
                for batch, reference in zip(batches, references, strict=True):
                    result = self._pick(call(self._a, inputs_for(self._a, batch)))
                    sums.add("the output", reference, result)
            found[name] = sums.metrics()
        return found

    def comparison(self, alone: dict[str, ErrorMetrics]) -> Comparison:
        """The result, with what `sensitivities` found."""

        def metrics(sums: MetricSums) -> ErrorMetrics | None:
            return sums.metrics() if sums.calls else None

        return Comparison(
            [
                LayerComparison(
                    name,
                    own.calls,
                    metrics(own),
                    metrics(self._accumulated[name]),
                    alone.get(name),
                )
                for name, own in self._own.items()
            ],
            self.final.metrics(),
        )

    def _pick(self, out: Any) -> Tensor:
        """The tensor to compare in the return value of a model."""
        return check_picked(self._output(out)) if self._output else first_float(out)


@contextmanager
def _beside(
    pairs: dict[str, tuple[nn.Module, nn.Module]], seen: Callable[[str, Any, Any], Any]
) -> Iterator[None]:
    """While model_a runs, call for each of its layers the layer of model_b with the same arguments,
    and then seen(name, output of a, output of b).

    If `seen` returns a value, it replaces the output of model_a's layer.
    """
    running = False  # a layer of model_b, which may itself hold and call the layer of model_a

    def watch(name: str, a: nn.Module, b: nn.Module) -> Iterator[Callable[[], None]]:
        outputs: list[Any] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal running
            if running:
                return
            running = True
            try:
                # first, because a may change its input in place
                outputs.append(b(*inputs_for(b, args), **inputs_for(b, kwargs)))
            finally:
                running = False

        def after(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> Any:
            return None if running else seen(name, out, outputs.pop())

        yield a.register_forward_pre_hook(before, with_kwargs=True).remove
        yield a.register_forward_hook(after).remove

    with ExitStack() as hooks:
        for name, (a, b) in pairs.items():
            for remove in watch(name, a, b):
                hooks.callback(remove)
        yield


def _measure_accumulated(
    name: str, sums: MetricSums, references: Iterator[Tensor]
) -> Callable[..., None]:
    def hook(module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        reference = next(references, None)
        if reference is None:
            raise _other_calls(name, "more")
        sums.add(name, reference, as_float(module, tensor_of(name, out)))

    return hook


def _other_calls(name: str, word: str) -> LinearQuantValueError:
    return LinearQuantValueError(
        f"compare: model_b calls {name} {word} times than model_a for the same batch, so their "
        "outputs cannot be paired. What to do: leave the layer out with `layers`."
    )
