"""What the nodes of a pattern are: arguments by name, tensors behind views, parts of a tensor."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from .editor import Editor, arguments_of, is_call, shape_of, storages_of, value_of

__all__ = [
    "Part",
    "behind_views",
    "number",
    "order_of",
    "part_of",
    "parts_of",
    "reads_written",
    "replay_views",
    "same_place",
    "same_stream",
    "single_user",
]

_aten = torch.ops.aten
_VIEWS = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.alias.default,
}
_SPLITS = {_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default}
_END = 2**63 - 1  # of a slice without an end


def number(size: Any) -> int | None:
    """A size, if it is known while the graph is compiled."""
    return size if type(size) is int else None


def same_stream(*nodes: Node) -> bool:
    """Whether all run on one stream: torchair's scopes label the others."""
    return len({str(node.meta.get("stream_label")) for node in nodes}) == 1


def _is_view_of_rows(node: Any) -> bool:
    """Whether a call changes only how the rows of a tensor are counted: its last dim stays."""
    if not is_call(node, *_VIEWS) or not isinstance(node.args[0], Node):
        return False
    before, after = value_of(node.args[0]).shape, value_of(node).shape
    return len(before) > 0 and len(after) > 0 and str(before[-1]) == str(after[-1])


def behind_views(node: Any) -> Any:
    """The tensor whose rows a node has, in their order."""
    while _is_view_of_rows(node):
        node = node.args[0]
    return node


def _users_behind_views(node: Node) -> list[Node]:
    """Who reads the rows of a tensor; a view that nobody reads counts."""
    found = []
    for user in node.users:
        found += _users_behind_views(user) if _is_view_of_rows(user) and user.users else [user]
    return found


def single_user(node: Node, user: Node) -> bool:
    """Whether one call alone reads a tensor, itself or as views of its rows."""
    return set(_users_behind_views(node)) == {user}


def replay_views(editor: Editor, node: Node, last: Node, first: Node, before: Node) -> Node:
    """Give a tensor the views that lead from one with its shape, `first`, to `last`."""
    chain = []
    while last is not first:
        chain.append(last)
        last = last.args[0]  # type: ignore[assignment]
    for view in reversed(chain):
        kept: dict[str, Any] = dict(view.kwargs)
        node = editor.call(view.target, node, *view.args[1:], before=before, **kept)
    return node


def reads_written(editor: Editor, *nodes: Any) -> bool:
    """Whether the graph writes into one of the tensors: it may have another value elsewhere."""
    written = editor.written()
    return any(storages_of(value_of(node)) & written for node in nodes if isinstance(node, Node))


def order_of(node: Any) -> list[int] | None:
    """For a transpose, the dim of its input that each dim of its output is."""
    if not is_call(node, _aten.transpose.int, _aten.permute.default):
        return None
    dims = len(shape_of(node))
    order = list(range(dims))
    if node.target is _aten.permute.default:
        return [int(dim) % dims for dim in node.args[1]]
    one, two = (int(dim) % dims for dim in node.args[1:3])
    order[one], order[two] = order[two], order[one]
    return order


class Part(NamedTuple):
    """Values of the last dim of a tensor: start, start + step, ... before stop."""

    source: Node
    start: int
    stop: int
    step: int = 1


def part_of(node: Any) -> Part | None:
    """Which part of a tensor's last dim a slice, or one result of a split, is; None if it is none,
    or if run time alone knows."""
    if is_call(node, _aten.slice.Tensor):
        given = arguments_of(node)
        source, dim, step = given["self"], given["dim"], given["step"]
        start, stop = given["start"] or 0, _END if given["end"] is None else given["end"]
    elif is_call(node, operator.getitem) and is_call(node.args[0], *_SPLITS):
        given = arguments_of(node.args[0])
        source, dim, step = given["self"], given["dim"], 1
        sizes = [value_of(node.args[0])[i].shape[dim] for i in range(len(value_of(node.args[0])))]
        if any(type(size) is not int for size in sizes):
            return None
        start = sum(sizes[: node.args[1]])
        stop = start + sizes[node.args[1]]
    else:
        return None
    shape = value_of(source).shape
    if dim not in (-1, len(shape) - 1) or number(shape[-1]) is None:
        return None
    if not all(type(one) is int for one in (start, stop, step)):
        return None
    start, stop = (one + shape[-1] if one < 0 else one for one in (start, stop))
    return Part(source, max(start, 0), min(stop, shape[-1]), step)


def parts_of(node: Node) -> set[Node]:
    """Who reads a tensor, behind views and splits."""
    found: set[Node] = set()
    for user in node.users:
        if _is_view_of_rows(user):
            found |= parts_of(user)
        else:
            found |= set(user.users) if is_call(user, *_SPLITS) else {user}
    return found


def same_place(first: Any, second: Any) -> bool:
    """Whether two nodes are one tensor: the same node, or equal views of one."""
    if first is second:
        return True
    if not (is_call(first, *_VIEWS) and is_call(second, *_VIEWS)):
        return False
    if first.target is not second.target or first.kwargs or second.kwargs:
        return False
    (one, *rest), (other, *others) = first.args, second.args
    return str(rest) == str(others) and same_place(one, other)
