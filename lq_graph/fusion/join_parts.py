"""Inductor computes the parts of a merged weight as one product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .editor import Editor, arguments_of, shape_of, value_of
from .quantizations import equal_quantizations, frozen

__all__ = ["join_parts_of"]

_aten, _ours = torch.ops.aten, torch.ops.lq_graph
_DONE = "_lq_graph_joined"  # attribute of a graph module
_PRODUCTS = (_ours.linear_quant.default,)
# Arguments with a row, or a value, for each of n; dims of each. One offset may be for all of n.
_OF_ROWS = {"weight": 2, "scale": 1, "bias": 1, "offset": 1, "float_scale": 1}


def join_parts_of(match: Any, **_: Any) -> None:
    """At the first match of a product in a graph, join the parts of the whole graph."""
    module = match.ctx.graph.owning_module
    if not getattr(module, _DONE, False):
        setattr(module, _DONE, True)
        editor = Editor(module)
        if editor.unknown() is None:
            _join_parts(editor)


def _join_parts(editor: Editor) -> None:
    """Compute the products of all parts of a merged weight with one input as one product.

    In a graph for the CPU each part is the product of its rows (`MergedPart.forward`), so a graph
    that this does not see computes no row twice.
    """
    equal = equal_quantizations(editor)
    groups: dict[Any, list[_Part]] = {}
    for node in editor.calls(*_PRODUCTS):
        if (part := _part_of(node)) is not None:
            same = map_arg((part.args, part.kwargs), lambda one: equal.get(one, one))
            groups.setdefault((node.target, frozen(same)), []).append(part)
    for parts in groups.values():
        _join(editor, parts)


class _Part(NamedTuple):
    """The product of some rows of a weight.

    Attributes:
        node: the call.
        start, end: the rows.
        n: how many the weight has.
        args, kwargs: of the call for all rows.
    """

    node: Node
    start: int
    end: int
    n: int
    args: Any
    kwargs: Any


def _part_of(node: Node) -> _Part | None:
    """A call as a part; None if what belongs to its rows is not the same rows of other tensors."""
    given = arguments_of(node)
    rows = {name: given[name] for name in _OF_ROWS if given.get(name) is not None}
    if "offset" in rows and shape_of(rows["offset"]) == (1,):
        del rows["offset"]
    if not all(_is_rows(one, _OF_ROWS[name]) for name, one in rows.items()):
        return None
    whole = {name: one.args[0] for name, one in rows.items()}
    spans = {
        (rows[name].args[2], shape_of(rows[name])[0], shape_of(whole[name])[0]) for name in rows
    }
    if len(spans) != 1:
        return None
    start, size, n = spans.pop()
    # by position what was by position: the pattern of `inductor` counts these
    args = tuple(whole.get(name, arg) for name, arg in zip(given, node.args, strict=False))
    kwargs = {name: whole.get(name, arg) for name, arg in node.kwargs.items()}
    return _Part(node, start, start + size, n, args, kwargs)


def _is_rows(node: Any, dims: int) -> bool:
    """Whether a node is tensor[start:end] of so many dims, its sizes numbers."""
    if not isinstance(node, Node) or node.target is not _aten.slice.Tensor:
        return False
    if len(node.args) not in (3, 4) or node.kwargs:  # with a step, or without a start
        return False
    dim, start = node.args[1:3]
    source = node.args[0]
    assert isinstance(source, Node)
    sizes = shape_of(node)[0], shape_of(source)[0]
    return (
        len(shape_of(node)) == dims
        and all(isinstance(size, int) for size in sizes)
        and isinstance(start, int)
        and start >= 0
        and bool(dim == 0)
    )


def _join(editor: Editor, parts: list[_Part]) -> None:
    """Replace the products of the parts by one, if they have all rows, each once."""
    first = parts[0]
    rows = sorted((part.start, part.end) for part in parts)
    ends = [0, *(end for _, end in rows)]
    if len(parts) < 2 or [*(start for start, _ in rows), first.n] != ends:
        return
    out = editor.call(first.node.target, *first.args, before=first.node, **first.kwargs)
    last = value_of(out).dim() - 1
    for part in parts:
        columns = last, part.start, part.end
        view = editor.call(_aten.slice.Tensor, out, *columns, before=part.node)
        # contiguous, as what it replaces
        form: dict[str, Any] = {"memory_format": torch.contiguous_format}
        editor.replace(part.node, editor.call(_aten.clone.default, view, before=part.node, **form))
