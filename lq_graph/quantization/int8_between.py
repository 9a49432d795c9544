"""Pairs of layers between which activations can stay int8."""

from __future__ import annotations

from collections import Counter

from torch import nn

from ..modules.replaceable import why_not_replaceable
from .layer import LayerToQuantize
from .schemes import A8W8Static
from .select import Places

__all__ = ["connect", "sequentials"]


def sequentials(model: nn.Module) -> list[nn.Sequential]:
    """Every plain nn.Sequential. When it is called, only the next module gets the output of each of
    its modules."""
    return [m for m in model.modules() if type(m) is nn.Sequential and "forward" not in vars(m)]


def connect(
    plain: list[nn.Sequential],
    layers: list[LayerToQuantize],
    places: Places,
    calls: Counter[nn.Module],
) -> None:
    """Set `next`, `takes_int8` and `fused_relu` of layers between which activations can stay int8:
    neighbours in an nn.Sequential that is called as a whole. A model may also call the modules of
    an nn.Sequential one by one, like those of a list; such neighbours are not connected.

    Args:
        plain: from `sequentials`.
        layers: the layers that are quantized; static ones whose scheme says so are connected.
        places: where the model holds each module.
        calls: how often calibration called each module.
    """
    by_layer: dict[nn.Module, LayerToQuantize] = {
        layer.source: layer
        for layer in layers
        if isinstance(layer.scheme, A8W8Static) and layer.scheme.int8_between
    }

    def only_by_sequentials(module: nn.Module) -> bool:
        parents = [parent for parent, _ in places[module]]
        return set(parents).issubset(plain) and calls[module] == sum(calls[p] for p in parents)

    for parent in plain:
        children = list(parent._modules.items())
        for (_, child), *rest in (children[i:] for i in range(len(children) - 1)):
            relu = None
            if type(rest[0][1]) is nn.ReLU and len(rest) > 1:
                relu = rest[0][1]
                place = (parent, rest[0][0])
                rest = rest[1:]
            first, second = (by_layer.get(m) for m in (child, rest[0][1]) if m is not None)
            if first is None or second is None or len(first.places) + len(second.places) > 2:
                continue
            between = [first.source, second.source] if relu is None else [child, relu, rest[0][1]]
            if not all(only_by_sequentials(m) for m in between if m is not None):
                continue
            if relu is not None and why_not_replaceable(relu, nn.ReLU):
                continue
            # if the int8 range begins at 0, its clamp does what the ReLU does
            if relu is None or second.input_offset == -128:
                first.next, second.takes_int8 = second, True
                first.fused_relu = place if relu is not None else None
