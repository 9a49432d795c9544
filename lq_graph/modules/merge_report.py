"""What merge did to a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..reports import counted, folded, pattern_of, table

__all__ = ["LeftAlone", "MergeReport", "MergedGroup"]


@dataclass(frozen=True)
class MergedGroup:
    """Layers that read one tensor, merged into one.

    Attributes:
        names: qualified names of the layers, in the order of their calls.
        kind: how they are quantized: "A8W8 dynamic", ...
        k: of all layers.
        sizes: n of each layer.
        changed: whether this call of merge did it; False if an earlier one did.
    """

    names: tuple[str, ...]
    kind: str
    k: int
    sizes: tuple[int, ...]
    changed: bool


@dataclass(frozen=True)
class LeftAlone:
    """A layer that was not merged, though others read its tensor or the run did not call it.

    Attributes:
        name: qualified name.
        why: the reason.
    """

    name: str
    why: str


class MergeReport(list[MergedGroup]):
    """What merge did, one line for each group; prints as a table, groups
    that are equal but for numbers in their names on one line.

    Attributes:
        left_alone: the layers that were not merged, each with the reason.
    """

    def __init__(self, groups: Iterable[MergedGroup], left_alone: Iterable[LeftAlone]) -> None:
        super().__init__(groups)
        self.left_alone = list(left_alone)

    def __str__(self) -> str:
        lines = []
        if self:
            rows: list[list[object]] = [["layers", "", "k", "n", ""]]
            for group in folded(self, lambda g: _together(g.names), _rest_of):
                first = group[0]
                rows.append(
                    [
                        counted([_together(g.names) for g in group]),
                        first.kind,
                        first.k,
                        " + ".join(map(str, first.sizes)),
                        "" if first.changed else "as it was",
                    ]
                )
            lines += table(rows)
        if self.left_alone:
            rows = [["left alone", "why"]]
            for alike in folded(self.left_alone, lambda layer: f"{layer.name}\n{layer.why}"):
                name = counted([layer.name for layer in alike])
                rows.append([name, pattern_of([layer.why for layer in alike])])
            lines += table(rows)
        before = sum(len(group.names) for group in self)
        merged = f"layers merged: {before} into {len(self)}" if self else "nothing to merge"
        return "\n".join([*lines, f"{merged}; left alone: {len(self.left_alone)}"])


def _rest_of(group: MergedGroup) -> tuple[object, ...]:
    """What groups on one line have in common."""
    return (group.kind, group.k, group.sizes, group.changed)


def _together(names: Sequence[str]) -> str:
    """Names with what they begin with in common said once."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1 or parents == {""}:
        return ", ".join(names)
    return f"{parents.pop()}: {', '.join(name.rpartition('.')[2] for name in names)}"
