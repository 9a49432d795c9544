"""The layers of a Comparison by kind and depth: model.layers.7.mlp.up_proj is of kind mlp.up_proj,
at depth 7."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .comparison import LayerComparison

__all__ = ["Grid", "grid_of", "kind_and_depth"]

_MODEL = "(model)"


@dataclass(frozen=True)
class Grid:
    """Rows and columns of a picture.

    Attributes:
        stack: what all the repeated layers are in, such as model.layers; empty if they are in
            several, which the kinds then name.
        kinds: one for each row, in the order of the model.
        depths: one for each column, sorted; None, the first if there is one, for layers outside
            every stack.
        cells: the layers at (row, column); several if a number stands after the depth, as that of
            an expert.
    """

    stack: str
    kinds: tuple[str, ...]
    depths: tuple[int | None, ...]
    cells: dict[tuple[int, int], tuple[LayerComparison, ...]]


def kind_and_depth(name: str) -> tuple[str, str, int | None]:
    """The stack that a layer is in, its kind, and its depth, the first number in its name; "", the
    name itself and None if there is no number. Further numbers are * in the kind."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            kind = ".".join("*" if rest.isdigit() else rest for rest in parts[place + 1 :])
            return ".".join(parts[:place]), kind, int(part)
    return "", name or _MODEL, None


def grid_of(layers: Iterable[LayerComparison]) -> Grid:
    """The layers, by kind and depth."""
    found = [(layer, *kind_and_depth(layer.name)) for layer in layers]
    stacks = {stack for _, stack, _, depth in found if depth is not None}
    depths = {depth for *_, depth in found}
    numbers = sorted(depth for depth in depths if depth is not None)
    columns = [*([None] if None in depths else []), *numbers]
    rows: dict[str, int] = {}
    cells: dict[tuple[int, int], tuple[LayerComparison, ...]] = {}
    for layer, stack, kind, depth in found:
        label = kind
        if depth is not None and (len(stacks) > 1 or not kind):
            label = ".".join(part for part in (stack, "*", kind) if part)
        row = rows.setdefault(label, len(rows))
        place = (row, columns.index(depth))
        cells[place] = (*cells.get(place, ()), layer)
    stack = stacks.pop() if len(stacks) == 1 else ""
    return Grid(stack, tuple(rows), tuple(columns), cells)
