"""compare(): a quantized model beside the float model it was made of, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .calibrate import call, evaluating
from .errors import LinearQuantTypeError, LinearQuantValueError
from .module import LinearQuant
from .quantized_linear import QuantizedLinear
from .text import table

__all__ = ["Comparison", "Error", "LayerError", "compare"]


@dataclass(frozen=True)
class Error:
    """How far a tensor is from its reference, over all batches.

    Attributes:
        sqnr: signal to quantization noise in dB, 10 log10(sum a^2 / sum (a - b)^2); infinite for
            equal tensors, NaN where one of them holds NaN or infinity.
        max_abs: the largest |a - b|.
        cosine: of the flattened tensors.
    """

    sqnr: float
    max_abs: float
    cosine: float

    @property
    def badness(self) -> float:
        """A number to find the worst by: NaN is worse than any noise."""
        return math.inf if math.isnan(self.sqnr) else -self.sqnr

    def cells(self) -> list[object]:
        """As a table shows it."""
        return [f"{self.sqnr:.1f}", f"{self.max_abs:.2e}", f"{self.cosine:.5f}"]


@dataclass(frozen=True)
class LayerError:
    """One layer of the two models.

    Attributes:
        name: qualified name.
        calls: how often the reference called it.
        own: the quantized layer's output on the reference's input: its own fault alone. None if it
            was never called.
        accumulated: the outputs of the two in their own models, with all that came before.
        sensitivity: the reference model's final output when this layer alone is quantized; None
            unless it was asked for.
    """

    name: str
    calls: int
    own: Error | None
    accumulated: Error | None
    sensitivity: Error | None = None

    @property
    def badness(self) -> float:
        """A number to find the worst layer by."""
        error = self.sensitivity or self.own
        return -math.inf if error is None else error.badness


class Comparison(list[LayerError]):
    """What compare found, a layer each in the order of the model; prints as a table.

    Attributes:
        output: error of the models' final outputs.
    """

    def __init__(self, layers: Iterable[LayerError], output: Error) -> None:
        super().__init__(layers)
        self.output = output

    @property
    def worst(self) -> LayerError:
        """The layer that hurts most: by sensitivity where that was measured, else by its own
        error."""
        return max(self, key=lambda layer: layer.badness)

    def __str__(self) -> str:
        measured = any(layer.sensitivity for layer in self)
        kinds = ["own", "in its model", *(["output if alone"] if measured else [])]
        head = ["layer", *(f"{kind} {what}" for kind in kinds for what in ("dB", "max", "cosine"))]
        rows: list[list[object]] = [[*head, ""]]
        worst = self.worst
        for layer in self:
            errors = [layer.own, layer.accumulated, *([layer.sensitivity] if measured else [])]
            cells = [c for error in errors for c in (error.cells() if error else ["-", "-", "-"])]
            note = "never called" if not layer.calls else "worst" if layer is worst else ""
            rows.append([layer.name, *cells, note])
        final = self.output
        by = "makes most of the output's error" if measured else "adds most noise of its own"
        return "\n".join(
            [
                *table(rows),
                f"output: {final.sqnr:.1f} dB, cosine {final.cosine:.5f}, largest difference "
                f"{final.max_abs:.2e}",
                f"{worst.name} {by}; to leave it float: "
                f"quantize(..., filter_fn=lambda module, name: name != {worst.name!r})",
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Save the errors as a picture; the format is that of the path's ending, PNG or SVG.

        Raises:
            LinearQuantValueError: matplotlib is missing.
        """
        from .compare_plot import save

        save(self, Path(path))


class _Sums:
    """The running sums behind an Error, in float64."""

    def __init__(self) -> None:
        self.calls = 0
        self.signal = self.noise = self.other = self.product = self.largest = 0.0

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        if a.shape != b.shape:
            raise LinearQuantValueError(
                f"compare: {name} gives {tuple(a.shape)} in model_a and {tuple(b.shape)} in "
                "model_b. What to do: compare models of one architecture."
            )
        self.calls += 1
        if not a.numel():
            return
        difference = a - b
        self.signal += a.square().sum().item()
        self.other += b.square().sum().item()
        self.noise += difference.square().sum().item()
        self.product += (a * b).sum().item()
        largest = difference.abs().max().item()
        self.largest = max(self.largest, largest) if largest == largest else largest

    def error(self) -> Error:
        if not math.isfinite(self.noise):
            return Error(math.nan, self.largest, math.nan)
        if not self.noise:
            return Error(math.inf, 0.0, 1.0)
        sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        length = math.sqrt(self.signal * self.other)
        return Error(sqnr, self.largest, self.product / length if length else 0.0)


