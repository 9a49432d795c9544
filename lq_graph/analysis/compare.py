"""compare(): a quantized model beside the float model it was made of, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.linear_quant import LinearQuant
from ..modules.quantized_linear import QuantizedLinear
from ..quantization.calibrate import call, check_batches, evaluating
from ..reports import table

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
            note = "worst" if layer is worst and layer.badness > -math.inf else ""
            rows.append([layer.name or "(model)", *cells, note if layer.calls else "never called"])
        final = self.output
        return "\n".join(
            [
                *table(rows),
                f"output: {final.sqnr:.1f} dB, cosine {final.cosine:.5f}, largest difference "
                f"{final.max_abs:.2e}",
                self._advice(worst, measured),
            ]
        )

    def _advice(self, worst: LayerError, measured: bool) -> str:
        """Which layer hurts, and what to do about it."""
        if worst.badness == -math.inf:
            exact = any(layer.calls for layer in self)
            return "no layer adds any error" if exact else "none of these layers was called"
        by = "makes most of the output's error" if measured else "adds most noise of its own"
        if math.isinf(worst.badness):
            by = "gives NaN, infinity or nothing but noise"
        return (
            f"{worst.name or 'the model'} {by}; to leave it float: "
            f"lq_graph.quantize(..., filter_fn=lambda module, name: name != {worst.name!r})"
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


LayerFilter = Callable[[nn.Module, str], bool]


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
    pairs = _pairs(model_a, model_b, layers)
    rectified = _rectified(model_a, model_b)
    own = {name: _Sums() for name in pairs}
    accumulated = {name: _Sums() for name in pairs}
    final = _Sums()
    batches: list[Any] = []
    finals: list[Tensor] = []

    def pick(out: Any) -> Tensor:
        return _checked(output(out)) if output else _first_float(out)

    with evaluating(model_a), evaluating(model_b):
        for batch in tqdm(inputs, "comparing", unit="batch", disable=None):
            if sensitivity:
                batches.append(_copy(batch))  # a loader may fill the same tensors again
            kept: dict[str, list[Tensor]] = {name: [] for name in pairs}

            def see(
                name: str, out_a: Any, out_b: Any, kept: dict[str, list[Tensor]] = kept
            ) -> None:
                a, b = pairs[name]
                reference = _as_float(a, _tensor_of(name, out_a))
                if b in rectified:
                    reference = torch.relu(reference)
                # a copy: what follows may change the output in place
                kept[name].append(reference.to("cpu", copy=True))
                own[name].add(name, kept[name][-1], _as_float(b, _tensor_of(name, out_b)))

            with _beside(pairs, see):
                result_a = pick(call(model_a, _for(model_a, batch))).to("cpu", copy=True)
            left = {name: iter(outputs) for name, outputs in kept.items()}
            with ExitStack() as hooks:
                for name, (_, b) in pairs.items():
                    measure = _measure_accumulated(name, accumulated[name], left[name])
                    hooks.callback(b.register_forward_hook(measure).remove)
                result_b = pick(call(model_b, _for(model_b, batch)))
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
    all_a = dict(model_a.named_modules())
    all_b = dict(model_b.named_modules(remove_duplicate=False))
    if layers is None:
        names = _differing(all_a, all_b)
    elif callable(layers):
        names = [name for name, a in all_a.items() if name in all_b and layers(a, name)]
    elif isinstance(layers, str) or not isinstance(layers, Iterable):
        raise LinearQuantTypeError(
            f"compare: layers is {layers!r}; allowed are names, or a function of a module and its "
            "name. What to do: pass a list of names of model_a.named_modules()."
        )
    else:
        wanted = list(layers)
        if missing := [name for name in wanted if name not in all_a or name not in all_b]:
            raise LinearQuantValueError(
                f"compare: layers has {missing[0]!r}, which is not in both models. What to do: use "
                "names of model_a.named_modules()."
            )
        names = [name for name in all_a if name in wanted]
    if not names:
        raise LinearQuantValueError(
            "compare: no layers to compare: no module of one name differs in class between the "
            "models, or `layers` takes none. What to do: pass the float model and its quantized "
            "copy, or name layers."
        )
    return {name: (all_a[name], all_b[name]) for name in names}


def _differing(all_a: dict[str, nn.Module], all_b: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that are of another class in the other model."""
    names = [
        name
        for name, a in all_a.items()
        if name in all_b
        and type(a) is not type(all_b[name])
        and not isinstance(all_b[name], nn.Identity)  # a ReLU that a layer took over
        and (name or len(all_a) == 1)  # not the whole model, unless it is one layer
    ]
    # what is inside a replaced layer need not be in its replacement
    inside = tuple(f"{name}." for name in names)
    if missing := [n for n in all_a if n not in all_b and not n.startswith(inside)]:
        raise LinearQuantValueError(
            f"compare: model_a has a module {missing[0]!r} and model_b has none of that name. What "
            "to do: pass the float model and its quantized copy, neither of them wrapped in "
            "something else, or name layers that both have."
        )
    return names


