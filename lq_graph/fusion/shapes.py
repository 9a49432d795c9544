"""Views, transposes and casts that change nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..backends.compat import OpOverload
from .editor import CAPTURED, Editor, same_shape, same_size, shape_of, value_of
from .parts import order_of

__all__ = ["give_all_dims", "remove_needless"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


def remove_needless(editor: Editor) -> None:
    """Let a view of a view read the first tensor; drop views, expands, casts and products with 1
    that change nothing. A transpose of a transpose is gone if they cancel, and a transpose that
    moves only dims of size 1 becomes a reshape, which is no kernel."""
    for node in editor.calls(*_VIEWS):
        source = node.args[0]
        if isinstance(source, Node) and source.op == "call_function" and source.target in _VIEWS:
            node.replace_input_with(source, source.args[0])  # type: ignore[arg-type]
            editor.drop(source)
    for node in editor.calls(_aten.transpose.int, _aten.permute.default):
        _remove_transpose(editor, node)
    for node in editor.calls(
        *_VIEWS, _aten.expand.default, _aten._to_copy.default, _aten.mul.Tensor
    ):
        if _changes_nothing(node):
            editor.did("shapes", node)
            editor.replace(node, node.args[0])  # type: ignore[arg-type]


def give_all_dims(editor: Editor) -> None:
    """Let the first operand of a pointwise call in a captured graph have all dims of the result.

    The pass that makes such calls in place (torch.fx.passes.reinplace, and torchair's copy of it)
    compares how many values both have, not their shapes: w (256,) * x (1, 1, 256) would become
    w.mul_(x), which fails. Cohere's LayerNorm has this. It comes last: patterns know such a w.
    """
    if editor.kind != CAPTURED:
        return
    for node in list(editor.graph.nodes):
        if not isinstance(node.target, OpOverload) or torch.Tag.pointwise not in node.target.tags:
            continue
        first = node.args[0] if node.args else None
        if not isinstance(first, Node) or not isinstance(value_of(first), Tensor):
            continue
        if not isinstance(value_of(node), Tensor) or not value_of(first).dim():
            continue  # with dims, a tensor of none would change the dtype of the result
        sizes, missing = shape_of(node), len(shape_of(node)) - len(shape_of(first))
        same = [same_size(*pair) for pair in zip(sizes[missing:], shape_of(first), strict=False)]
        if missing > 0 and all(same) and all(same_size(size, 1) for size in sizes[:missing]):
            for _ in range(missing):
                first = editor.call(_aten.unsqueeze.default, first, 0, before=node)
            node.update_arg(0, first)
            editor.did("all_dims", node)


def _remove_transpose(editor: Editor, node: Node) -> None:
    source, order = node.args[0], order_of(node)
    if not isinstance(source, Node) or order is None or _is_returned(node):
        return
    inner = order_of(source)
    if inner is not None and [inner[dim] for dim in order] == sorted(order):
        editor.did("shapes", node)
        editor.replace(node, source.args[0])  # type: ignore[arg-type]
        return
    shape = shape_of(node)
    moved = [dim for dim in order if shape_of(source)[dim] != 1]
    if moved == sorted(moved) and sum(not isinstance(size, int) for size in shape) <= 1:
        target = [size if isinstance(size, int) else -1 for size in shape]
        editor.did("shapes", node)
        view = editor.call(_aten.reshape.default, source, target, before=node)
        editor.replace(node, view)


def _changes_nothing(node: Node) -> bool:
    source = node.args[0]
    if not isinstance(source, Node) or _is_returned(node):
        return False
    before, after = value_of(source), value_of(node)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    if node.target is _aten.mul.Tensor and node.args[1] not in (1, 1.0):
        return False
    return (
        same_shape(source, node)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.stride() == after.stride()
    )


def _is_returned(node: Node) -> bool:
    """Whether the graph returns the tensor: it must then be no input's own memory."""
    return any(user.op == "output" for user in node.users)
