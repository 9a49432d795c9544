"""The page of an Explanation: one HTML file, graphs drawn by matplotlib as SVG."""

from __future__ import annotations

import io
from html import escape
from typing import TYPE_CHECKING, Any

from ..errors import LinearQuantValueError
from .explain_layers import VENDOR_KERNELS, VENDOR_SOURCE, Block, groups_of, titled

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["page"]

_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #1c2430; background: #f5f6f8; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
p { margin: 4px 0 12px; } .quiet { color: #5b6675; }
.card { background: #fff; border: 1px solid #e1e5ea; border-radius: 10px; padding: 16px 18px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid #edf0f3;
  white-space: nowrap; }
th { font-weight: 600; color: #5b6675; } td.number, th.number { text-align: right; }
tr:last-child td { border-bottom: 0; }
.pair { display: grid; grid-template-columns: 2fr 3fr; gap: 16px; align-items: start; }
.pair h3 { font-size: 14px; margin: 0 0 8px; font-weight: 600; }
.pair .card { min-width: 0; box-sizing: border-box; }
.pair svg { max-width: 100%; height: auto; }
.big { font-size: 22px; font-weight: 600; }
.facts { display: flex; gap: 36px; flex-wrap: wrap; }
.layer { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 16px;
  align-items: start; margin-bottom: 16px; }
.layer .card { min-width: 0; box-sizing: border-box; }
.layer td, .layer th { white-space: normal; } .layer td:first-child { white-space: nowrap; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px;
  align-items: center; margin: 0 0 12px; }
.bar { height: 12px; border-radius: 3px; background: #9aa5b4; }
.bar.fused { background: #1769aa; } .bar.vendor { background: #c2571a; }
h3 { font-size: 14px; margin: 0 0 10px; font-weight: 600; } h2, h3 { overflow-wrap: anywhere; }
@media (max-width: 820px) { .layer { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 820px) { .pair { grid-template-columns: 1fr; } }
"""

_MATMUL, _OTHER, _FILL, _ARROW = "#1769aa", "#c2571a", "#eef1f5", "#9aa5b4"
# inches: width of a node, gaps to the right of it and below it, height of its head and of a line
_WIDTH, _GAP, _STEP, _HEAD, _LINE_HEIGHT = 2.5, 0.15, 0.35, 0.36, 0.155


def page(explanation: Explanation) -> str:
    """The whole page, self-contained.

    Args:
        explanation: what to show.

    Returns:
        HTML.

    Raises:
        LinearQuantValueError: matplotlib is not installed.
    """
    e = explanation
    ours = sum(len(layer.ours.compute) for layer in e.layers)
    theirs = sum(len(layer.vendor.compute) for layer in e.layers)
    total = sum(layer.seconds for layer in e.layers)
    before, after = e.launches
    facts = (
        (f"{before} to {after}", "kernels of the model, by fusion"),
        (f"{len(e.layers)}", "LinearQuant layers"),
        (f"{ours}", "GE nodes for them"),
        (f"{theirs}", "with the vendor's module"),
        (f"{total * 1e6:,.2f} us", "at least, by the chip's peaks"),
    )
    shown: dict[tuple[str, str], list[str]] = {}
    for layer in e.layers:
        shown.setdefault((str(layer.ours), str(layer.vendor)), []).append(layer.name or "(model)")
    by_name = {layer.name or "(model)": layer for layer in e.layers}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>LinearQuant on {escape(e.device)}</title><style>{_CSS}</style><main>",
        "<h1>GE nodes of the model</h1>",
        f"<p class=quiet>{escape(e.device)}, {escape(str(e.product))}</p>",
        "<div class='card facts'>",
        *(f"<div><div class=big>{a}</div><div class=quiet>{b}</div></div>" for a, b in facts),
        "</div>",
        "<h2>Kernels and fusions of each layer</h2>",
        *(_layer(block, len(others)) for block, others in groups_of(e.blocks)),
        f"<p class=quiet>The vendor's operators: {escape(VENDOR_SOURCE)}.</p>"
        if any(block.has_attention for block in e.blocks)
        else "",
        "<h2>Quantized layers</h2><div class=card>",
        _table(e.rows()),
        "</div><p class=quiet>us at peak: the larger of operations and bytes, each over the peak "
        f"of {escape(str(e.peak))}. A lower bound: no kernel reaches its peak.</p>",
    ]
    for names in shown.values():
        layer = by_name[names[0]]
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
        parts += [
            f"<h2>{escape(title)}</h2>",
            f"<p class=quiet>{escape(layer.plan.row.source)}</p><div class=pair>",
            *(
                f"<div class=card><h3>{who}, {_nodes(graph)}</h3>{_draw(graph)}</div>"
                for who, graph in (("lq_graph", layer.ours), ("the vendor's module", layer.vendor))
            ),
            "</div>",
        ]
    return "\n".join([*parts, "</main></html>"])


def _layer(block: Block, others: int) -> str:
    """Bars of its kernels and their table, beside what fused and what did not."""
    ways = {"unfused": block.unfused.total(), "fused": block.fused.total()}
    if block.has_attention:
        ways["vendor"] = sum(VENDOR_KERNELS.values())
    most = max(*ways.values(), 1)
    bars = "".join(
        f"<span class=quiet>{way}</span>"
        f"<span class='bar {way}' style='width: {100 * count / most:.1f}%'></span><b>{count}</b>"
        for way, count in ways.items()
    )
    fusions = _table(block.fusions()) if block.lines else "<p>no pattern came near</p>"
    return (
        f"<h3>{escape(titled(block.name, others))}</h3><div class=layer>"
        f"<div class=card><div class=bars>{bars}</div>{_table(block.kernels())}</div>"
        f"<div class=card>{fusions}</div></div>"
    )


def _table(rows: list[list[object]]) -> str:
    numeric = [all(isinstance(c, int) for c in column[1:]) for column in zip(*rows, strict=True)]

    def line(row: list[object], tag: str) -> str:
        cells = []
        for cell, number in zip(row, numeric, strict=True):
            text = f"{cell:,}" if isinstance(cell, int) else escape(str(cell))
            cells.append(f"<{tag}{' class=number' if number else ''}>{text}</{tag}>")
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _nodes(graph: Any) -> str:
    count = len(graph.compute)
    return f"{count} GE node{'s' if count > 1 else ''}"


def _draw(graph: Any) -> str:
    """The compute nodes of a graph, each below its producers, with its inputs and outputs."""
    try:
        import matplotlib
    except ImportError:
        raise LinearQuantValueError(
            "explain: the page is drawn by matplotlib. What to do: pip install matplotlib."
        ) from None
    import networkx
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    nodes = {node.name: node for node in graph.compute}
    flow = networkx.DiGraph()
    flow.add_nodes_from(nodes)
    flow.add_edges_from(
        (edge.source, node.name)
        for node in nodes.values()
        for edge in node.inputs
        if edge.source in nodes
    )
    # from the end, so that a node is just above the first node that reads it
    rows = [list(row) for row in networkx.topological_generations(flow.reverse())][::-1]
    heights = [_HEAD + _LINE_HEIGHT * max(len(nodes[n].inputs) + 1 for n in row) for row in rows]
    width = max(map(len, rows)) * (_WIDTH + _GAP) + _GAP
    height = sum(heights) + _STEP * (len(rows) - 1) + 0.1
    place: dict[str, tuple[float, float, float]] = {}  # left, top, bottom
    top = height - 0.05
    for row, tall in zip(rows, heights, strict=True):
        left = (width - len(row) * (_WIDTH + _GAP) + _GAP) / 2
        for name in row:
            own = _HEAD + _LINE_HEIGHT * (len(nodes[name].inputs) + 1)
            place[name] = (left, top, top - own)
            left += _WIDTH + _GAP
        top -= tall + _STEP
    # text stays text, so that it can be searched and copied
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)
        axes.axis("off")
        for source, target in flow.edges:
            (left, _, bottom), (to_left, to_top, _) = place[source], place[target]
            axes.annotate(
                "",
                (to_left + _WIDTH / 2, to_top + 0.02),
                (left + _WIDTH / 2, bottom - 0.02),
                arrowprops={"arrowstyle": "-|>", "color": _ARROW, "linewidth": 1.2},
                zorder=0,
            )
        for name, node in nodes.items():
            left, top, bottom = place[name]
            colour = _MATMUL if node.op.startswith("QuantBatchMatmul") else _OTHER
            box = FancyBboxPatch(
                (left + 0.05, bottom + 0.05),
                _WIDTH - 0.1,
                top - bottom - 0.1,
                boxstyle="round,pad=0.03,rounding_size=0.08",
                facecolor=_FILL,
                edgecolor=colour,
                linewidth=1.5,
            )
            axes.add_patch(box)
            axes.text(left + 0.14, top - 0.27, node.op, weight="bold", size=10, color=colour)
            lines = [f"{edge.name}  {_size(edge)}" for edge in node.inputs]
            if node.attrs.get("transpose_x2"):
                lines = [line.replace("x2  ", "x2 transposed  ") for line in lines]
            lines += [f"gives  {_size(edge)}" for edge in node.outputs[:1]]
            for i, line in enumerate(lines):
                y = top - 0.27 - _LINE_HEIGHT * (i + 1)
                axes.text(left + 0.14, y, line, size=7.5, color="#1c2430")
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _size(edge: Any) -> str:
    if edge.shape is None:  # torchair records no shape for nodes that its converters add
        return "?"
    shape = ", ".join(map(str, edge.shape))
    nz = " NZ" if edge.format == "FRACTAL_NZ" else ""
    return f"{edge.dtype}[{shape}]{nz}"
