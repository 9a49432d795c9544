"""Quantizations of activations: equal ones become one, and get the vendor's name."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..backends.compat import OpOverload
from .editor import Editor, is_pure, value_of

__all__ = ["merge_equal", "name_as_torch_npu"]

_aten, _ours = torch.ops.aten, torch.ops.lq_graph


def merge_equal(editor: Editor) -> None:
    """Make one of equal calls: quantizations, quantized products, and the views between. A split
    is a view for torch, and a kernel in GE.

    Other operators are left to the compilers. A call that reads a tensor which the graph writes
    into is left: its value may differ from place to place.
    """
    targets = {
        _aten.view.default,
        _aten.reshape.default,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        operator.getitem,
        _ours.dynamic_quant.default,
        _ours.static_quant.default,
        _ours.linear_quant.default,
    }
    written = _written(editor)
    first: dict[Hashable, Node] = {}
    for node in list(editor.graph.nodes):
        if node.op != "call_function" or node.target not in targets or not is_pure(node):
            continue
        if any(_storages(value_of(i)) & written for i in node.all_input_nodes):
            continue
        key = node.target, _frozen(node.args), _frozen(node.kwargs), node.meta.get("stream_label")
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            editor.graph.erase_node(node)
            if node.target in (_ours.dynamic_quant.default, _ours.static_quant.default):
                editor.did("equal_calls", node)


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


def _written(editor: Editor) -> set[int]:
    """The storages that calls of the graph write into."""
    found: set[int] = set()
    for node in editor.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            for read in node.all_input_nodes:
                found |= _storages(value_of(read))
    return found


def _storages(value: Any) -> set[int]:
    if isinstance(value, Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, tuple | list):
        return set().union(*map(_storages, value))
    return set()


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(one)) for key, one in value.items()))
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    return (type(value), value)  # 1, 1.0 and True are equal and differ
