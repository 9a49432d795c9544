"""An Explanation for the terminal: lines of up to 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..reports import table
from .explain_fold import LayerGroup, folded_names
from .explain_kernels import Kernel, Total
from .explain_layers import REST, VENDOR_KERNELS, VENDOR_SOURCE, Block
from .units import bytes_text, seconds_text

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["explanation_text", "forecast_text", "shortened"]

WIDTH = 80


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters, with "..." in it if it is longer. More is kept of its
    end, which tells names of modules apart."""
    if len(text) <= width:
        return text
    tail = 2 * (width - 3) // 3
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"


def forecast_text(total: Total) -> str:
    """A forecast with its error: "12.3 us +- 20 % forecast"."""
    text = f"{seconds_text(total.seconds)} +- {total.error:.0%} forecast"
    if total.assumed:
        text += f" ({total.assumed:.0%} of it for kernels nobody has measured)"
    if total.unknown:
        text += f", without {total.unknown} kernels of unknown size"
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
        "",
        *_layers(e),
        "",
        *_wrap(f"at least {seconds_text(e.peak_seconds)} in these layers: {e.peak}"),
        "",
        f"whole model: {before} kernels without fusion, {after} with ({whole} GE nodes)",
        *_wrap(f"without fusion {forecast_text(e.unfused_total)}", "  "),
        *_wrap(f"with fusion {forecast_text(e.total)}", "  "),
    ]
    for block, names in e.block_groups:
        lines += _block(block, names)
    if any(block.has_attention for block in e.blocks):
        lines += ["", *_wrap(f"vendor: {VENDOR_SOURCE}")]
    seen = set()
    for group in e.groups:
        if group.key in seen:
            continue
        seen.add(group.key)
        lines += ["", *_wrap(f"{group.name}: {group.first.plan.row.source}")]
        for title, graph in (("ours", group.first.ours), ("vendor", group.first.vendor)):
            lines.append(f"  {title}, {len(graph.compute)} node{'s'[: len(graph.compute) - 1]}")
            lines += _nodes(graph)
    return "\n".join(lines)


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_on_hyphens=False,
    )


def fitted(rows: Sequence[Sequence[object]], indent: str, column: int) -> list[str]:
    """A table of at most 80 columns: one column is shortened."""
    widths = [
        len(line) for line in table([[*row[:column], "", *row[column + 1 :]] for row in rows])
    ]
    room = WIDTH - len(indent) - max(widths, default=0)
    longest = max(len(str(row[column])) for row in rows)
    short = [
        [*row[:column], shortened(str(row[column]), max(8, min(longest, room))), *row[column + 1 :]]
        for row in rows
    ]
    return [line[:WIDTH] for line in table(short, indent)]


def _layers(e: Explanation) -> list[str]:
    rows: list[list[object]] = [["layer", "", "m x k x n", "row", "bytes", "us", ">= us"]]
    rows += [_layer(group) for group in e.groups]
    return fitted(rows, "", 0)


def _layer(group: LayerGroup) -> list[object]:
    one = group.first
    return [
        group.name,
        f"x{len(group.layers)}" if len(group.layers) > 1 else "",
        group.sizes,
        group.row,
        bytes_text(one.bytes),
        f"{one.forecast.seconds * 1e6:.2f}",
        f"{one.seconds * 1e6:.2f}",
    ]


def _block(block: Block, names: Sequence[str]) -> list[str]:
    """One of equal layers of the model: what fused, and the kernels."""
    title = block.name if block.name == REST else folded_names(names)
    title += f" (x{len(names)})" if len(names) > 1 else ""
    before, after = len(block.before), len(block.after)
    vendor = f"; {sum(VENDOR_KERNELS.values())} in the vendor's operators"
    head = f"{title}: {before} kernels without fusion, {after} with"
    lines = ["", *_wrap(head + (vendor if block.has_attention else ""))]
    if block.after:
        total = Total.of(block.after)
        lines += _wrap(f"{bytes_text(total.bytes)}, {forecast_text(total)}", "  ")
    if block.lines:
        rows = block.fusions()
        lines += ["", *fitted([row[:4] for row in rows], "  ", 3)]
        for row in rows[1:]:
            if row[4]:
                lines += _wrap(f"{row[0]} in {row[3]} is blocked by: {row[4]}", "  ")
    elif block.before:
        lines.append("  nothing fused, and no pattern came near")
    if block.before:
        lines += ["", *fitted(_kernels(block), "  ", 0)]
    return lines


def _kernels(block: Block) -> list[list[object]]:
    """Block.kernels() with the bytes and the forecast of the fused ones."""
    head, *rows = block.kernels()
    by_op: dict[object, list[Kernel]] = {"all": list(block.after)}
    for kernel in block.after:
        by_op.setdefault(kernel.op, []).append(kernel)
    full: list[list[object]] = [[*head, "bytes", "us"]]
    for row in rows:
        total = Total.of(by_op.get(row[0], ()))
        known = total.launches > total.unknown
        full.append(
            [
                *row,
                bytes_text(total.bytes) if known else "",
                f"{total.seconds * 1e6:.2f}" if known else "",
            ]
        )
    return full


def _nodes(graph: Any) -> list[str]:
    lines = []
    for line in str(graph).splitlines():
        indent = "    " + " " * (len(line) - len(line.lstrip()))
        lines += _wrap(line.strip(), indent)
    return lines
