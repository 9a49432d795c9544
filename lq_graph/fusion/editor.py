"""A graph under change, and the record of what was done to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..backends.compat import OpOverload, detect_fake_mode
from ..reports import table

__all__ = [
    "CAPTURED",
    "GE",
    "Editor",
    "FusionReport",
    "Line",
    "Pass",
    "arguments_of",
    "is_call",
    "is_contiguous",
    "is_pure",
    "layer_of",
    "same_shape",
    "same_size",
    "shape_of",
    "storages_of",
    "value_of",
]

GE, CAPTURED = "GE", "captured"  # kinds of graphs; "" if that is not known

# what a new node takes over from a node that it replaces
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "stream_label", "custom", "seq_nr")


_NAMES = 3  # of modules, in a line of a report's table


@dataclass(frozen=True)
class Line:
    """A fusion at one place of a graph.

    Attributes:
        fusion: its name.
        layer: the module whose forward made the node, or "".
        why_not: "" if it was done; else what did not fit.
    """

    fusion: str
    layer: str
    why_not: str = ""


@dataclass
class FusionReport:
    """What the fusions did in a graph.

    Attributes:
        lines: what fused, and what came near and did not, in the order of the table.
        nodes_before, nodes_after: calls of operators in the FX graph.
        modules: for each call of the graph afterwards, by the name of its node, the module whose
            forward made it. For `reports()` only.
    """

    nodes_before: int = 0
    nodes_after: int = 0
    lines: list[Line] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)

    def done(self, fusion: str) -> int:
        """How often a fusion was done."""
        return sum(line.fusion == fusion and not line.why_not for line in self.lines)

    def rows(self) -> list[list[object]]:
        """The table of fusions, its head first: how often, in which modules, and what was left
        for which reason. A number in a module's name is shown as *."""
        found: dict[tuple[str, str], Counter[str]] = {}
        for line in self.lines:
            layer = re.sub(r"(?<![^.])\d+(?![^.])", "*", line.layer)
            found.setdefault((line.fusion, line.why_not), Counter())[layer or "(model)"] += 1
        rows: list[list[object]] = [["fusion", "places", "in", "left, because"]]
        for (fusion, why), layers in found.items():
            names = [name for name, _ in layers.most_common(_NAMES)]
            if more := len(layers) - len(names):
                names.append(f"and {more} more")
            rows.append([fusion, sum(layers.values()), ", ".join(names), why])
        return rows

    def __str__(self) -> str:
        head = f"{self.nodes_before:,} calls of operators before, {self.nodes_after:,} after"
        return "\n".join([head, *table(self.rows())])


