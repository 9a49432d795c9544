"""What compare() found: a line for each layer, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..reports import table
from .metrics import Error

__all__ = ["Comparison", "LayerError"]


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
