"""What fused in each layer of a model, and its kernels beside the vendor's way of writing it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..fusion.editor import FusionReport, Line
from ..reports import table

__all__ = ["REST", "VENDOR_KERNELS", "VENDOR_SOURCE", "Block", "blocks_of", "groups_of"]

REST = "(rest of the model)"  # what belongs to no numbered module
_NUMBERED = re.compile(r"^.*?(?<![^.])\d+(?![^.])")
_INNER = re.compile(r"(\.linear)?(\.merged)?$")  # of a QuantizedLinear
_NAMES = 3  # of modules, in a line of a table

# A decoder layer, one decode step, A8W8 dynamic, its cache in blocks. A test counts them.
VENDOR_KERNELS: dict[str, int] = {
    "AddRmsNormDynamicQuant": 2,
    "QuantBatchMatmulV3": 4,
    "SplitV": 1,
    "ApplyRotaryPosEmb": 1,
    "ScatterNdUpdate": 2,
    "FusedInferAttentionScore": 1,
    "DynamicQuant": 1,
    "DequantSwigluQuant": 1,
}
VENDOR_SOURCE = (
    "one layer in torch_npu's fused operators, in the style of cann-recipes-infer: "
    "benchmarks/vendor_layer.py of lq_graph, lowered by torchair"
)
_ATTENTION = {
    "FusedInferAttentionScore",
    "IncreFlashAttention",
    "PromptFlashAttention",
    "SoftmaxV2",
}


@dataclass(frozen=True)
class Block:
    """A layer of a model: a numbered module, such as model.layers.0, or all the rest.

    Attributes:
        name: of the module, or REST.
        unfused, fused: its kernels in the GE graph without fusions and with them, by operator.
        lines: what fused in it, and what came near and did not, with the reason.
    """

    name: str
    unfused: Counter[str]
    fused: Counter[str]
    lines: tuple[Line, ...]

    @property
    def has_attention(self) -> bool:
        """Whether it can be set beside the vendor's decoder layer."""
        return self.name != REST and bool(_ATTENTION & set(self.unfused))

    def kernels(self) -> list[list[object]]:
        """The table of kernels, its head first: by operator, without fusion, with it, and the
        vendor's if it is a layer with attention."""
        ways: dict[str, Any] = {"unfused": self.unfused, "fused": self.fused}
        if self.has_attention:
            ways["vendor"] = Counter(VENDOR_KERNELS)
        names = {name for counts in ways.values() for name in counts}
        order = sorted(names, key=lambda name: (-self.fused[name], -self.unfused[name], name))
        rows: list[list[object]] = [["kernel", *ways]]
        rows += [[name, *(counts[name] for counts in ways.values())] for name in order]
        return [*rows, ["all", *(sum(counts.values()) for counts in ways.values())]]

    def fusions(self) -> list[list[object]]:
        """The table of fusions, its head first: how often, where, or what blocked it."""
        found: dict[tuple[str, str], list[str]] = {}
        for line in self.lines:
            where = _INNER.sub("", line.layer.removeprefix(self.name).strip("."))
            found.setdefault((line.fusion, line.why_not), []).append(where or "(itself)")
        rows: list[list[object]] = [["fusion", "done", "left", "in", "blocked by"]]
        for (fusion, why), places in sorted(found.items(), key=lambda item: bool(item[0][1])):
            done, left = (0, len(places)) if why else (len(places), 0)
            names = list(dict.fromkeys(places))
            if (more := len(names) - _NAMES) > 0:
                names[_NAMES:] = [f"and {more} more"]
            rows.append([fusion, done, left, ", ".join(names), why])
        return rows

    def text(self, others: int) -> list[str]:
        """Lines for a terminal; `others` is how many layers are like it."""
        counts = [sum(way.values()) for way in (self.unfused, self.fused)]
        head = f"{titled(self.name, others)}: {counts[0]} kernels without fusion, {counts[1]} with"
        if self.has_attention:
            head += f"; {sum(VENDOR_KERNELS.values())} in the vendor's operators"
        lines = ["", head]
        if self.lines:
            lines += table(self.fusions(), "  ")
        elif self.unfused:
            lines.append("  nothing fused, and no pattern came near")
        return [*lines, "", *table(self.kernels(), "  ")] if self.unfused else lines


def titled(name: str, others: int) -> str:
    """The name of a layer, and how many are like it."""
    return f"{name} and {others} like it" if others else name


def _block_of(module: str) -> str:
    found = _NUMBERED.match(module)
    return found[0] if found else REST


def blocks_of(
    unfused: Iterable[Any],
    without: Sequence[FusionReport],
    fused: Iterable[Any],
    reports: Sequence[FusionReport],
) -> tuple[Block, ...]:
    """The layers of a model, in the order of its modules, the rest last.

    Args:
        unfused, fused: GE graphs (`lq_graph.converters.graph.Graph`) without and with fusions.
        without, reports: of the fusions in these graphs, with their `modules`.
    """
    before, after = _counted(unfused, without), _counted(fused, reports)
    lines: dict[str, list[Line]] = {}
    for report in reports:
        for line in report.lines:
            lines.setdefault(_block_of(line.layer), []).append(line)
    names = sorted({*before, *after, *lines}, key=_order)
    none: Counter[str] = Counter()
    return tuple(
        Block(name, before.get(name, none), after.get(name, none), tuple(lines.get(name, ())))
        for name in names
    )


def _order(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    parts = [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]
    return name == REST, parts


def _counted(graphs: Iterable[Any], reports: Sequence[FusionReport]) -> dict[str, Counter[str]]:
    """The kernels of each layer."""
    found: dict[str, Counter[str]] = {}
    for graph in graphs:
        calls = _calls(graph)
        known = set(calls.values())
        # a graph without a quantized layer has no report
        modules = sorted((r.modules for r in reports), key=lambda m: -len(known.intersection(m)))
        names = modules[0] if modules else {}
        for node in graph.launches:
            block = _block_of(names.get(calls[node.name], ""))
            found.setdefault(block, Counter())[node.op] += 1
    return found


def _calls(graph: Any) -> dict[str, str]:
    """For each node the call that it is from. A converter makes several nodes of some calls, and
    the last has the name: the others are from the call that reads them."""
    calls: dict[str, str] = {}
    for node in reversed(graph.nodes):
        if node.call:
            calls[node.name] = node.call
        call = calls.setdefault(node.name, "")
        for edge in node.inputs:
            if call:
                calls.setdefault(edge.source, call)
    return calls


def groups_of(blocks: Sequence[Block]) -> list[tuple[Block, list[str]]]:
    """Each different layer, and the names of the others that are like it."""
    groups: dict[str, tuple[Block, list[str]]] = {}
    for block in blocks:
        key = str((block.has_attention, block.kernels(), block.fusions()))
        if key in groups:
            groups[key][1].append(block.name)
        else:
            groups[key] = block, []
    return list(groups.values())