class Editor:
    """Reads a graph and changes it.

    Every node that another reads has its fake tensors in `meta["val"]`, and so have the nodes that
    are added.

    Attributes:
        kind: GE if it becomes a GE graph, CAPTURED if its operators are called one by one and
            captured, or "" if that is not known.
        written: the storages that calls of the graph write into: what reads one of them may have
            another value at another place.
    """

    def __init__(self, module: GraphModule, kind: str = "") -> None:
        self.module = module
        self.kind = kind
        self.graph: Graph = module.graph
        self.report = FusionReport(nodes_before=self.count())
        self.written: set[int] = set()
        self._alive: list[Any] = []  # else another tensor may get the place of such a storage
        for node in self.graph.nodes:  # once: no fusion adds a call that writes
            if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
                for read in node.all_input_nodes:
                    self._note_written(value_of(read))
        values = (node.meta.get("val") for node in self.graph.nodes)
        self._fake = detect_fake_mode([v for v in values if isinstance(v, Tensor)])

    def count(self) -> int:
        """Calls of operators."""
        return sum(isinstance(n.target, OpOverload) for n in self.graph.nodes)

    # ---- reading ----

    def unknown(self) -> Node | None:
        """A node that others read and that has no fake tensor, if there is one."""
        return next((n for n in self.graph.nodes if n.users and "val" not in n.meta), None)

    def calls(self, *targets: Any) -> list[Node]:
        """The calls of operators, in the graph's order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def _note_written(self, value: Any) -> None:
        self.written |= storages_of(value)
        self._alive.append(value)

    # ---- changing ----

    def call(
        self, target: Any, *args: Any, before: Node, like: Node | None = None, **kwargs: Any
    ) -> Node:
        """Add a call of an operator before a node.

        Args:
            target: the overload.
            before: a node that stands after all arguments.
            like: the node whose place in the model it takes over; default `before`.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        origin = before if like is None else like
        node.meta.update({key: origin.meta[key] for key in _KEPT if key in origin.meta})
        values = torch.fx.node.map_arg((args, kwargs), value_of)
        # an item of a tuple is there; to enter the fake mode takes longer than to get it
        mode = self._fake if isinstance(target, OpOverload) else None
        with mode or nullcontext():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let every user of `old` use `new`; `old` goes, and with it what only it used."""
        if storages_of(value_of(old)) & self.written:
            self._note_written(value_of(new))
        old.replace_all_uses_with(new)
        self.drop(old)

    def drop(self, *nodes: Node) -> None:
        """Erase calls without users, and then those that only they used."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node._erased or node.users or node.op != "call_function" or not is_pure(node):
                continue
            inputs = node.all_input_nodes
            self.graph.erase_node(node)
            waiting += inputs

    # ---- the record ----

    def did(self, fusion: str, node: Node) -> None:
        """Note that a fusion was done."""
        self.report.lines.append(Line(fusion, layer_of(node)))

    def left(self, fusion: str, node: Node, why: str) -> None:
        """Note that a fusion came near and was not done."""
        self.report.lines.append(Line(fusion, layer_of(node), why))


def is_pure(node: Node) -> bool:
    """Whether a call may be dropped if nobody uses it, and is the same each time."""
    if node.op != "call_function":
        return False
    if not isinstance(node.target, OpOverload):
        return node.target.__module__ in ("_operator", "operator")
    schema, tags = node.target._schema, node.target.tags
    checks = not schema.returns  # of a condition, such as _assert_scalar
    return not (checks or schema.is_mutable or torch.Tag.nondeterministic_seeded in tags)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether it is a node that calls one of the operators."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value_of(node: Node) -> Any:
    """The fake tensors of a node; None if it returns nothing."""
    return node.meta.get("val")


def shape_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node's tensor; sizes may be symbolic."""
    return tuple(value_of(node).shape)


def storages_of(value: Any) -> set[int]:
    """The storages of fake tensors."""
    if isinstance(value, Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, tuple | list):
        return set().union(*map(storages_of, value))
    return set()


def arguments_of(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by their names, those that are not given too."""
    assert isinstance(node.target, OpOverload)
    arguments = node.target._schema.arguments
    found = {one.name: one.default_value for one in arguments}
    found.update(zip((one.name for one in arguments), node.args, strict=False))
    return {**found, **node.kwargs}


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same, as far as this is known without a guard."""
    return bool(a == b) if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def same_shape(first: Node, second: Node) -> bool:
    """Whether two tensors have the same sizes, as far as this is known without a guard."""
    one, two = shape_of(first), shape_of(second)
    return len(one) == len(two) and all(map(same_size, one, two))


def is_contiguous(node: Node, order: Sequence[int] | None = None) -> bool:
    """Whether a tensor is row-major without gaps, as far as this is known without a guard; or, with
    an order of its dims, whether it is with the dims in that order."""
    value, wanted = value_of(node), 1
    for dim in reversed(range(value.dim()) if order is None else order):
        size, stride = value.shape[dim], value.stride(dim)
        if not same_size(size, 1):
            if not same_size(stride, wanted):
                return False
            wanted = wanted * size
    return True


def layer_of(node: Node) -> str:
    """The name of the innermost module whose forward made a node, as in named_modules()."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    *_, (name, _) = stack.values()
    # Dynamo names a module as it finds it in the frame: L['self'].layers[0], L['args'][0].layers
    name = re.sub(r"^L\[['\"]\w+['\"]\](\[\d+\])?", "", str(name))
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", name).strip(".")


Pass = Callable[[Editor], None]