def _rectified(model_a: nn.Module, model_b: nn.Module) -> set[nn.Module]:
    """Layers of model_b whose int8 output begins at zero, in place of the ReLU that model_a has
    after them; quantize leaves an Identity there."""
    all_b = dict(model_b.named_modules(remove_duplicate=False))
    found: set[nn.Module] = set()
    for name, parent in model_a.named_modules():
        other = all_b.get(name)
        if isinstance(parent, nn.Sequential) and isinstance(other, nn.Sequential):
            for first, second in pairwise(parent._modules):
                layer, after = other._modules.get(first), other._modules.get(second)
                if (
                    type(parent._modules[second]) is nn.ReLU
                    and isinstance(after, nn.Identity)
                    and isinstance(layer, QuantizedLinear)
                    and layer.output_scale is not None
                ):
                    found.add(layer)
    return found


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
                outputs.append(b(*_for(b, args), **_for(b, kwargs)))
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
    name: str, sums: _Sums, references: Iterator[Tensor]
) -> Callable[..., None]:
    def hook(module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        reference = next(references, None)
        if reference is None:
            raise _other_calls(name, "more")
        sums.add(name, reference, _as_float(module, _tensor_of(name, out)))

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
        reference = _tensor_of(name, out_a)
        other = _as_float(pairs[name][1], _tensor_of(name, out_b))
        other = other.to(reference.device, reference.dtype)
        if isinstance(out_a, Tensor):
            return other
        values = [other, *out_a[1:]]
        return type(out_a)(*values) if hasattr(out_a, "_fields") else type(out_a)(values)

    found = {}
    for name, pair in tqdm(pairs.items(), "each layer alone", unit="layer", disable=None):
        sums = _Sums()
        with _beside({name: pair}, replace):
            for batch, reference in zip(batches, finals, strict=True):
                sums.add("the output", reference, pick(call(model, _for(model, batch))))
        found[name] = sums.error()
    return found


def _as_float(layer: nn.Module, out: Tensor) -> Tensor:
    """int8 between quantized layers, as the numbers it stands for."""
    return layer.to_float(out) if isinstance(layer, QuantizedLinear) else out


def _tensor_of(name: str, out: Any) -> Tensor:
    """A layer's output: a tensor, or the first of a tuple."""
    first = out[0] if isinstance(out, tuple | list) and out else out
    if not isinstance(first, Tensor):
        raise LinearQuantTypeError(
            f"compare: {name} gives {type(first).__name__}; allowed are a tensor or a tuple that "
            "begins with one. What to do: leave the layer out with `layers`."
        )
    return first


def _first_float(out: Any) -> Tensor:
    """The first float tensor in what a model returns."""
    values = out.values() if isinstance(out, Mapping) else out
    for value in values if isinstance(values, Iterable) and not isinstance(out, Tensor) else [out]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise LinearQuantTypeError(
        f"compare: the models return {type(out).__name__} without a float tensor. What to do: pass "
        "output=, a function that picks the tensor to compare."
    )


def _checked(picked: Any) -> Tensor:
    if not isinstance(picked, Tensor):
        raise LinearQuantTypeError(
            f"compare: output= returned {type(picked).__name__}; allowed is a tensor. What to do: "
            "let it pick the tensor to compare from what the model returns."
        )
    return picked


def _for(module: nn.Module, value: Any) -> Any:
    """Arguments on a module's device, floats in its dtype, all copied."""
    return _copy(value, _device_of(module), _dtype_of(module))


def _copy(value: Any, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """The tensors of a batch, copied, floats to a dtype; a container becomes a plain one."""
    if isinstance(value, Tensor):
        wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to(device or value.device, wanted, copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_copy(item, device, dtype) for item in value)
    return value


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