LayerFilter = Callable[[str, nn.Module], bool]


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
    batches and model_a's final outputs as well. Nothing is left behind in the models.

    Args:
        model_a: the reference; any device and dtype.
        model_b: with modules of the same names; any device and dtype.
        inputs: what the models are called with, one batch each: a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. Moved to each model's device, floats to its
            dtype.
        layers: (qualified name of a layer, model_a's module) to whether to compare it, or names;
            default: those whose class differs between the two.
        output: picks the tensor to compare from what a model returns; default its first float one.
        sensitivity: measure also what each layer alone does to the final output. One run of model_a
            for each layer.

    Returns:
        A Comparison: a list with one `LayerError` for each layer.

    Raises:
        LinearQuantValueError: no layers to compare, no inputs, or shapes that differ.
        LinearQuantTypeError: inputs that are none, or an output without a float tensor.
    """
    if model_a is model_b:
        raise LinearQuantValueError(
            "compare: model_a and model_b are one object. What to do: quantize a copy.deepcopy."
        )
    pairs = _pairs(model_a, model_b, layers)
    own = {name: _Sums() for name in pairs}
    accumulated = {name: _Sums() for name in pairs}
    final = _Sums()
    batches: list[Any] = []
    finals: list[Tensor] = []
    pick = output or _first_float
    with evaluating(model_a), evaluating(model_b):
        for batch in tqdm(inputs, "comparing", unit="batch", disable=None):
            kept: dict[str, list[Tensor]] = {name: [] for name in pairs}
            with ExitStack() as hooks:
                for name, (a, b) in pairs.items():
                    hook = _measure_own(name, b, own[name], kept[name])
                    hooks.callback(a.register_forward_hook(hook).remove)
                result_a = pick(call(model_a, _for(model_a, batch)))
            with ExitStack() as hooks:
                for name, (_, b) in pairs.items():
                    measure = _measure_accumulated(name, accumulated[name], kept[name])
                    hooks.callback(b.register_forward_hook(measure).remove)
                result_b = pick(call(model_b, _for(model_b, batch)))
            final.add("the output", result_a, result_b)
            if sensitivity:
                batches.append(batch)
                finals.append(result_a.cpu())
        if not final.calls:
            raise LinearQuantValueError(
                "compare: inputs is empty. What to do: pass a few batches of what the model sees."
            )
        alone = _sensitivities(model_a, pairs, batches, finals, pick) if sensitivity else {}

    def error(sums: _Sums) -> Error | None:
        return sums.error() if sums.calls else None

    return Comparison(
        [
            LayerError(n, own[n].calls, error(own[n]), error(accumulated[n]), alone.get(n))
            for n in pairs
        ],
        final.error(),
    )


def _pairs(
    model_a: nn.Module, model_b: nn.Module, layers: LayerFilter | Iterable[str] | None
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The layers to compare, by name, in the order of model_a."""
    all_a, all_b = dict(model_a.named_modules()), dict(model_b.named_modules())
    if layers is None:
        names = [
            name
            for name, a in all_a.items()
            if name in all_b
            and type(a) is not type(all_b[name])
            and not isinstance(all_b[name], nn.Identity)  # a ReLU that a layer took over
        ]
    elif callable(layers):
        names = [name for name, a in all_a.items() if name in all_b and layers(name, a)]
    else:
        names = list(layers)
        if missing := [name for name in names if name not in all_a or name not in all_b]:
            raise LinearQuantValueError(
                f"compare: layers has {missing[0]!r}, which is not in both models. What to do: use "
                "names of model_a.named_modules()."
            )
    if not names:
        raise LinearQuantValueError(
            "compare: no layers to compare: no module of one name differs in class between the "
            "models, or `layers` takes none. What to do: pass the float model and its quantized "
            "copy, or name layers."
        )
    return {name: (all_a[name], all_b[name]) for name in names}


def _measure_own(name: str, b: nn.Module, sums: _Sums, kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        a_out = _tensor_of(out)
        kept.append(_as_float(_module, a_out).cpu())
        sums.add(name, kept[-1], _as_float(b, _tensor_of(b(*_for(b, args)))))

    return hook


def _measure_accumulated(name: str, sums: _Sums, kept: list[Tensor]) -> Callable[..., None]:
    calls: Iterator[Tensor] = iter(kept)

    def hook(module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        reference = next(calls, None)
        if reference is not None:
            sums.add(name, reference, _as_float(module, _tensor_of(out)))

    return hook


def _sensitivities(
    model: nn.Module,
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    batches: list[Any],
    finals: list[Tensor],
    pick: Callable[[Any], Tensor],
) -> dict[str, Error]:
    """The error of the final output with one layer replaced, for each layer in turn."""
    found = {}
    for name, (a, b) in tqdm(pairs.items(), "each layer alone", unit="layer", disable=None):

        def replace(_module: nn.Module, args: tuple[Any, ...], out: Any, b: nn.Module = b) -> Any:
            reference = _tensor_of(out)
            other = _as_float(b, _tensor_of(b(*_for(b, args))))
            other = other.to(reference.device, reference.dtype)
            return other if isinstance(out, Tensor) else type(out)([other, *out[1:]])

        sums = _Sums()
        with ExitStack() as hooks:
            hooks.callback(a.register_forward_hook(replace).remove)
            for batch, reference in zip(batches, finals, strict=True):
                sums.add("the output", reference, pick(call(model, _for(model, batch))))
        found[name] = sums.error()
    return found


def _as_float(layer: nn.Module, out: Tensor) -> Tensor:
    """int8 between quantized layers, as the numbers it stands for."""
    return layer.to_float(out) if isinstance(layer, QuantizedLinear) else out


def _tensor_of(out: Any) -> Tensor:
    """A layer's output: a tensor, or the first of a tuple."""
    first = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(first, Tensor):
        raise LinearQuantTypeError(
            f"compare: a layer gives {type(first).__name__}; allowed are a tensor or a tuple that "
            "begins with one. What to do: leave the layer out with `layers`."
        )
    return first


def _first_float(out: Any) -> Tensor:
    """The first float tensor in what a model returns."""
    values = out.values() if isinstance(out, Mapping) else out
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise LinearQuantTypeError(
        "compare: the models return no float tensor. What to do: pass output=, a function that "
        "picks the tensor to compare."
    )


def _for(module: nn.Module, value: Any) -> Any:
    """Arguments on a module's device, floats in its dtype; a container becomes a plain one."""
    device, dtype = _device_of(module), _dtype_of(module)

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            same = not value.is_floating_point() or dtype is None
            return value.to(device) if same else value.to(device, dtype)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(move(item) for item in value)
        return value

    return move(value)


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype a module computes in; None where nothing tells."""
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
