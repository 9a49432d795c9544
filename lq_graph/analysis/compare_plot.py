"""The picture of a Comparison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LinearQuantValueError

if TYPE_CHECKING:
    from .comparison import Comparison
    from .metrics import ErrorMetrics

__all__ = ["save"]

# Okabe and Ito's colours, which colour-blind readers can tell apart
_SERIES = {
    "own": ("on the float model's input", "#0072B2", "o"),
    "accumulated": ("in its model", "#E69F00", "s"),
    "sensitivity": ("the output, if only this layer is quantized", "#009E73", "D"),
}
_WORST = "#D55E00"
_LABELS = 70  # names: more cannot be read


def save(comparison: Comparison, path: Path) -> None:
    """Draw SQNR per layer, in the order of the model, top to bottom."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LinearQuantValueError(
            "compare: a plot needs matplotlib. What to do: pip install matplotlib."
        ) from None

    count = len(comparison)
    figure = Figure(figsize=(9, min(1.9 + 0.21 * count, 18)), layout="constrained", dpi=130)
    axes = figure.add_subplot()
    rows = range(count)
    top = _top(comparison)
    spread = [_values(comparison, name, top) for name in _SERIES]
    for row in rows:
        seen = [values[row] for values in spread if not math.isnan(values[row])]
        if len(seen) > 1:
            axes.plot([min(seen), max(seen)], [row, row], color="#d9d9d9", lw=1.2, zorder=1)
    for values, (label, color, marker) in zip(spread, _SERIES.values(), strict=True):
        if not all(math.isnan(value) for value in values):
            size = 26 if count <= _LABELS else 12
            axes.scatter(values, rows, s=size, c=color, marker=marker, label=label, zorder=2)

    worst = comparison.index(comparison.worst)
    axes.axhspan(worst - 0.5, worst + 0.5, color=_WORST, alpha=0.13, lw=0, zorder=0)
    step = -(-count // _LABELS)
    shown = sorted({*range(0, count, step), worst} - (_near(worst, step) if step > 1 else set()))
    axes.set_yticks(shown, [comparison[row].name for row in shown], fontsize=7.5)
    for tick, row in zip(axes.get_yticklabels(), shown, strict=True):
        if row == worst:
            tick.set_color(_WORST)
            tick.set_fontweight("bold")
    axes.set_ylim(count - 0.3, -0.7)
    axes.set_xlabel(
        "signal to quantization noise, dB (more is better; 20 dB: error of 10 %, 40 dB: 1 %)"
    )
    axes.grid(axis="x", color="#ececec", zorder=0)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize=8,
        handletextpad=0.2,
    )
    output = comparison.output
    figure.suptitle(
        f"Output: {output.sqnr:.1f} dB, cosine {output.cosine:.5f}. Worst layer: "
        f"{comparison.worst.name}",
        fontsize=10.5,
    )
    figure.savefig(path)


def _near(row: int, step: int) -> set[int]:
    """Rows whose names would overlap the worst layer's."""
    return set(range(row - step + 1, row + step)) - {row}


def _errors(comparison: Comparison, name: str) -> list[ErrorMetrics | None]:
    return [getattr(layer, name) for layer in comparison]


def _top(comparison: Comparison) -> float:
    """The position of an infinite SQNR in the picture: beyond the largest finite one."""
    finite = [
        error.sqnr
        for name in _SERIES
        for error in _errors(comparison, name)
        if error and math.isfinite(error.sqnr)
    ]
    return max(finite, default=0.0) + 5


def _values(comparison: Comparison, name: str, top: float) -> list[float]:
    """SQNR of each layer; NaN, which is not drawn, if there is none."""
    values = []
    for error in _errors(comparison, name):
        value = math.nan if error is None else error.sqnr
        values.append(min(max(value, -top), top) if not math.isnan(value) else value)
    return values
