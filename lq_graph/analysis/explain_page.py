"""The page of an Explanation: one HTML file with its style, its script and its drawings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .explain_fold import LayerGroup, folded_names
from .explain_kernels import KINDS, Kernel, Total
from .explain_layers import REST, VENDOR_KERNELS, VENDOR_SOURCE, Block
from .explain_style import CSS, SCRIPT
from .explain_svg import Point, draw_graph, draw_roofline, kind_class
from .units import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["page"]


def page(explanation: Explanation) -> str:
    """The whole page, self-contained: no address is loaded.

    Args:
        explanation: what to show.

    Returns:
        HTML.
    """
    e = explanation
    graphs = _graphs_of(e.groups)
    most = max(e.block_groups, key=lambda group: len(group[1]), default=None)
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>Quantized model on {escape(e.product.name)}: kernels and layers</title>",
        f"<style>{CSS}</style></head><body><main>",
        *_top(e),
        "<h2 id=model>Layers of the model</h2>",
        "<p class=quiet>Equal layers are shown once. A square is a kernel, which is one launch; "
        "a bar is what one kernel moves or takes, in proportion to the largest of its layer.</p>",
        _legend(),
        *(
            _block(i, block, names, is_open=(block, names) == most)
            for i, (block, names) in enumerate(e.block_groups, 1)
        ),
        "<h2 id=quantized-layers>Quantized layers</h2>",
        *_quantized(e, graphs),
        "<h2 id=roofline>Roofline</h2>",
        _roofline(e),
        "<h2 id=graphs>GE nodes of each quantized layer</h2>",
        *(_graph_pair(i, groups, e) for i, groups in enumerate(graphs, 1)),
        "<h2 id=about>About these numbers</h2>",
        *_about(e),
        f"</main><script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts)


def _graphs_of(groups: Sequence[LayerGroup]) -> list[list[LayerGroup]]:
    """The groups that share GE nodes, ours and the vendor's, together."""
    found: dict[tuple[str, str], list[LayerGroup]] = {}
    for group in groups:
        found.setdefault(group.key, []).append(group)
    return list(found.values())


def _top(e: Explanation) -> Iterable[str]:
    before, after = e.launches
    ours, theirs = e.nodes()
    versions = ", ".join(f"{name} {version}" for name, version in e.machine.versions.items())
    place = f"{e.device} ({'cann_host' if e.machine.stand_in else 'NPU'}), {e.product}"
    yield (
        f"<header><div><h1>What this model becomes on {escape(e.product.name)}</h1>"
        f"<div>{escape(e.model)}</div>"
        f"<div class=quiet>{escape(place)}; {escape(versions)}</div></div>"
        "<div class='tools nowrap' hidden></div></header>"
    )
    yield (
        "<nav aria-label='on this page'><a href=#model>Layers of the model</a>"
        "<a href=#quantized-layers>Quantized layers</a><a href=#roofline>Roofline</a>"
        "<a href=#graphs>GE nodes</a><a href=#about>About these numbers</a></nav>"
    )
    if e.machine.stand_in:
        yield f"<div class='card warn' role=note><p>{escape(e.machine.warning)}</p></div>"
    facts = (
        (f"{before:,} &rarr; {after:,}", "kernels of one call, without and with fusion"),
        (_forecast(e.total), f"forecast of one call; {_forecast(e.unfused_total)} without fusion"),
        (bytes_text(e.total.bytes), "read and written by its kernels"),
        (f"{len(e.layers):,}", f"LinearQuant layers, {len(e.groups)} different"),
        (f"{ours:,}", f"GE nodes for them; {theirs:,} with the vendor's module"),
        (seconds_text(e.peak_seconds), "at least for them, by the chip's published peaks"),
    )
    tiles = "".join(f"<div><b>{a}</b><span class=quiet>{b}</span></div>" for a, b in facts)
    yield f"<div class='card facts'>{tiles}</div>"


def _name(name: str) -> str:
    """A module's name that may break at its dots."""
    return escape(name).replace(".", ".<wbr>")


def _forecast(total: Total) -> str:
    error = f"{100 * total.error:.0f} %"
    return f"<span class=nowrap>{seconds_text(total.seconds)} &plusmn; {error}</span>"


def _legend() -> str:
    items = "".join(
        f"<li><span class='cell k{i}'></span>{escape(kind)}</li>" for i, kind in enumerate(KINDS)
    )
    return f"<ul class=legend aria-label='kinds of kernels'>{items}</ul>"


