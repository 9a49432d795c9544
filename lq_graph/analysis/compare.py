"""compare(): a quantized model beside the float model it was made of, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LinearQuantValueError
from ..quantization.calibrate import call, check_batches, evaluating
from .compare_pairs import LayerFilter, layers_with_relu, pairs_of
from .compare_tensors import as_float, check_picked, copy_of, first_float, inputs_for, tensor_of
from .comparison import Comparison, LayerError
from .metrics import Error, RunningErrors

__all__ = ["compare"]


def compare(
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Iterable[Any],
    *,
    layers: LayerFilter | Iterable[str] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    sensitivity: bool = False,
) -> Comparison:
    """Compare a quantized model with its float model, layer by layer, and find the layer that
    hurts.

    Each batch goes through model_a, then through model_b, in evaluation mode and without
    gradients. Kept are the outputs of the compared layers for one batch; with sensitivity, the
    batches and model_a's final outputs as well. Nothing is left behind in the models, and both get
    copies of the inputs, so what one does to them in place the other does not see.

    A layer whose int8 range took over the ReLU after it (see quantize) is compared with what the
    reference has after that ReLU.

    Args:
        model_a: the reference; any device and dtype.
        model_b: with modules of the same names; any device and dtype.
        inputs: an iterable, read once, of what the models are called with, one batch each: a
            tensor, a tuple of positional arguments or a mapping of keyword arguments. Moved to each
            model's device, floats to its dtype.
        layers: (model_a's module, its qualified name) to whether to compare it, or names;
            default: those whose class differs between the two.
        output: picks the tensor to compare from what a model returns; default its first float one.
        sensitivity: measure also what each layer alone does to the final output. One run of model_a
            for each layer.

    Returns:
        A Comparison: a list with one `LayerError` for each layer.

    Raises:
        LinearQuantValueError: no layers to compare, no inputs, or module names, shapes or numbers
            of calls that differ.
        LinearQuantTypeError: inputs that are none, or an output without a float tensor.
    """
    if model_a is model_b:
        raise LinearQuantValueError(
            "compare: model_a and model_b are one object. What to do: quantize a copy.deepcopy."
        )
    check_batches("compare", "inputs", inputs)
    pairs = pairs_of(model_a, model_b, layers)
    rectified = layers_with_relu(model_a, model_b)
    own = {name: RunningErrors() for name in pairs}
    accumulated = {name: RunningErrors() for name in pairs}
    final = RunningErrors()
    batches: list[Any] = []
    finals: list[Tensor] = []

    def pick(out: Any) -> Tensor:
        return check_picked(output(out)) if output else first_float(out)

    with evaluating(model_a), evaluating(model_b):
        for batch in tqdm(inputs, "comparing", unit="batch", disable=None):
            if sensitivity:
                batches.append(copy_of(batch))  # a loader may fill the same tensors again
            kept: dict[str, list[Tensor]] = {name: [] for name in pairs}

            def see(
                name: str, out_a: Any, out_b: Any, kept: dict[str, list[Tensor]] = kept
            ) -> None:
                a, b = pairs[name]
                reference = as_float(a, tensor_of(name, out_a))
                if b in rectified:
                    reference = torch.relu(reference)
                # a copy: what follows may change the output in place
                kept[name].append(reference.to("cpu", copy=True))
                own[name].add(name, kept[name][-1], as_float(b, tensor_of(name, out_b)))

            with _beside(pairs, see):
                result_a = pick(call(model_a, inputs_for(model_a, batch))).to("cpu", copy=True)
            left = {name: iter(outputs) for name, outputs in kept.items()}
            with ExitStack() as hooks:
                for name, (_, b) in pairs.items():
                    measure = _measure_accumulated(name, accumulated[name], left[name])
                    hooks.callback(b.register_forward_hook(measure).remove)
                result_b = pick(call(model_b, inputs_for(model_b, batch)))
            for name, rest in left.items():
                if next(rest, None) is not None:
                    raise _other_calls(name, "fewer")
            final.add("the output", result_a, result_b)
            if sensitivity:
                finals.append(result_a)
        if not final.calls:
            raise LinearQuantValueError(
                "compare: inputs is empty. What to do: pass a few batches of what the model sees."
            )
        called = {name: pair for name, pair in pairs.items() if own[name].calls}
        alone = _sensitivities(model_a, called, batches, finals, pick) if sensitivity else {}

    def error(sums: RunningErrors) -> Error | None:
        return sums.error() if sums.calls else None

    return Comparison(
        [
            LayerError(n, own[n].calls, error(own[n]), error(accumulated[n]), alone.get(n))
            for n in pairs
        ],
        final.error(),
    )


@contextmanager
def _beside(
    pairs: dict[str, tuple[nn.Module, nn.Module]], seen: Callable[[str, Any, Any], Any]
) -> Iterator[None]:
    """While model_a runs: whenever one of its layers is called, call the other model's with the
    same arguments, then seen(name, output of a, output of b). What `seen` returns, unless None,
    takes the place of a's output."""
    running = False  # a layer of model_b, which may hold the one of model_a it stands for

    def watch(name: str, a: nn.Module, b: nn.Module) -> Iterator[Callable[[], None]]:
        outputs: list[Any] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal running
            if running:
                return
            running = True
            try:
                # first, for a may change its input in place
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
    name: str, sums: RunningErrors, references: Iterator[Tensor]
) -> Callable[..., None]:
    def hook(module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        reference = next(references, None)
        if reference is None:
            raise _other_calls(name, "more")
        sums.add(name, reference, as_float(module, tensor_of(name, out)))

    return hook


def _other_calls(name: str, word: str) -> LinearQuantValueError:
    return LinearQuantValueError(
        f"compare: model_b calls {name} {word} times than model_a does for the same batch, so "
        "their outputs cannot be paired. What to do: leave the layer out with `layers`."
    )


def _sensitivities(
    model: nn.Module,
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    batches: list[Any],
    finals: list[Tensor],
    pick: Callable[[Any], Tensor],
) -> dict[str, Error]:
    """The error of the final output with one layer replaced, for each layer in turn."""

    def replace(name: str, out_a: Any, out_b: Any) -> Any:
        reference = tensor_of(name, out_a)
        other = as_float(pairs[name][1], tensor_of(name, out_b))
        other = other.to(reference.device, reference.dtype)
        if isinstance(out_a, Tensor):
            return other
        values = [other, *out_a[1:]]
        return type(out_a)(*values) if hasattr(out_a, "_fields") else type(out_a)(values)

    found = {}
    for name, pair in tqdm(pairs.items(), "each layer alone", unit="layer", disable=None):
        sums = RunningErrors()
        with _beside({name: pair}, replace):
            for batch, reference in zip(batches, finals, strict=True):
                sums.add("the output", reference, pick(call(model, inputs_for(model, batch))))
        found[name] = sums.error()
    return found
