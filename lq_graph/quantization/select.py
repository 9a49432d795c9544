"""Selects the nn.Linear layers of a model to quantize, and says why the others stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..errors import LinearQuantValueError
from ..modules.places import Place, held_elsewhere
from ..modules.replaceable import why_not_replaceable
from .choose import Choice, quantized_kinds
from .layer import LayerToQuantize, why_illegal

__all__ = [
    "FilterFn",
    "Places",
    "check_finite",
    "keep_tied",
    "not_refused",
    "survey",
]

FilterFn = Callable[[nn.Module, str], bool]
Places = dict[nn.Module, list[Place]]  # of `places_of`


def not_refused(layers: list[LayerToQuantize]) -> list[LayerToQuantize]:
    """The layers to quantize."""
    return [layer for layer in layers if not layer.refusal]


def survey(
    model: nn.Module, chosen: Mapping[str, Choice], filter_fn: FilterFn | None, places: Places
) -> list[LayerToQuantize]:
    """Every nn.Linear of a model, in order, with a refusal if it must stay float."""
    elsewhere = held_elsewhere(model)
    layers = [
        LayerToQuantize(name, module, chosen[name].scheme, places.get(module, []))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, quantized_kinds())
    ]
    for layer in layers:
        layer.refusal = chosen[layer.name].why or _why_not(layer, filter_fn) or why_illegal(layer)
        if not layer.refusal and layer.source in elsewhere:
            layer.refusal = f"{elsewhere[layer.source]} holds it too and would keep the float one"
    return layers


def keep_tied(model: nn.Module, layers: list[LayerToQuantize]) -> None:
    """Refuse layers that share their weight with something that stays float."""
    floats = set(model.modules()) - {layer.source for layer in not_refused(layers)}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if module in floats:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
    for layer in not_refused(layers):
        if others := owners.get(id(layer.source.weight)):
            layer.refusal = f"it shares its weight with {', '.join(others)}, which stays float"


def _why_not(layer: LayerToQuantize, filter_fn: FilterFn | None) -> str:
    """Why a layer must stay float; empty if it can be quantized."""
    linear = layer.source
    if filter_fn is not None and not filter_fn(linear, layer.name):
        return "filter_fn leaves it"
    if why := why_not_replaceable(linear, nn.Linear, layer.places):
        return why
    if not layer.places:
        return "it is the model itself and cannot be replaced in place: put it in an nn.Sequential"
    for name, wanted in (("weight", (layer.n, layer.k)), ("bias", (layer.n,))):
        tensor = getattr(linear, name)
        if tensor is not None and (tuple(tensor.shape) != wanted or not tensor.numel()):
            return f"its {name} has shape {tuple(tensor.shape)}; {wanted} is needed"
    if linear.weight.is_meta:
        return "its weight is on meta: load the model first"
    for name, tensor in linear.named_parameters():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            return f"the memory of its {name} was freed: gather or load the model first"
    return ""


def check_finite(layer: LayerToQuantize) -> None:
    """Refuse a model whose layer holds NaN or infinity."""
    for name in ("weight", "bias"):
        tensor = getattr(layer.source, name)
        if tensor is None:
            continue
        bounds = torch.aminmax(tensor.detach())
        if not all(bound.isfinite() for bound in bounds):
            raise LinearQuantValueError(
                f"quantize: {layer.name}.{name} holds NaN or infinity; the model is unchanged. "
                "What to do: check how the model was loaded, or leave the layer float: "
                f"ignore=['{layer.name}']."
            )