def _block(number: int, block: Block, names: Sequence[str], *, is_open: bool) -> str:
    """A layer of the model: its launches, its kernels in order, what fused and what did not."""
    title = block.name if block.name == REST else folded_names(names)
    total = Total.of(block.after)
    times = f"<span class=badge>&times;{len(names)}</span>" if len(names) > 1 else ""
    summary = (
        f"<summary><h3>{_name(title)}</h3>{times}"
        f"<span>{len(block.before)} &rarr; {len(block.after)} kernels</span>"
        f"<span>{bytes_text(total.bytes)}</span><span>{_forecast(total)}</span>"
        f"{_blocked(block)}</summary>"
    )
    strips = _strip("without fusion", [(k.op, k.module) for k in block.before])
    strips += _strip("with fusion", [(k.op, k.module) for k in block.after])
    if block.has_attention:
        vendor = [(op, "") for op, count in VENDOR_KERNELS.items() for _ in range(count)]
        strips += _strip("the vendor's operators", vendor)
    counts = _table(block.kernels(), [f"kernels of {title} by operator", "small"], {1, 2, 3})
    like = ""
    if len(names) > 1:
        items = "".join(f"<li>{escape(name)}</li>" for name in names)
        like = (
            f"<details class=names><summary>all {len(names)} of them</summary>"
            f"<ul>{items}</ul></details>"
        )
    return (
        f"<section class='card block' id=layer-{number}><details{' open' if is_open else ''}>"
        f"{summary}<div class=strips>{strips}</div>"
        f"<h4>Kernels with fusion, in order</h4>{_kernels(block, title)}"
        f"<div class=two><div><h4>Fusions</h4>{_fusions(block)}</div><div>{like}"
        f"<details><summary>Kernels by operator</summary><div class=scroll>{counts}</div></details>"
        "</div></div></details></section>"
    )


def _strip(name: str, kernels: Sequence[tuple[str, str]]) -> str:
    cells = "".join(
        f"<span class='cell {kind_class(op)}' title='{escape(op)}'></span>" for op, _ in kernels
    )
    return (
        f"<span>{name} <b>{len(kernels)}</b></span>"
        f"<div class=strip role=img aria-label='{len(kernels)} kernels'>{cells}</div>"
    )


