"""What architectures.py measured, and the file that keeps it: a line of JSON for each architecture,
from which docs/_ext/tables.py makes the tables of docs/architectures.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["RESULTS", "Measured", "Outcome", "read", "write"]

RESULTS = Path(__file__).with_name("architectures.jsonl")
EVERYWHERE = ("shapes", "equal_quantizations", "npu_operators", "equal_calls")


class Outcome(NamedTuple):
    """A fusion: at how many places it was done; or left, and why."""

    fusion: str
    places: int
    why_not: str


@dataclass
class Measured:
    """One architecture.

    Attributes:
        name, note: of the table of architectures.
        attention: as transformers names it.
        layers: linear layers of a decoder layer, by their kind.
        cosines: by "mode way", of the worst token of the prompt and of the step.
        kernels: by "mode way", of a decoder layer in a step.
        equal: by mode, whether exact fusions changed no bit of a step.
        step, prompt: by mode, what fused: in a layer of a step; in all of a prompt.
        errors: by mode why there is no result, or by "" why there is none at all.
    """

    name: str
    note: str
    attention: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    cosines: dict[str, list[float]] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    equal: dict[str, bool] = field(default_factory=dict)
    step: dict[str, list[Outcome]] = field(default_factory=dict)
    prompt: dict[str, list[Outcome]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, line: str | bytes) -> Measured:
        """From JSON."""
        found: dict[str, Any] = json.loads(line)
        for key in ("step", "prompt"):
            by_mode = found[key].items()
            found[key] = {mode: [Outcome(*one) for one in outcomes] for mode, outcomes in by_mode}
        return cls(**found)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def updated(self, other: Measured) -> Measured:
        """With newer results, which may be of other ways."""
        kept = replace(other)
        for name in ("cosines", "kernels", "equal", "step", "prompt"):
            setattr(kept, name, {**getattr(self, name), **getattr(other, name)})
        return kept

    @property
    def worst(self) -> float:
        """The least cosine."""
        return min(value for values in self.cosines.values() for value in values)

    def __str__(self) -> str:
        lines = [f"{self.name}, attention {self.attention}, {self.layers}"]
        lines += [f"  {mode} {error}" for mode, error in self.errors.items()]
        for key, values in self.cosines.items():
            cosines = ", ".join(f"{value:.5f}" for value in values)
            lines.append(f"  {key}: cosine {cosines}, kernels {self.kernels.get(key, '-')}")
        lines += [f"  {mode}: exact is unfused: {same}" for mode, same in self.equal.items()]
        for title, by_mode in (("step", self.step), ("prompt", self.prompt)):
            for mode, found in by_mode.items():
                lines.append(f"  {title}, {mode}: {_done(found)}")
                lines += [f"    left {n} {name}: {why}" for name, n, why in found if why]
        return "\n".join(lines)


def _done(found: Sequence[Outcome]) -> str:
    fused = [one for one in found if not one.why_not and one.fusion not in EVERYWHERE]
    return ", ".join(f"{one.places} {one.fusion}" for one in fused)


def read(path: Path) -> dict[str, Measured]:
    """The results of a file, by name."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {one.name: one for one in map(Measured.of, lines)}


def write(path: Path, found: Iterable[Measured]) -> None:
    """Replace a file's results."""
    path.write_text("".join(f"{one.to_json()}\n" for one in found))
