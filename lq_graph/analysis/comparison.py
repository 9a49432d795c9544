"""The result of compare(): one line for each layer, as text, as JSON and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from ..reports import styled, table, wrapped
from .compare_grid import grid_of
from .metrics import ErrorMetrics

__all__ = ["WORST", "Comparison", "LayerComparison"]

WORST = 10  # as many are named
_LEGEND = (
    "dB: signal to quantization noise, more is better: 20 dB is an error of 10 %, 40 dB of 1 %; "
    "exact: no error at all",
    "own: of the layer's output on the float model's input; in model: in the quantized model, with "
    "the errors of the layers before it",
)
_LEGEND_ALONE = "alone: of the float model's output when only this layer is quantized"


@dataclass(frozen=True)
class LayerComparison:
    """One layer of the two models.

    Attributes:
        name: qualified name.
        calls: how often the reference called it.
        own: error of the quantized layer's output on the reference's input, without the errors of
            the layers before it. None if it was never called.
        accumulated: error of the layer's output in the quantized model, with those errors.
        sensitivity: error of the reference model's final output when only this layer is quantized;
            None unless it was asked for.
    """

    name: str
    calls: int
    own: ErrorMetrics | None
    accumulated: ErrorMetrics | None
    sensitivity: ErrorMetrics | None = None

    @property
    def ranked(self) -> ErrorMetrics | None:
        """The error by which layers are ranked: `sensitivity` if measured, else `own`."""
        return self.sensitivity or self.own

    @property
    def severity(self) -> float:
        """A number to sort by, larger is worse: of `ranked`."""
        return -math.inf if self.ranked is None else self.ranked.severity

    def as_json(self) -> dict[str, Any]:
        """The attributes, each error as `ErrorMetrics.as_json` gives it."""
        errors = ("own", "accumulated", "sensitivity")
        return {
            "name": self.name,
            "calls": self.calls,
            **{error: (e := getattr(self, error)) and e.as_json() for error in errors},
        }


class Comparison(list[LayerComparison]):
    """What compare found, one line for each layer in the order of the model; prints as a table.

    Attributes:
        output: error of the model's final output.
    """

    def __init__(self, layers: Iterable[LayerComparison], output: ErrorMetrics) -> None:
        super().__init__(layers)
        self.output = output

    @property
    def worst(self) -> LayerComparison:
        """The layer with the largest severity."""
        return max(self, key=lambda layer: layer.severity)

    @property
    def has_sensitivity(self) -> bool:
        """Whether the layers are ranked by `sensitivity`, and not by `own`."""
        return any(layer.sensitivity for layer in self)

    def ranking(self) -> list[LayerComparison]:
        """The layers that add an error, the worst first."""
        wrong = [layer for layer in self if layer.severity > -math.inf]
        return sorted(wrong, key=lambda layer: -layer.severity)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, everything: bool = False) -> str:
        """As tables that fit the terminal.

        Args:
            everything: every layer, in the order of the model, with the whole name; otherwise, of
                more than ten, the ten worst, and a line for each kind of layer.
        """
        width = 0 if everything else None
        if everything or len(self) <= WORST:
            lines = table(self.rows(self), width=width)
        else:
            worst = self.ranking()[:WORST]
            lines = [f"{len(self):,} layers, by kind", *table(self._kinds(), "  ")]
            if worst:
                lines += ["", f"the {len(worst)} worst", *table(self.rows(worst), "  ")]
        # styled after it was laid out
        lines = [styled(line, "worst") if line.endswith("  worst") else line for line in lines]
        for legend in (*_LEGEND, *([_LEGEND_ALONE] if self.has_sensitivity else [])):
            lines += wrapped(legend, "  ")
        if self.ranking():
            lines += wrapped(f"max, cosine, worst: by {self.measure}", "  ")
        lines += wrapped(f"output: {self.output}", "  ")
        return "\n".join([*lines, *wrapped(self._advice(), "  ")])

    @property
    def measure(self) -> str:
        """What "worst" means."""
        if self.has_sensitivity:
            return "the error of the model's output when only this layer is quantized"
        return "the layer's own error, on the float model's input"

    def rows(self, layers: Iterable[LayerComparison]) -> list[list[object]]:
        """A table of layers, its head first."""
        alone = self.has_sensitivity
        names = ["own dB", "in model dB", *(["alone dB"] if alone else []), "max", "cosine"]
        rows: list[list[object]] = [["layer", *names, ""]]
        worst = self.worst
        for layer in layers:
            errors = [layer.own, layer.accumulated, *([layer.sensitivity] if alone else [])]
            cells: list[object] = [error.decibels if error else "-" for error in errors]
            by = layer.ranked
            cells += [f"{by.max_abs:.2e}", f"{by.cosine:.5f}"] if by else ["-", "-"]
            note = "worst" if layer is worst and layer.severity > -math.inf else ""
            rows.append([layer.name or "(model)", *cells, note if layer.calls else "never called"])
        return rows

    def _kinds(self) -> list[list[object]]:
        """A table of the kinds of layers, its head first."""
        grid = grid_of(self)
        rows: list[list[object]] = [["kind", "layers", "worst dB", "at", "median dB", "exact"]]
        for row, kind in enumerate(grid.kinds):
            found = [
                (layer, grid.depths[column])
                for (at, column), layers in grid.cells.items()
                if at == row
                for layer in layers
            ]
            ranked = [(layer.ranked, depth) for layer, depth in found if layer.ranked]
            if not ranked:
                rows.append([kind, len(found), "never called", "", "", 0])
                continue
            error, depth = max(ranked, key=lambda one: one[0].severity)
            # NaN, the worst, sorts as if it were minus infinity
            middle = median_low(-error.severity for error, _ in ranked)
            exact = sum(error.is_exact for error, _ in ranked)
            at = "" if depth is None or len(found) == 1 else str(depth)
            shown = "exact" if middle == math.inf else f"{middle:.1f}"
            rows.append([kind, len(found), error.decibels, at, shown, exact])
        return rows

    def _advice(self) -> str:
        """Which layer is the worst, and how to leave it float."""
        worst = self.worst
        if worst.severity == -math.inf:
            if not any(layer.calls for layer in self):
                return "none of these layers was called"
            return "the models give equal numbers here: no layer adds any error"
        does = "changes the output most when only it is quantized"
        if not self.has_sensitivity:
            does = "has the largest error of its own"
        if math.isinf(worst.severity):
            does = "gives NaN, infinity or nothing but noise"
        return (
            f"{worst.name or 'the model'} {does}; to leave it float: "
            f"lq_graph.quantize(..., ignore=[{worst.name!r}])"
        )

    def as_json(self) -> dict[str, Any]:
        """The structure that docs/quantize.md describes."""
        worst = self.worst
        return {
            "structure": 1,
            "output": self.output.as_json(),
            "worst": worst.name if worst.severity > -math.inf else None,
            "worst_by": "sensitivity" if self.has_sensitivity else "own",
            "layers": [layer.as_json() for layer in self],
        }

    def plot(self, path: str | Path) -> None:
        """Save the errors as a picture: kinds of layers by depth, and the ten worst by name.

        Args:
            path: of the file; its suffix selects the format: .png, .svg, .pdf or another that
                matplotlib writes, or .html for a page with picture and table.

        Raises:
            LinearQuantValueError: matplotlib is not installed, or it does not write that format,
                or there is no such folder.
        """
        from .compare_plot import check_plot, save

        check_plot(path)
        save(self, Path(path))
