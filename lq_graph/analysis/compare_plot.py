"""The picture of a Comparison: a map of its layers by kind and depth, and the worst by name."""

from __future__ import annotations

import html
import io
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LinearQuantValueError
from ..reports import table
from .compare_grid import Grid, grid_of

if TYPE_CHECKING:
    from .comparison import Comparison

__all__ = ["Cells", "cells_of", "check_plot", "save"]

_COLOURS = "viridis"  # ordered in lightness, also for colour-blind readers; it has no grey
_SPAN = 6.0  # dB that the colours span at least: a factor of two in the error
_EXACT, _BLANK = "#d5d5d5", "#ffffff"
_HATCHES = {"never called": "...", "NaN or only noise": "xxxx"}
_WORST = "#e8590c"  # the frame of the worst cells
# inches
_ROW, _WIDE, _NARROW, _MARGIN = 0.25, 0.52, 0.205, 0.25
_LABEL, _MONO = 0.068, 0.068  # of one character
_NUMBERED = 16  # so many columns have room for numbers


@dataclass(frozen=True)
class Cells:
    """What the map shows.

    Attributes:
        values: for each row, SQNR in dB at each column; NaN for what is not finite or not there.
        marks: by (row, column), of the others: "exact", "never called", "NaN or only noise".
        worst: by (row, column), the rank of its layer, 1 to 10; of several, the smallest.
    """

    values: list[list[float]]
    marks: dict[tuple[int, int], str]
    worst: dict[tuple[int, int], int]


def cells_of(comparison: Comparison, grid: Grid) -> Cells:
    """The cells of the map; one that stands for several layers shows the worst of them."""
    from .comparison import WORST

    values = [[math.nan] * len(grid.depths) for _ in grid.kinds]
    marks: dict[tuple[int, int], str] = {}
    rank = {id(layer): number for number, layer in enumerate(comparison.ranking()[:WORST], 1)}
    worst: dict[tuple[int, int], int] = {}
    for place, layers in grid.cells.items():
        row, column = place
        error = max(layers, key=lambda layer: layer.severity).ranked
        if error is None:
            called = [layer.ranked for layer in layers if layer.ranked]
            error = called[0] if called else None
        if error is None:
            marks[place] = "never called"
        elif error.is_exact:
            marks[place] = "exact"
        elif not math.isfinite(error.sqnr):
            marks[place] = "NaN or only noise"
        else:
            values[row][column] = error.sqnr
        if ranks := [rank[id(layer)] for layer in layers if id(layer) in rank]:
            worst[place] = min(ranks)
    return Cells(values, marks, worst)


def check_plot(path: str | Path) -> None:
    """Check that a picture can be written, before the work begins.

    Raises:
        LinearQuantValueError: matplotlib is not installed, or it does not write that format, or
            there is no such folder.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LinearQuantValueError(
            "compare: a plot needs matplotlib. What to do: pip install matplotlib."
        ) from None
    path = Path(path)
    formats = sorted({*Figure().canvas.get_supported_filetypes(), "html"})
    if path.suffix[1:].lower() not in formats:
        raise LinearQuantValueError(
            f"compare: plot is {str(path)!r}; its suffix must be one of .{', .'.join(formats)}."
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise LinearQuantValueError(f"compare: plot is {str(path)!r}: there is no folder for it")


def save(comparison: Comparison, path: Path) -> None:
    """Write the picture; the suffix of the file selects the format."""
    figure = _draw(comparison)
    if path.suffix.lower() != ".html":
        figure.savefig(path)
        return
    text = io.StringIO()
    figure.savefig(text, format="svg")
    picture = text.getvalue()
    picture = picture[picture.index("<svg") :]
    path.write_text(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><title>lq_graph compare</title>\n"
        "<style>body{margin:1em;background:#fff;color:#111}svg{max-width:100%;height:auto}"
        f"pre{{overflow-x:auto}}</style>\n{picture}\n"
        f"<pre>{html.escape(comparison.text(everything=True))}</pre>\n",
        encoding="utf-8",
    )


def _draw(comparison: Comparison) -> Any:
    from matplotlib.figure import Figure

    from .comparison import WORST

    grid = grid_of(comparison)
    cells = cells_of(comparison, grid)
    worst = comparison.ranking()[:WORST]
    listed = [f"{number:2}. {line}" if number else f"    {line}"
              for number, line in enumerate(table(comparison.rows(worst), width=0))]  # fmt: skip
    if not worst:
        listed = ["no layer adds any error"]

    column = _WIDE if len(grid.depths) <= _NUMBERED else _NARROW
    labels = _labels(grid)
    left = _MARGIN + 0.1 + _LABEL * max(map(len, labels))
    map_width, map_height = column * len(grid.depths), _ROW * len(grid.kinds)
    width = max(
        left + map_width + _MARGIN, 2 * _MARGIN + _MONO * max(map(len, listed)), left + 5.4, 7.5
    )
    title = _title(comparison, width)
    top = 0.3 + 0.19 * len(title)
    list_height = 0.17 * len(listed)
    axis_height = 0.15 if grid.depths == (None,) else 0.5
    height = top + map_height + axis_height + 1.0 + list_height + 0.15
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")

    def axes(x: float, y: float, w: float, h: float) -> Any:
        """Axes at inches from the left and the top."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    for number, line in enumerate(title):
        figure.text(
            _MARGIN / width,
            1 - (0.2 + 0.19 * number) / height,
            line,
            va="top",
            fontsize=10.5 if not number else 8.5,
            fontweight="bold" if not number else "normal",
        )
    below = top + map_height + axis_height
    _map(axes(left, top, map_width, map_height), grid, labels, cells, column)
    _legend(axes, left, below, cells)
    figure.text(
        _MARGIN / width,
        1 - (below + 0.75) / height,
        f"The {f'{len(worst)} ' * (len(worst) > 1)}worst, framed above" if worst else "",
        va="top",
        fontsize=9,
        fontweight="bold",
    )
    figure.text(
        _MARGIN / width,
        1 - (below + 1.0) / height,
        "\n".join(listed),
        va="top",
        fontsize=7.6,
        linespacing=1.35,
        family="monospace",
    )
    return figure


