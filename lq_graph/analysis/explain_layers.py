"""What fused in each layer of a model, and its kernels beside the vendor's way of writing it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..fusion.editor import FusionReport, Line
from .explain_fold import pattern_of_name
from .explain_kernels import Kernel, kernels_of

__all__ = [
    "REST",
    "VENDOR_KERNELS",
    "VENDOR_SOURCE",
    "Block",
    "blocks_of",
    "groups_of",
    "without_linear",
]

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
        before, after: its kernels in the GE graph without fusions and with them, in order.
        lines: what fused in it, and what came near and did not, with the reason.
    """

    name: str
    before: tuple[Kernel, ...]
    after: tuple[Kernel, ...]
    lines: tuple[Line, ...]

    @property
    def unfused(self) -> Counter[str]:
        """Its kernels without fusions, by operator."""
        return Counter(kernel.op for kernel in self.before)

    @property
    def fused(self) -> Counter[str]:
        """Its kernels with fusions, by operator."""
        return Counter(kernel.op for kernel in self.after)

    @property
    def has_attention(self) -> bool:
        """Whether it can be set beside the vendor's decoder layer."""
        return self.name != REST and bool(_ATTENTION & set(self.unfused))

    def ways(self) -> dict[str, Counter[str]]:
        """Its kernels by operator: unfused, fused, and the vendor's if it has attention."""
        vendor = {"vendor": Counter(VENDOR_KERNELS)} if self.has_attention else {}
        return {"unfused": self.unfused, "fused": self.fused, **vendor}

    def kernels(self) -> list[list[object]]:
        """The table of kernels, its head first: by operator, without fusion, with it, and the
        vendor's if it is a layer with attention."""
        ways = self.ways()
        names = {name for counts in ways.values() for name in counts}
        fused, unfused = ways["fused"], ways["unfused"]
        order = sorted(names, key=lambda name: (-fused[name], -unfused[name], name))
        rows: list[list[object]] = [["kernel", *ways]]
        rows += [[name, *(counts[name] for counts in ways.values())] for name in order]
        return [*rows, ["all", *(counts.total() for counts in ways.values())]]

    def fusions(self) -> list[list[object]]:
        """The table of fusions, its head first: how often, where, or what blocked it."""
        found: dict[tuple[str, str], list[str]] = {}
        for line in self.lines:
            found.setdefault((line.fusion, line.why_not), []).append(self.inner(line.layer))
        rows: list[list[object]] = [["fusion", "done", "left", "in", "blocked by"]]
        for (fusion, why), places in sorted(found.items(), key=lambda item: bool(item[0][1])):
            done, left = (0, len(places)) if why else (len(places), 0)
            names = list(dict.fromkeys(places))
            if (more := len(names) - _NAMES) > 0:
                names[_NAMES:] = [f"and {more} more"]
            rows.append([fusion, done, left, ", ".join(names), why])
        return rows

    def inner(self, module: str) -> str:
        """The name of a module of this layer, without the layer's."""
        name = module.removeprefix(self.name) if self.name != REST else module
        return without_linear(name.strip(".")) or "(itself)"


def without_linear(name: str) -> str:
    """The name of a QuantizedLinear, if it is that of the layer inside; else the name."""
    return _INNER.sub("", name)


def _block_of(module: str) -> str:
    found = _NUMBERED.match(module)
    return found[0] if found else REST


def blocks_of(
    unfused: Iterable[Any],
    without: Sequence[FusionReport],
    fused: Iterable[Any],
    reports: Sequence[FusionReport],
    product: str,
) -> tuple[Block, ...]:
    """The layers of a model, in the order of its modules, the rest last.

    Args:
        unfused, fused: GE graphs (`lq_graph.converters.graph.Graph`) without and with fusions.
        without, reports: of the fusions in these graphs, with their `modules`.
        product: key of the product that the forecast is for.
    """
    before, after = _by_block(unfused, without, product), _by_block(fused, reports, product)
    lines: dict[str, list[Line]] = {}
    for report in reports:
        for line in report.lines:
            lines.setdefault(_block_of(line.layer), []).append(line)
    names = sorted({*before, *after, *lines}, key=_order)
    return tuple(
        Block(
            name,
            tuple(before.get(name, ())),
            tuple(after.get(name, ())),
            tuple(lines.get(name, ())),
        )
        for name in names
    )


def _order(name: str) -> tuple[bool, list[tuple[bool, int, str]]]:
    parts = [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]
    return name == REST, parts


def _by_block(
    graphs: Iterable[Any], reports: Sequence[FusionReport], product: str
) -> dict[str, list[Kernel]]:
    """The kernels of each layer, in order."""
    found: dict[str, list[Kernel]] = {}
    for graph in graphs:
        calls = _calls(graph)
        known = set(calls.values())
        # a graph without a quantized layer has no report
        modules = sorted((r.modules for r in reports), key=lambda m: -len(known.intersection(m)))
        names = modules[0] if modules else {}
        module_of = {node: names.get(call, "") for node, call in calls.items()}
        for kernel in kernels_of(graph, product, module_of):
            found.setdefault(_block_of(kernel.module), []).append(kernel)
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
    """Each different layer, and the names of all that are like it."""
    groups: dict[str, tuple[Block, list[str]]] = {}
    for block in blocks:
        shown = [(kernel.op, block.inner(kernel.module), kernel.cost) for kernel in block.after]
        about = block.has_attention, block.kernels(), block.fusions(), shown
        key = str((pattern_of_name(block.name), about))
        groups.setdefault(key, (block, []))[1].append(block.name)
    return list(groups.values())
