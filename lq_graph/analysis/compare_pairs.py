"""Which layers of two models are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import nn

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.merged import MergedPart
from ..modules.quantized_linear import QuantizedLinear
from ..quantization.choose import quantized_kinds

__all__ = ["LayerFilter", "layers_with_relu", "pairs_of"]

LayerFilter = Callable[[nn.Module, str], bool]


def pairs_of(
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
        raise LinearQuantValueError(_why_none(all_a, all_b, layers is None))
    pairs = {name: (all_a[name], all_b[name]) for name in names}
    _check_order(pairs, all_b)
    return pairs


def _why_none(all_a: dict[str, nn.Module], all_b: dict[str, nn.Module], by_class: bool) -> str:
    if not by_class:
        return (
            "compare: no layers to compare: `layers` chooses none. What to do: pass names of "
            "model_a.named_modules(), or leave it out."
        )
    kinds = quantized_kinds()
    quantized = any(isinstance(module, kinds) for module in [*all_a.values(), *all_b.values()])
    state = "both are quantized" if quantized else "neither is quantized"
    return (
        "compare: no layers to compare: every module has the same class in both models; "
        f"{state}. What to do: quantize a copy.deepcopy of the float model, and pass the float "
        "model first; or name layers."
    )


def _check_order(
    pairs: dict[str, tuple[nn.Module, nn.Module]], all_b: dict[str, nn.Module]
) -> None:
    """Check that the float model is the first.

    Raises:
        LinearQuantValueError: it is the second.
    """
    kinds = quantized_kinds()
    swapped = [
        name
        for name, (a, b) in pairs.items()
        if isinstance(a, kinds) and isinstance(b, nn.Linear) and not isinstance(b, kinds)
    ]
    if swapped and not any(isinstance(b, kinds) for b in all_b.values()):
        raise LinearQuantValueError(
            f"compare: {swapped[0]} is quantized in model_a and float in model_b, so the models "
            "are in the wrong order. What to do: compare(float_model, quantized_model, inputs)."
        )


def _differing(all_a: dict[str, nn.Module], all_b: dict[str, nn.Module]) -> list[str]:
    """Names of the modules whose class differs between the models."""
    names = [
        # eagerly, the whole layer is called, and not the part that it holds of a merged weight
        name.rpartition(".")[0] if MergedPart in (type(a), type(all_b[name])) else name
        for name, a in all_a.items()
        if name in all_b
        and type(a) is not type(all_b[name])
        and not isinstance(all_b[name], nn.Identity)  # a ReLU that an int8 range replaces
        and (name or len(all_a) == 1)  # not the whole model, unless it is one layer
    ]
    # a replacement may lack the modules inside the layer that it replaces
    inside = tuple(f"{name}." for name in names)
    if missing := [n for n in all_a if n not in all_b and not n.startswith(inside)]:
        raise LinearQuantValueError(
            f"compare: model_a has a module {missing[0]!r} and model_b has none of that name. What "
            "to do: pass the float model and its quantized copy, neither of them wrapped in "
            "something else, or name layers that both have."
        )
    return names


def layers_with_relu(model_a: nn.Module, model_b: nn.Module) -> set[nn.Module]:
    """Layers of model_b whose int8 range replaces the ReLU that model_a has after them; quantize
    leaves an Identity in the ReLU's place."""
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