def _labels(grid: Grid) -> list[str]:
    """The kinds, and of how many layers a cell is the worst."""
    most = [1] * len(grid.kinds)
    for (row, _), layers in grid.cells.items():
        most[row] = max(most[row], len(layers))
    return [
        kind if count == 1 else f"{kind} (worst of {count})"
        for kind, count in zip(grid.kinds, most, strict=True)
    ]


def _title(comparison: Comparison, width: float) -> list[str]:
    """The head, and what the cells are, in lines that fit."""
    output = comparison.output
    decibels = output.decibels if output.is_exact else f"{output.decibels} dB"
    text = (
        "Each cell: signal to quantization noise in dB; more is better. Worst: by "
        f"{comparison.measure}."
    )
    columns = int((width - 2 * _MARGIN) / 0.075)
    return [
        f"Output of the quantized model: {decibels}, cosine {output.cosine:.5f}",
        *textwrap.wrap(text, columns),
    ]


def _map(axes: Any, grid: Grid, labels: list[str], cells: Cells, column: float) -> None:
    """The map of the cells that have a finite SQNR, and marks for the others."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    low, high = _range(cells)
    colours = colormaps[_COLOURS]
    axes.set_xlim(0, len(grid.depths))
    axes.set_ylim(len(grid.kinds), 0)
    for row, values in enumerate(cells.values):
        for place, value in enumerate(values):
            if (row, place) not in grid.cells:
                continue
            mark = cells.marks.get((row, place))
            colour: Any = _EXACT if mark == "exact" else _BLANK
            if mark is None:
                colour = colours((value - low) / (high - low))
                if column == _WIDE:
                    dark = value - low < 0.55 * (high - low)
                    axes.text(
                        place + 0.5,
                        row + 0.52,
                        f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="white" if dark else "black",
                    )
            axes.add_patch(
                Rectangle(
                    (place, row),
                    1,
                    1,
                    facecolor=colour,
                    edgecolor="#777777" if mark in _HATCHES else "white",
                    hatch=_HATCHES.get(mark or ""),
                    linewidth=0.5,
                )
            )
    for row, place in cells.worst:
        inset = 0.06
        axes.add_patch(
            Rectangle(
                (place + inset, row + inset),
                1 - 2 * inset,
                1 - 2 * inset,
                fill=False,
                edgecolor=_WORST,
                linewidth=1.6,
                zorder=3,
            )
        )
    axes.set_yticks([row + 0.5 for row in range(len(labels))], labels, fontsize=8)
    numbers = ["once" if depth is None else str(depth) for depth in grid.depths]
    if grid.depths == (None,):
        numbers = [""]
    size = 8 if column == _WIDE else 6.3
    axes.set_xticks([place + 0.5 for place in range(len(numbers))], numbers, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if grid.depths != (None,):
        where = f"{grid.stack}.*" if grid.stack else "index of the layer"
        axes.set_xlabel(where, fontsize=8)


def _range(cells: Cells) -> tuple[float, float]:
    """The ends of the colour bar, in dB: _SPAN apart or more, so that layers that are nearly alike
    look alike."""
    finite = [value for row in cells.values for value in row if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=_SPAN)
    more = max(_SPAN - (high - low), 0.0) / 2
    return low - more, high + more


def _legend(axes: Any, left: float, y: float, cells: Cells) -> None:
    """The colour bar, and a box with a word for each mark in use."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    low, high = _range(cells)
    shades = ScalarMappable(Normalize(low, high), colormaps[_COLOURS])
    if any(math.isfinite(value) for row in cells.values for value in row):
        bar = axes(left, y + 0.12, 2.0, 0.13)
        bar.figure.colorbar(shades, cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=7, length=2)
        bar.set_xlabel("dB", fontsize=7.5, labelpad=1)
    used = [
        Patch(
            facecolor=_EXACT if mark == "exact" else _BLANK,
            edgecolor="#777777",
            hatch=_HATCHES.get(mark),
            label=mark,
        )
        for mark in dict.fromkeys(cells.marks.values())
    ]
    if used:
        place = axes(left + 2.3, y, 3.0, 0.35)
        place.axis("off")
        place.legend(handles=used, loc="center left", ncols=3, fontsize=7.5, frameon=False,
                     handletextpad=0.4, columnspacing=1.0, borderpad=0)  # fmt: skip
