"""Quantizations of activations: equal ones become one, and get the vendor's name."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..backends.compat import OpOverload
from .editor import Editor, is_pure, storages_of, value_of

__all__ = [
    "equal_quantizations",
    "frozen",
    "merge_equal",
    "merge_equal_quantizations",
    "name_as_torch_npu",
    "repeated_products",
]

_aten, _ours = torch.ops.aten, torch.ops.lq_graph


# namespaces whose operators say whether they draw random numbers
_NAMESPACES = ("aten", "lq_graph", "npu", "prims")
_QUANTIZATIONS = {
    _aten.view.default,
    _aten.reshape.default,
    _aten.split.Tensor,  # a view for torch, and a kernel in GE
    _aten.split_with_sizes.default,
    operator.getitem,
    _ours.dynamic_quant.default,
    _ours.static_quant.default,
    _ours.linear_quant.default,
}
_VIEWS = (_aten.view.default, _aten.reshape.default, operator.getitem)


def merge_equal_quantizations(editor: Editor) -> None:
    """Make one of equal quantizations, quantized products, and the views and splits between.

    This is done before norms are fused: they need a quantization for each reader to be one. Other
    calls come last (`merge_equal`), because two norms of one tensor have equal pieces.
    """
    _merge(editor, "equal_quantizations", lambda node: node.target in _QUANTIZATIONS)


def equal_quantizations(editor: Editor) -> dict[Node, Node]:
    """For each of these calls, the first that is equal to it: maybe itself. The graph stays."""
    first: dict[Hashable, Node] = {}
    equal: dict[Node, Node] = {}

    def arguments(node: Node) -> Hashable:
        return frozen(map_arg((node.args, node.kwargs), lambda one: equal.get(one, one)))

    for node in _mergeable(editor, lambda node: node.target in _QUANTIZATIONS):
        equal[node] = first.setdefault((node.target, arguments(node)), node)
    return equal


def repeated_products(editor: Editor) -> int:
    """How many products of merged layers are there more than once: a layer's part is the whole
    product and a split, until equal ones become one."""
    seen: Counter[Node] = Counter()
    for node in editor.calls(_ours.linear_quant.default):
        weight, split = node.args[1], _aten.split_with_sizes.default
        if isinstance(weight, Node) and any(user.target is split for user in node.users):
            seen[weight] += 1
    return sum(count > 1 for count in seen.values())


def merge_equal(editor: Editor) -> None:
    """Make one of equal calls of any operator without side effects."""
    _merge(editor, "equal_calls", _has_one_result)


def _merge(editor: Editor, fusion: str, fits: Callable[[Node], bool]) -> None:
    """Left alone are a call that reads or makes a tensor which the graph writes into, because its
    value may differ from place to place, and two tensors that the graph returns, because their
    reader may write into one of them."""
    first: dict[Hashable, Node] = {}
    for node in _mergeable(editor, fits):
        key = node.target, frozen(node.args), frozen(node.kwargs), node.meta.get("stream_label")
        known = first.setdefault(key, node)
        if known is not node and not (_is_returned(node) and _is_returned(known)):
            node.replace_all_uses_with(known)
            editor.graph.erase_node(node)
            if node.target not in _VIEWS:
                editor.did(fusion, node)


def _mergeable(editor: Editor, fits: Callable[[Node], bool]) -> Iterator[Node]:
    """The calls whose value is the same at any place of the graph."""
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or not is_pure(node) or not fits(node):
            continue
        if not any(
            storages_of(value_of(n)) & editor.written for n in (node, *node.all_input_nodes)
        ):
            yield node


def _has_one_result(node: Node) -> bool:
    """Whether a call's result depends on its arguments alone."""
    if not isinstance(node.target, OpOverload):  # of the operator module, on sizes and results
        return True
    name = node.target._schema.name
    space, _, operation = name.partition("::")
    random = "dropout" in operation or "rand" in operation  # torch_npu's do not say so
    # the values of empty memory are nobody's
    return space in _NAMESPACES and not random and "empty" not in operation


def _is_returned(node: Node) -> bool:
    """Whether the graph returns a tensor of the call, or a view of it."""
    mine = storages_of(value_of(node))
    return any(
        user.op == "output" or (mine & storages_of(value_of(user)) and _is_returned(user))
        for user in node.users
    )


def name_as_torch_npu(editor: Editor) -> None:
    """Call npu_dynamic_quant where it does what lq_graph::dynamic_quant does: to int8.

    To int4 ours lowers to fewer nodes. The fake kernel has checked the call already.
    """
    npu = getattr(torch.ops.npu, "npu_dynamic_quant", None)
    if npu is None:
        return
    for node in editor.calls(_ours.dynamic_quant.default):
        if value_of(node)[0].dtype == torch.int8 and value_of(node)[0].device.type == "npu":
            node.target, node.kwargs = npu.default, {}
            editor.did("npu_operators", node)


def frozen(value: Any) -> Hashable:
    """The arguments of a call, to compare them."""
    if isinstance(value, dict):
        return tuple(sorted((key, frozen(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(frozen, value))
    return (type(value), value)  # 1, 1.0 and True are equal and differ