def _kernels(block: Block, title: str) -> str:
    if not block.after:
        return "<p>no kernel of its own: others do its work</p>"
    costs = [kernel.cost for kernel in block.after if kernel.cost]
    most = max((cost.bytes for cost in costs), default=0) or 1
    longest = max((cost.seconds for cost in costs), default=0) or 1
    rows = "".join(
        _kernel(i, kernel, block, most, longest) for i, kernel in enumerate(block.after, 1)
    )
    heads = "".join(
        f"<th scope=col{' class=n' if head == '#' else ''}>{head}</th>"
        for head in ("#", "kernel", "module", "moves", "takes, forecast", "bound by")
    )
    return (
        f"<table class=flow><caption class=quiet hidden>{escape(title)}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _kernel(i: int, kernel: Kernel, block: Block, most: float, longest: float) -> str:
    kind = kind_class(kernel.op)
    tensors = "\n".join([*kernel.reads, *(f"-> {text}" for text in kernel.writes)])
    module = f"<td data-label=module class=name>{_name(block.inner(kernel.module))}</td>"
    head = (
        f"<tr class={kind}><td class=n data-label=#>{i}</td>"
        f"<th scope=row title='{escape(tensors)}'>{escape(kernel.op)}</th>{module}"
    )
    cost = kernel.cost
    if cost is None:
        unknown = "<td data-label={}>not known</td>"
        return (
            head + unknown.format("moves") + "<td data-label=takes></td>"
            "<td data-label='bound by'></td></tr>"
        )
    wait = 100 * cost.launch_seconds / longest
    work = 100 * cost.seconds / longest - wait
    assumed = ", assumed" if cost.assumed else ""
    least = "" if kernel.is_sized else "&ge; "
    return (
        f"{head}<td data-label=moves title='{cost.bytes:,.0f} bytes'><div>"
        f"{least}{bytes_text(cost.bytes)}<div class=meter><i class=fill "
        f"style='width:{100 * cost.bytes / most:.2f}%'></i></div></div></td>"
        f"<td data-label=takes title='{cost.seconds * 1e6:.3f} us, of it "
        f"{cost.launch_seconds * 1e6:.3f} us launch'><div>{seconds_text(cost.seconds)} "
        f"<small>&plusmn; {100 * cost.error:.0f} %{assumed}</small><div class=meter>"
        f"<i class=wait style='width:{wait:.2f}%'></i>"
        f"<i class=fill style='width:{work:.2f}%'></i></div></div></td>"
        f"<td data-label='bound by'>{cost.bound}</td></tr>"
    )


def _blocked(block: Block) -> str:
    """How many places of a layer did not fuse."""
    left = sum(bool(line.why_not) for line in block.lines)
    return f"<span class='badge left'>&times; {left} not fused</span>" if left else ""


def _fusions(block: Block) -> str:
    if not block.lines:
        return "<p>no pattern came near</p>"
    items = []
    for name, done, left, where, why in block.fusions()[1:]:
        place = f"<span class=quiet>in {escape(str(where))}</span>"
        if why:
            items.append(
                f"<li class=left data-mark='&times;'><b>{escape(str(name))}</b> not done, "
                f"{left}&times; {place}<br>blocked by: {escape(str(why))}</li>"
            )
        else:
            items.append(
                f"<li data-mark='&check;'><b>{escape(str(name))}</b> {done}&times; {place}</li>"
            )
    return f"<ul class=fusions>{''.join(items)}</ul>"


def _quantized(e: Explanation, graphs: Sequence[Sequence[LayerGroup]]) -> Iterable[str]:
    number_of = {group.layers[0].name: i for i, some in enumerate(graphs, 1) for group in some}
    yield (
        "<p class=quiet>Layers with equal shapes, dtypes and GE nodes are one row. A click on a "
        "head sorts. The row of a name leads to its GE nodes.</p>"
        "<p hidden><label>Filter <input id=filter type=search "
        "placeholder='q_proj, layers.17, memory'></label> <span id=count role=status></span></p>"
    )
    heads = (
        "#", "layer", "times", "m x k x n", "row", "GE nodes", "vendor", "MACs", "bytes",
        "ops/byte", "forecast", "at peak",
    )  # fmt: skip
    numbers = {*heads} - {"layer", "m x k x n", "row"}
    head = "".join(
        f"<th scope=col{' class=n' if name in numbers else ''}>{name}</th>" for name in heads
    )
    rows = "".join(
        _row(i, group, number_of[group.first.name], heads, numbers)
        for i, group in enumerate(e.groups, 1)
    )
    yield (
        "<div class='card scroll'><table class='flow sorts' id=quantized>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(i: int, group: LayerGroup, graph: int, heads: Sequence[str], numbers: set[str]) -> str:
    one, count = group.first, len(group.layers)
    names = ""
    if count > 1:
        items = "".join(f"<li>{escape(layer.name)}</li>" for layer in group.layers)
        names = f"<details><summary class=quiet>all {count}</summary><ul>{items}</ul></details>"
    nz = ", NZ" if one.weight_format == "FRACTAL_NZ" else ""
    cells: list[tuple[str, object, str]] = [  # what is shown, what it is sorted by, the exact value
        (str(i), i, ""),
        (f"<div><a href=#graph-{graph}>{_name(group.name)}</a>{names}</div>", group.name, ""),
        (f"&times;{count}", count, ""),
        (f"<span class=nowrap>{group.sizes}</span>", one.macs, ""),
        (f"<span class=nowrap>{escape(group.row)}{nz}</span>", group.row,
         f"{one.plan.row.source}; weight {one.weight_format}"),
        (str(len(one.ours.compute)), len(one.ours.compute), ", ".join(one.ours.ops())),
        (str(len(one.vendor.compute)), len(one.vendor.compute), ", ".join(one.vendor.ops())),
        (count_text(one.macs, "").rstrip(), one.macs, f"{one.macs:,}"),
        (bytes_text(one.bytes), one.bytes, f"{one.bytes:,} bytes"),
        (f"{one.intensity:.1f}", one.intensity, ""),
        (seconds_text(one.forecast.seconds), one.forecast.seconds,
         f"{one.forecast.seconds * 1e6:.3f} us, error {one.forecast.error:.0%}"),
        (f"{seconds_text(one.seconds)}<br><small>{one.bound}</small>", one.seconds,
         f"{one.seconds * 1e6:.3f} us"),
    ]  # fmt: skip
    shown = []
    for name, (text, value, title) in zip(heads, cells, strict=True):
        kind = " class=n" if name in numbers else " class=name" if name == "layer" else ""
        tag = "th scope=row" if name == "layer" else "td"
        about = f" title='{escape(title)}'" if title else ""
        shown.append(
            f"<{tag}{kind} data-label='{name}' data-v='{escape(str(value))}'{about}>{text}"
            f"</{tag[:2]}>"
        )
    return f"<tr id=row-{i} data-count={count}>{''.join(shown)}</tr>"


def _roofline(e: Explanation) -> str:
    points, items = [], []
    for i, group in enumerate(e.groups, 1):
        one = group.first
        seconds = one.forecast.seconds or one.seconds
        speed = 2 * one.macs / seconds
        said = f"{group.name}: {one.intensity:.1f} operations per byte, {count_text(speed, 'op/s')}"
        points.append(Point(str(i), f"#row-{i}", said, one.intensity, speed))
        items.append(
            f"<li><a href=#row-{i}><b>{i}</b> {_name(group.name)}</a> <span class=quiet>"
            f"{one.intensity:.1f} ops/byte, {count_text(speed, 'op/s')}, "
            f"{speed / min(e.peak.int8_ops, one.intensity * e.peak.bytes_per_second):.1%} of the "
            "line</span></li>"
        )
    return (
        "<div class='card roof'><div><div class=scroll tabindex=0 role=region aria-label=roofline>"
        f"{draw_roofline(points, e.peak)}</div>"
        "<p class=quiet>Up: operations per second. The line is the "
        f"peak of {escape(str(e.peak))}; a point is the forecast of a layer.</p></div>"
        f"<ol>{''.join(items)}</ol></div>"
    )


def _graph_pair(number: int, groups: Sequence[LayerGroup], e: Explanation) -> str:
    one = groups[0].first
    name = " and ".join(group.name for group in groups)
    back = ", ".join(
        f"<a href=#row-{e.groups.index(group) + 1}>row {e.groups.index(group) + 1}</a>"
        for group in groups
    )
    drawn = "".join(
        f"<div><h4>{who}: {_count(graph)}</h4><div class=scroll tabindex=0 role=region "
        f"aria-label='{escape(who)} GE nodes'>{draw_graph(graph, f'{who}: GE nodes of {name}')}"
        "</div></div>"
        for who, graph in (("lq_graph", one.ours), ("the vendor's module", one.vendor))
    )
    return (
        f"<section class='card block' id=graph-{number}><details{' open' if number == 1 else ''}>"
        f"<summary><h3>{_name(name)}</h3><span>{_count(one.ours)}, "
        f"the vendor's module {len(one.vendor.compute)}</span></summary>"
        f"<p class=quiet>{back}; {escape(one.plan.row.source)}</p><div class=pair>{drawn}</div>"
        "</details></section>"
    )


def _count(graph: Any) -> str:
    count = len(graph.compute)
    return f"{count} GE node{'s' if count > 1 else ''}"


def _about(e: Explanation) -> Iterable[str]:
    said: Mapping[str, str] = {
        "Kernel": "a GE node that runs on the device; inputs, constants and reshapes are none.",
        "Forecast": "microseconds from bytes, operations and a launch for each kernel, by a cost "
        "model that is fitted to public measurements; &plusmn; is its relative error. "
        '"assumed": nobody has published a measurement of this operator. '
        f"{e.total.assumed:.0%} of the forecast of one call is assumed. The outlined part of a "
        "bar is the launch.",
        "Bound": "the largest part of a kernel's forecast: bandwidth, compute or launch. In the "
        "table of layers: memory or compute, whichever takes longer at the peaks.",
        "At peak": f"the larger of operations and bytes, each over the peak of "
        f"{escape(str(e.peak))}. A lower bound: no kernel reaches its peak.",
        "Bytes": "that the device reads and writes, each tensor once.",
        "MAC": "a multiply-accumulate, two operations.",
        "Vendor": f"in a row of the table: the vendor's module, lowered by torchair. In a layer: "
        f"{escape(VENDOR_SOURCE)}.",
    }
    if e.total.unknown:
        unknown = f"of {e.total.unknown} kernels the graph lacks a size, which counts nothing."
        said = {**said, "Not known": f"{unknown} Their bytes have a &ge;."}
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in said.items())
    yield f"<div class=card><dl>{items}</dl></div>"


def _table(rows: Sequence[Sequence[object]], about: Sequence[str], numbers: set[int]) -> str:
    """A small table, its head first."""
    head, *body = rows
    title, kind = about

    def cell(tag: str, i: int, value: object) -> str:
        text = f"{value:,}" if isinstance(value, int) else escape(str(value))
        name = f" data-label='{escape(str(head[i]))}'" if tag == "td" else ""
        return f"<{tag}{' class=n' if i in numbers else ''}{name}>{text}</{tag[:2]}>"

    heads = "".join(cell("th scope=col", i, value) for i, value in enumerate(head))
    lines = "".join(
        f"<tr>{''.join(cell('td' if i else 'th scope=row', i, v) for i, v in enumerate(row))}</tr>"
        for row in body
    )
    return (
        f"<table class={kind} aria-label='{escape(title)}'><thead><tr>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )
