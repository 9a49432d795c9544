"""Quantized layers that are equal, as one: model.layers.[0-63].mlp.down_proj, 64 times."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..rules.tables import dtype_name

if TYPE_CHECKING:
    from .explanation import LayerExplanation

__all__ = ["LayerGroup", "fold", "folded_names", "pattern_of_name"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a name that is a number


@dataclass(frozen=True)
class LayerGroup:
    """Equal layers: one row, one set of shapes, dtypes and formats, the same GE nodes, and names
    that differ in numbers only.

    Attributes:
        layers: in order of the calls.
    """

    layers: tuple[LayerExplanation, ...]

    @property
    def first(self) -> LayerExplanation:
        """One of them."""
        return self.layers[0]

    @property
    def name(self) -> str:
        """Their names as one."""
        return folded_names(layer.name or "(model)" for layer in self.layers)

    @property
    def sizes(self) -> str:
        """m x k x n, behind the batch."""
        p = self.first.plan
        return "".join(f"{size} x " for size in p.output_shape[:-2]) + f"{p.m} x {p.k} x {p.n}"

    @property
    def row(self) -> str:
        """The dtypes in short: "int8 > bf16"."""
        p = self.first.plan
        names = {"bfloat16": "bf16", "float16": "fp16"}
        output = dtype_name(p.output_dtype)
        return f"{'int4' if p.int4 else 'int8'} > {names.get(output, output)}"

    @property
    def key(self) -> tuple[str, str]:
        """Equal if the GE nodes are, ours and the vendor's."""
        return str(self.first.ours), str(self.first.vendor)


def fold(layers: Iterable[LayerExplanation]) -> tuple[LayerGroup, ...]:
    """Equal layers together, in order of the first calls."""
    groups: dict[tuple[object, ...], list[LayerExplanation]] = {}
    for layer in layers:
        tensors = str([(name, str(spec)) for name, spec in layer.tensors.items()])
        key = (
            pattern_of_name(layer.name),
            layer.plan.row.source,
            layer.plan.output_dtype,
            layer.plan.output_shape,
            layer.weight_format,
            tensors,
            str(layer.ours),
            str(layer.vendor),
        )
        groups.setdefault(key, []).append(layer)
    return tuple(LayerGroup(tuple(group)) for group in groups.values())


def pattern_of_name(name: str) -> str:
    """A name with * for its numbers; only names with one pattern can be folded."""
    return _NUMBER.sub("*", name)


def folded_names(names: Iterable[str]) -> str:
    """Names that differ in numbers only as one: "layers.[0-2, 5].mlp". A number that differs is *
    if the names are not all that the ranges would give."""
    different = list(dict.fromkeys(names))
    parts = list(zip(*(name.split(".") for name in different), strict=True))
    counts = [len(set(part)) for part in parts]
    expected = 1
    for count in counts:
        expected *= count
    shown = []
    for part, count in zip(parts, counts, strict=True):
        if count == 1:
            shown.append(part[0])
        elif expected == len(different):
            shown.append(f"[{_ranges(sorted({int(p) for p in part}))}]")
        else:
            shown.append("*")
    return ".".join(shown)


def _ranges(numbers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
