"""An Explanation for the terminal: lines of up to 80 columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..reports import shortened, table, terminal_width, wrapped
from .explain_fold import LayerGroup, folded_names
from .explain_kernels import Kernel, Total
from .explain_layers import REST, VENDOR_KERNELS, VENDOR_SOURCE, Block, without_linear
from .units import bytes_text, seconds_text

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["explanation_text", "forecast_text"]

_OUTER = re.compile(r"^.*?(?<![^.])(\d+|\*|\[.*?\])(?![^.])")  # of a folded name, to its number


def forecast_text(total: Total) -> str:
    """A forecast with its error: "12.3 us ± 20 %"."""
    text = f"{seconds_text(total.seconds)} ± {100 * total.error:.0f} %"
    if total.assumed:
        text += f", {100 * total.assumed:.0f} % of it assumed (*)"
    if total.unknown:
        text += f"; of {total.unknown} kernels a size is not known, and counts nothing"
    return text


def explanation_text(e: Explanation) -> str:
    """The whole text."""
    before, after = e.launches
    ours, theirs = e.nodes()
    whole = sum(len(graph.compute) for graph in e.graphs)
    lines = [
        f"{e.device}, {e.product}",
        f"{len(e.layers)} LinearQuant layers, {ours} GE nodes (the vendor's module: {theirs})",
        *(_wrap(e.machine.warning) if e.machine.stand_in else ()),
        *_layers(e),
        "",
        *_wrap(
            f"us: forecast; least: at the chip's peaks, {seconds_text(e.peak_seconds)} for all of "
            f"these layers, by {e.peak}"
        ),
        "",
        f"whole model: {before} kernels without fusion, {after} with ({whole} GE nodes)",
        *_wrap(f"forecast without fusion {forecast_text(e.unfused_total)}", "  "),
        *_wrap(f"forecast with fusion {forecast_text(e.total)}", "  "),
    ]
    for block, names in e.block_groups:
        lines += _block(block, names)
    lines += ["", "* assumed: nobody has published a measurement of this operator"]
    if any(block.has_attention for block in e.blocks):
        lines += ["", *_wrap(f"vendor: {VENDOR_SOURCE}")]
    seen = set()
    for group in e.groups:
        if group.key in seen:
            continue
        seen.add(group.key)
        lines += ["", *_wrap(f"{_name(group.name, 1)}: {group.first.plan.row.source}")]
        for title, graph in (("ours", group.first.ours), ("vendor", group.first.vendor)):
            lines.append(f"  {title}, {len(graph.compute)} node{'s'[: len(graph.compute) - 1]}")
            lines += _nodes(graph)
    return "\n".join(lines)


def _wrap(text: str, indent: str = "") -> list[str]:
    return [indent + line for line in wrapped(text, "  ", terminal_width() - len(indent))]


def _name(name: str, count: int) -> str:
    times = f" x{count}" if count > 1 else ""
    return f"{shortened(name, terminal_width() - 8 - len(times))}{times}"


def _layers(e: Explanation) -> list[str]:
    """The quantized layers: a table for each numbered module that they are in."""
    inside: dict[tuple[str, int], list[list[object]]] = {}
    for group in e.groups:
        found = _OUTER.match(group.name)
        outer = found[0] if found else ""
        name = without_linear(group.name[len(outer) :]).strip(".")
        key = outer, len(group.layers)
        inside.setdefault(key, []).append([name or "(itself)", *_layer(group)])
    lines = []
    for (outer, count), rows in inside.items():
        lines += ["", f"in {_name(outer, count)}"] if outer else [""]
        head = ["layer", "m x k x n", "row", "bytes", "us", "least"]
        lines += table([head, *rows], "  " if outer else "")
    return lines


def _layer(group: LayerGroup) -> list[object]:
    one = group.first
    return [
        group.sizes,
        group.row,
        bytes_text(one.bytes),
        f"{one.forecast.seconds * 1e6:.2f}",
        f"{one.seconds * 1e6:.2f}",
    ]


def _block(block: Block, names: Sequence[str]) -> list[str]:
    """One of equal layers of the model: what fused, and the kernels."""
    title = _name(block.name if block.name == REST else folded_names(names), len(names))
    before, after = len(block.before), len(block.after)
    vendor = f"; {sum(VENDOR_KERNELS.values())} in the vendor's operators"
    head = f"{title}: {before} kernels without fusion, {after} with"
    lines = ["", *_wrap(head + (vendor if block.has_attention else ""))]
    if block.after:
        total = Total.of(block.after)
        lines += _wrap(f"{bytes_text(total.bytes)}, forecast {forecast_text(total)}", "  ")
    if block.lines:
        rows = block.fusions()
        lines += ["", *table([row[:4] for row in rows], "  ")]
        for row in rows[1:]:
            if row[4]:
                lines += _wrap(f"{row[0]} in {row[3]} is blocked by: {row[4]}", "  ")
    elif block.before:
        lines.append("  nothing fused, and no pattern came near")
    if block.before:
        lines += ["", *table(_kernels(block), "  ")]
    return lines


def _kernels(block: Block) -> list[list[object]]:
    """Block.kernels() with the bytes and the forecast of the fused ones."""
    head, *rows = block.kernels()
    by_op: dict[object, list[Kernel]] = {"all": list(block.after)}
    for kernel in block.after:
        by_op.setdefault(kernel.op, []).append(kernel)
    full: list[list[object]] = [[*head, "bytes", "us", "±"]]
    for row in rows:
        total = Total.of(by_op.get(row[0], ()))
        known = total.seconds > 0
        full.append(
            [
                *row,
                bytes_text(total.bytes) if known else "",
                f"{total.seconds * 1e6:.2f}" if known else "",
                f"{100 * total.error:.0f} %{' *' if total.assumed else ''}" if known else "",
            ]
        )
    return full


def _nodes(graph: Any) -> list[str]:
    lines = []
    for line in str(graph).splitlines():
        indent = "    " + " " * (len(line) - len(line.lstrip()))
        lines += _wrap(line.strip(), indent)
    return lines
