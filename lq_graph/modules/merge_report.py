"""What merge did to a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..reports import table

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
    """What merge did, one line for each group; prints as a table.

    Attributes:
        left_alone: the layers that were not merged, each with the reason.
    """

    def __init__(self, groups: Iterable[MergedGroup], left_alone: Iterable[LeftAlone]) -> None:
        super().__init__(groups)
        self.left_alone = list(left_alone)

    def __str__(self) -> str:
        lines = []
        if self:
            head = ["layers", "", "k", "n", ""]
            rows = [
                [
                    _together(group.names),
                    group.kind,
                    group.k,
                    " + ".join(map(str, group.sizes)),
                    "" if group.changed else "as it was",
                ]
                for group in self
            ]
            lines += table([head, *rows])
        if self.left_alone:
            alone = [[layer.name, layer.why] for layer in self.left_alone]
            lines += table([["left alone", "why"], *alone])
        before = sum(len(group.names) for group in self)
        merged = f"layers merged: {before} into {len(self)}" if self else "nothing to merge"
        return "\n".join([*lines, f"{merged}; left alone: {len(self.left_alone)}"])


def _together(names: Sequence[str]) -> str:
    """Names with what they begin with in common said once."""
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) > 1 or parents == {""}:
        return ", ".join(names)
    return f"{parents.pop()}: {', '.join(name.rpartition('.')[2] for name in names)}"
