"""What the fusions of several calls share: near misses, and the reading of neighbours."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..backends.compat_npu import find_operator
from .editor import Editor, is_call, is_contiguous, same_shape, storages_of, value_of

__all__ = [
    "VIEWS",
    "NearMissError",
    "cast_from",
    "check_place",
    "every",
    "need",
    "only_user",
    "operator_of",
    "replace_results",
    "results",
]

_aten, _prims, _npu = torch.ops.aten, torch.ops.prims, torch.ops.npu
VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


class NearMissError(Exception):
    """Nodes that look like a pattern and are not replaced; its text says why."""


def need(condition: bool, why: str) -> None:
    """Raise NearMissError unless a condition holds."""
    if not condition:
        raise NearMissError(why)


def every(
    editor: Editor, fusion: str, nodes: list[Node], run: Callable[[Editor, Node, set[int]], bool]
) -> None:
    """Run a fusion at each node, and note what was done or what came near."""
    written = editor.written() if nodes else set()
    for node in nodes:
        if node._erased:
            continue
        try:
            done = run(editor, node, written)
        except NearMissError as why:
            editor.left(fusion, node, str(why))
            continue
        if done:
            editor.did(fusion, node)


def operator_of(name: str, *arguments: str) -> Any:
    """An operator of torch_npu that takes these arguments."""
    found = find_operator(name, *arguments)
    need(found is not None, f"this torch_npu or its torchair has no {name}")
    return found


def check_place(written: set[int], inputs: list[Node], *nodes: Node) -> None:
    """Whether the nodes may be computed at one place."""
    device = value_of(inputs[0]).device
    need(device.type == "npu", f"the tensors are on {device.type}")
    need(all(value_of(node).device == device for node in inputs), "the tensors are on two devices")
    streams = {node.meta.get("stream_label") for node in nodes}
    need(len(streams) == 1, "its nodes are on two streams")
    need(
        not any(storages_of(value_of(node)) & written for node in inputs),
        "the graph writes into a tensor that it reads",
    )


def only_user(node: Node, name: str) -> Node:
    """The one user that a node must have; name is what the reason calls it."""
    users = list(node.users)
    need(len(users) == 1, f"{name} has {len(users)} users")
    return users[0]


def cast_from(node: Any, *, same_layout: bool = True) -> Node | None:
    """What a node casts to another dtype, if it does nothing else; a cast of a part of a tensor may
    also make it contiguous, unless `same_layout`."""
    casts = [_aten._to_copy.default, _prims.convert_element_type.default]
    if (cast := getattr(_npu, "_npu_dtype_cast", None)) is not None:
        casts.append(cast.default)
    if not is_call(node, *casts):
        return None
    source = node.args[0]
    if not isinstance(source, Node) or not isinstance(value_of(source), Tensor):
        return None
    before, after = value_of(source), value_of(node)
    if before.device != after.device or not same_shape(source, node):
        return None
    same = not same_layout or is_contiguous(source) == is_contiguous(node)
    return source if same else None


def results(editor: Editor, call: Node) -> Callable[[int], Node]:
    """Makes the results of a call after it, each when it is first asked for."""
    made: dict[int, Node] = {}

    def result(index: int) -> Node:
        if index not in made:
            made[index] = editor.call(operator.getitem, call, index, before=call.next, like=call)
        return made[index]

    return result


def replace_results(editor: Editor, old: Node, new: dict[int, Node]) -> None:
    """Let every user of a call's results use others; the call goes, and results without users."""
    for item in list(old.users):
        editor.replace(item, new[item.args[1]])  # type: ignore[index]
    for node in (old, *new.values()):
        editor.drop(node)
