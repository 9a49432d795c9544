"""Quantizations of activations: equal ones become one, and get the vendor's name."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from .editor import Editor, is_pure, storages_of, value_of

__all__ = ["merge_equal", "name_as_torch_npu"]

_aten, _ours = torch.ops.aten, torch.ops.lq_graph


# namespaces whose operators say whether they draw random numbers
_NAMESPACES = ("aten", "lq_graph", "prims")
_VENDORS = ("npu::_npu_dtype_cast", "npu::npu_dynamic_quant", "npu::npu_quantize")
_VIEWS = (_aten.view.default, _aten.reshape.default, operator.getitem)


def merge_equal(editor: Editor) -> None:
    """Make one of equal calls of operators.

    Left alone are a call that reads or makes a tensor which the graph writes into, because its
    value may differ from place to place, and a tensor that the graph returns, because its reader
    may write into it.
    """
    written = editor.written()
    first: dict[Hashable, Node] = {}
    for node in list(editor.graph.nodes):
        if not _may_be_equal(node):
            continue
        if any(storages_of(value_of(n)) & written for n in (node, *node.all_input_nodes)):
            continue
        key = node.target, _frozen(node.args), _frozen(node.kwargs), node.meta.get("stream_label")
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            editor.graph.erase_node(node)
            if node.target not in _VIEWS:
                editor.did("equal_calls", node)


def _may_be_equal(node: Node) -> bool:
    if node.op != "call_function" or not is_pure(node):
        return False
    if _is_returned(node):
        return False
    if node.target is operator.getitem:
        return True
    name: str = node.target._schema.name  # type: ignore[union-attr]
    if "empty" in name:  # its values are nobody's
        return False
    return name.partition("::")[0] in _NAMESPACES or name in _VENDORS


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


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return (type(value), value)  # 1, 1.0 and True are equal and differ
