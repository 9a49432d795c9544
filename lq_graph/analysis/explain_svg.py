"""Drawings of the explain page, as SVG: a GE graph, and a roofline. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..rules.tables import Peak
from .explain_kernels import KINDS, kind_of
from .units import count_text

__all__ = ["Point", "draw_graph", "draw_roofline", "kind_class"]

# Pixels of a graph: of a character of the monospaced text, of a line, between nodes, in a node.
_CHARACTER, _LINE, _GAP, _STEP, _PAD = 6.7, 16, 16, 30, 10


def kind_class(op: str) -> str:
    """The class of the page's style that has the colour of an operator."""
    return f"k{list(KINDS).index(kind_of(op))}"


def draw_graph(graph: Any, title: str) -> str:
    """The compute nodes of a GE graph, each below its producers, with its inputs and outputs.

    Args:
        graph: `lq_graph.converters.graph.Graph`.
        title: what a screen reader says of it.
    """
    nodes = {node.name: node for node in graph.compute}
    text = {name: _lines(node) for name, node in nodes.items()}
    width = {n: _CHARACTER * max(map(len, lines)) + 2 * _PAD for n, lines in text.items()}
    height = {n: _LINE * len(lines) + 1.5 * _PAD for n, lines in text.items()}
    rows = _rows(nodes)
    wide = [sum(width[n] + _GAP for n in row) - _GAP for row in rows]
    whole, left, top = max(wide), {}, {}
    y = 2.0
    for row, own in zip(rows, wide, strict=True):
        x = (whole - own) / 2 + 2
        for name in row:
            left[name], top[name] = x, y
            x += width[name] + _GAP
        y += max(height[n] for n in row) + _STEP
    parts = []
    for name, node in nodes.items():
        for source in dict.fromkeys(edge.source for edge in node.inputs if edge.source in nodes):
            x1, y1 = left[source] + width[source] / 2, top[source] + height[source]
            x2, y2 = left[name] + width[name] / 2, top[name]
            bend = (y2 - y1) / 2
            parts.append(
                f"<path class=edge d='M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} "
                f"{y2 - bend:.0f} {x2:.0f} {y2 - 6:.0f}'/>"
                f"<path class=tip d='M{x2 - 4:.0f} {y2 - 7:.0f}h8l-4 7z'/>"
            )
    for name, node in nodes.items():
        x, y1 = left[name], top[name]
        parts.append(
            f"<g class={kind_class(node.op)}><rect class=node x={x:.0f} y={y1:.0f} rx=6 "
            f"width={width[name]:.0f} height={height[name]:.0f} />"
        )
        for i, line in enumerate(text[name]):
            parts.append(
                f"<text x={x + _PAD:.0f} y={y1 + _LINE * (i + 1):.0f}"
                f"{' class=op' if not i else ''}>{escape(line)}</text>"
            )
        parts.append("</g>")
    size = f"{whole + 4:.0f}", f"{y - _STEP + 2:.0f}"
    return (
        f"<svg class=graph role=img viewBox='0 0 {size[0]} {size[1]}' width={size[0]} "
        f"height={size[1]} ><title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _rows(nodes: dict[str, Any]) -> list[list[str]]:
    """The nodes from top to bottom: each just above the first node that reads it."""
    from_end: dict[str, int] = {}
    for name in reversed(nodes):  # producers come first
        readers = [
            from_end[other] + 1
            for other, node in nodes.items()
            if other in from_end and any(edge.source == name for edge in node.inputs)
        ]
        from_end[name] = max(readers, default=0)
    rows: list[list[str]] = [[] for _ in range(max(from_end.values()) + 1)]
    for name in nodes:
        rows[-1 - from_end[name]].append(name)
    return rows


def _lines(node: Any) -> list[str]:
    turned = {name[-2:] for name in ("transpose_x1", "transpose_x2") if node.attrs.get(name)}
    inputs = [
        f"{edge.name}{' transposed' if edge.name in turned else ''} {_size(edge)}"
        for edge in node.inputs
    ]
    return [node.op, *inputs, *(f"-> {_size(edge)}" for edge in node.outputs[:1])]


def _size(edge: Any) -> str:
    if edge.shape is None:  # the dtype is not known either
        return "?"
    return str(edge).partition(" ")[2].replace("FRACTAL_NZ", "NZ")


@dataclass(frozen=True)
class Point:
    """A layer in a roofline.

    Attributes:
        label: short, a number.
        href: where a click leads.
        title: what a pointer shows.
        intensity: operations per byte.
        speed: operations per second.
    """

    label: str
    href: str
    title: str
    intensity: float
    speed: float


_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM, _R = 560, 380, 74, 14, 26, 48, 10


def draw_roofline(points: Sequence[Point], peak: Peak) -> str:
    """Operations per second over operations per byte, both logarithmic, with the peak lines.

    Args:
        points: the layers; labels are moved apart and tied to their points by lines.
        peak: the chip's.
    """
    ridge = peak.int8_ops / peak.bytes_per_second
    xs = [*(p.intensity for p in points), ridge]
    ys = [*(p.speed for p in points), peak.int8_ops]
    x0, x1 = math.floor(math.log10(min(xs) / 1.5)), math.log10(max(xs) * 4)
    y0, y1 = math.floor(math.log10(min(ys) / 1.2)), math.log10(max(ys) * 2)

    def at_x(value: float) -> float:
        return _LEFT + (math.log10(value) - x0) / (x1 - x0) * (_W - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _H - _BOTTOM - (math.log10(value) - y0) / (y1 - y0) * (_H - _TOP - _BOTTOM)

    parts = []
    for power in range(x0, math.floor(x1) + 1):
        x = at_x(10.0**power)
        parts.append(
            f"<path class=grid d='M{x:.1f} {_TOP}V{_H - _BOTTOM}'/>"
            f"<text class=tick x={x:.1f} y={_H - _BOTTOM + 18} text-anchor=middle>"
            f"{10.0**power:,g}</text>"
        )
    for power in range(y0, math.floor(y1) + 1):
        y = at_y(10.0**power)
        speed = count_text(10.0**power, "op/s")
        for zeros in (".00", ".0"):
            speed = speed.replace(f"{zeros} ", " ")
        parts.append(
            f"<path class=grid d='M{_LEFT} {y:.1f}H{_W - _RIGHT}'/>"
            f"<text class=tick x={_LEFT - 6} y={y + 4:.1f} text-anchor=end>{speed}</text>"
        )
    first = max(10.0**x0, 10.0**y0 / peak.bytes_per_second)
    parts.append(
        f"<path class=roof d='M{at_x(first):.1f} {at_y(first * peak.bytes_per_second):.1f}"
        f"L{at_x(ridge):.1f} {at_y(peak.int8_ops):.1f}H{_W - _RIGHT}'/>"
        f"<text class=roofname x={_W - _RIGHT} y={at_y(peak.int8_ops) - 7:.1f} text-anchor=end>"
        f"{count_text(peak.int8_ops, 'op/s')} int8</text>"
        f"<text class=roofname x={at_x(ridge) - 14:.1f} y={at_y(peak.int8_ops) - 7:.1f} "
        f"text-anchor=end>{count_text(peak.bytes_per_second, 'B/s')} of memory</text>"
        f"<text class=tick x={(_LEFT + _W - _RIGHT) / 2:.0f} y={_H - 8} text-anchor=middle>"
        "operations per byte</text>"
    )
    places = [(at_x(p.intensity), at_y(p.speed)) for p in points]
    labels = _apart(places)
    for (x, y), (lx, ly) in zip(places, labels, strict=True):
        parts.append(f"<path class=leader d='M{x:.1f} {y:.1f}L{lx:.1f} {ly:.1f}'/>")
    parts += [f"<circle class=dot cx={x:.1f} cy={y:.1f} r=4 />" for x, y in places]
    for point, (x, y) in zip(points, labels, strict=True):
        parts.append(
            f"<a href='{escape(point.href)}'><title>{escape(point.title)}</title>"
            f"<circle class=label cx={x:.1f} cy={y:.1f} r={_R} />"
            f"<text class=number x={x:.1f} y={y + 4:.1f} text-anchor=middle>"
            f"{escape(point.label)}</text></a>"
        )
    return (
        f"<svg class=roofline role=group aria-labelledby='roof-t roof-d' viewBox='0 0 {_W} {_H}'>"
        f"<title id=roof-t>Roofline of {escape(peak.chip)}</title><desc id=roof-d>Each quantized "
        "layer by its operations per byte and its forecast of operations per second, below the "
        f"lines of the chip's peaks. The numbers are rows of the table.</desc>{''.join(parts)}"
        "</svg>"
    )


def _apart(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A place for each label near its point, on no other label and on no point."""
    taken: list[tuple[float, float]] = []
    for x, y in places:
        candidates = (
            (x + radius * math.cos(turn), y + radius * math.sin(turn))
            for radius in range(20, 400, 6)
            for turn in (math.tau * i / 16 for i in (2, 0, 14, 1, 15, 3, 4, 6, 8, 10, 12))
        )
        taken.append(
            next(
                (
                    (cx, cy)
                    for cx, cy in candidates
                    if _LEFT + _R < cx < _W - _RIGHT - _R
                    and _TOP + _R < cy < _H - _BOTTOM - _R
                    and all(math.hypot(cx - a, cy - b) > 2 * _R + 2 for a, b in taken)
                    and all(math.hypot(cx - a, cy - b) > _R + 6 for a, b in places)
                ),
                (x, y),
            )
        )
    return taken
