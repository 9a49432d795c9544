"""The result of compare(): one line for each layer, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..reports import table
from .metrics import ErrorMetrics

__all__ = ["Comparison", "LayerComparison"]

_LEGEND = (
    "dB: signal to quantization noise, more is better: 20 dB is an error of 10 %, 40 dB of 1 %",
    "own: on the float model's input; in its model: with the errors of the layers before it",
)
_LEGEND_ALONE = "output if alone: the float model's output when only this layer is quantized"


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
    def severity(self) -> float:
        """A number to sort by, larger is worse: of `sensitivity` if measured, else of `own`."""
        error = self.sensitivity or self.own
        return -math.inf if error is None else error.severity


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

    def __str__(self) -> str:
        measured = any(layer.sensitivity for layer in self)
        kinds = ["own", "in its model", *(["output if alone"] if measured else [])]
        head = ["layer", *(f"{kind} {what}" for kind in kinds for what in ("dB", "max", "cosine"))]
        rows: list[list[object]] = [[*head, ""]]
        worst = self.worst
        for layer in self:
            errors = [layer.own, layer.accumulated, *([layer.sensitivity] if measured else [])]
            cells = [c for error in errors for c in (error.cells() if error else ["-", "-", "-"])]
            note = "worst" if layer is worst and layer.severity > -math.inf else ""
            rows.append([layer.name or "(model)", *cells, note if layer.calls else "never called"])
        final = self.output
        return "\n".join(
            [
                *table(rows),
                *_LEGEND,
                *([_LEGEND_ALONE] if measured else []),
                f"output: {final.sqnr:.1f} dB, cosine {final.cosine:.5f}, largest difference "
                f"{final.max_abs:.2e}",
                self._advice(worst, measured),
            ]
        )

    def _advice(self, worst: LayerComparison, measured: bool) -> str:
        """Which layer is the worst, and how to leave it float."""
        if worst.severity == -math.inf:
            exact = any(layer.calls for layer in self)
            return "no layer adds any error" if exact else "none of these layers was called"
        does = "changes the output most when only it is quantized"
        if not measured:
            does = "has the largest error of its own"
        if math.isinf(worst.severity):
            does = "gives NaN, infinity or nothing but noise"
        return (
            f"{worst.name or 'the model'} {does}; to leave it float: "
            f"lq_graph.quantize(..., ignore=[{worst.name!r}])"
        )

    def plot(self, path: str | Path) -> None:
        """Save the errors as a picture.

        Args:
            path: of the file; its suffix, .png or .svg for example, selects the format.

        Raises:
            LinearQuantValueError: matplotlib is not installed.
        """
        from .compare_plot import save

        save(self, Path(path))
