"""Rotary embedding: x * cos + rotated(x) * sin, of query and key.

rotated(x) is cat(-second half, first half) as Llama, Qwen, Mistral, Gemma and GPT-NeoX have it, or
of pairs, stack(-odd, even), as GPT-J, GLM and Cohere.

Query and key become one npu_apply_rotary_pos_emb, where the graph is GE's; else an npu_rotary_mul
each. The operators want (B, S, N, D), from which a model transposes: the transposition moves after
the rotation, and is a reshape if S is 1.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..backends.compat_npu import find_operator
from ..rules.products import get_product
from ..rules.tables import dtype_name
from .editor import (
    CAPTURED,
    Editor,
    arguments_of,
    is_call,
    same_shape,
    same_size,
    value_of,
)
from .parts import (
    Part,
    number,
    part_of,
    reads_written,
    same_place,
    same_stream,
)
from .rope_rules import (
    HALF,
    INTERLEAVE,
    Rotated,
    why_not_apply_rotary,
    why_not_rotary_mul,
)

__all__ = ["fuse_rope"]

NAME = "rope"
_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_SAME, _TRANSPOSED, _ONE_STEP = "same", "transposed", "one step"


@dataclass(frozen=True)
class _Rotation:
    """A rotation in a graph.

    Attributes:
        sum: the node that the operator replaces.
        x: what the operator reads; of `_TRANSPOSED`, the tensor before the transposition.
        cos, sin: as the graph has them.
        way: how x becomes (B, S, N, D), if it does: it has it (`_SAME`), it has it before a
            transposition, or it is (B, N, 1, D), of which it is a view (`_ONE_STEP`).
        shape: what the rules read.
    """

    sum: Node
    x: Node
    cos: Node
    sin: Node
    way: str
    shape: Rotated

    @property
    def is_stale(self) -> bool:
        """Whether what it reads was another rotation, which is an operator now."""
        return any(node._erased for node in (self.x, self.cos, self.sin))


def fuse_rope(editor: Editor) -> None:
    """Fuse every rotation; those of query and key together where that is possible."""
    found = [r for node in editor.calls(_aten.add.Tensor) if (r := _rotation_at(editor, node))]
    alone: set[Node] = set()
    while found:
        first = found.pop(0)
        if first.is_stale:
            again = _rotation_at(editor, first.sum)
            found = ([] if again is None else [again]) + found
            continue
        second = None if first.sum in alone else _partner(first, found, alone)
        if second is not None:
            why = _why_not_together(editor, first, second)
            if not why:
                found.remove(second)
                _apply_rotary(editor, first, second)
                continue
            if not _why_not_as_one(editor, first, second):
                found.remove(second)
                _as_one(editor, first, second)
                continue
            editor.left(NAME, first.sum, f"query and key are two kernels: {why}")
            alone.add(second.sum)
        if why := _why_not_rotary_mul(editor, first.shape):
            editor.left(NAME, first.sum, why)
        else:
            _rotary_mul(editor, first)


# ---- what is there ----


def _rotation_at(editor: Editor, node: Node) -> _Rotation | None:
    """The rotation that ends at a sum, if it can be one operator."""
    pieces = _pieces_of(node)
    if pieces is None:
        return None
    x, cos, sin, mode = pieces
    why = _why_not_pieces(editor, node, x, cos, sin)
    if why:
        editor.left(NAME, node, why)
        return None
    sizes, angles = tuple(value_of(x).shape), _four(cos)
    dtype = value_of(x).dtype
    way, heads, start = _layout(x, sizes, angles)
    if way != _SAME:
        sizes, angles = _swapped(sizes), _swapped(angles)
    return _Rotation(node, start, cos, sin, way, Rotated(sizes, angles, heads, dtype, mode))


def _layout(x: Node, sizes: tuple[Any, ...], angles: tuple[Any, ...]) -> tuple[str, int, Node]:
    """How x becomes (B, S, N, D), which dim is then N, and what the operator reads.

    x may be that or (B, N, S, D): cos has one head. If cos has one step too, x has.
    """
    is_bnsd, is_bsnd = (same_size(angles[dim], 1) for dim in (1, 2))
    before = _before_transposition(x)
    if before is not None and is_bnsd:
        return _TRANSPOSED, 2, before
    if is_bnsd and is_bsnd and same_size(sizes[2], 1):
        return _ONE_STEP, 2, x
    return _SAME, 1 if is_bnsd and not is_bsnd else 2, x


def _pieces_of(node: Node) -> tuple[Node, Node, Node, str] | None:
    """x, cos, sin and the mode of x * cos + rotated(x) * sin."""
    if arguments_of(node)["alpha"] != 1:
        return None
    for straight, turned in (node.args[:2], reversed(node.args[:2])):
        if not (is_call(straight, _aten.mul.Tensor) and is_call(turned, _aten.mul.Tensor)):
            return None
        for rotated, sin in _both_ways(turned):
            source, mode = _rotated(rotated)
            for x, cos in _both_ways(straight):
                tensors = all(isinstance(one, Node) for one in (source, x, cos, sin))
                if tensors and same_place(x, source):
                    return x, cos, sin, mode
    return None


def _both_ways(product: Any) -> list[tuple[Any, Any]]:
    first, second = product.args[:2]
    return [(first, second), (second, first)]


def _rotated(node: Any) -> tuple[Node | None, str]:
    """The tensor that a node is rotated of, and the mode."""
    mode, stacked = HALF, node
    if is_call(node, *_RESHAPES) and is_call(node.args[0], _aten.stack.default):
        mode, stacked = INTERLEAVE, node.args[0]
    if not is_call(stacked, _aten.cat.default if mode == HALF else _aten.stack.default):
        return None, mode
    given = arguments_of(stacked)
    if given["dim"] not in (-1, value_of(stacked).dim() - 1) or len(given["tensors"]) != 2:
        return None, mode
    negative, second = given["tensors"]
    if not is_call(negative, _aten.neg.default):
        return None, mode
    one, two = part_of(negative.args[0]), part_of(second)
    if one is None or two is None or one.source is not two.source:
        return None, mode
    d = value_of(one.source).shape[-1]
    spans = ((d // 2, d, 1), (0, d // 2, 1)) if mode == HALF else ((1, d, 2), (0, d, 2))
    if d % 2 or (one[1:], two[1:]) != spans or not same_shape(node, one.source):
        return None, mode
    return one.source, mode


def _why_not_pieces(editor: Editor, node: Node, x: Node, cos: Node, sin: Node) -> str:
    tensors = {"x": x, "cos": cos, "sin": sin}
    if len({value_of(one).dtype for one in (node, *tensors.values())}) > 1:
        return ", ".join(
            f"{name} is {dtype_name(value_of(one).dtype)}" for name, one in tensors.items()
        )
    if value_of(x).dim() != 4 or not same_shape(node, x):
        return f"x has shape {list(value_of(x).shape)}; it must have 4 dims, more than cos"
    if value_of(cos).dim() > 4 or not same_shape(cos, sin):
        return "cos and sin have other shapes"
    if not same_size(value_of(cos).shape[-1], value_of(x).shape[-1]):
        return f"cos has {value_of(cos).shape[-1]} angles; D is {value_of(x).shape[-1]}"
    if any(value_of(one).device.type != "npu" for one in tensors.values()):
        return "it is not on npu"
    products = [one for one in node.args[:2] if isinstance(one, Node)]
    if not same_stream(node, *products):
        return "it runs on two streams"
    return "the graph writes into what it reads" if reads_written(editor, x, cos, sin) else ""


def _four(cos: Node) -> tuple[Any, ...]:
    """The sizes of cos beside those of x."""
    sizes = tuple(value_of(cos).shape)
    return (1,) * (4 - len(sizes)) + sizes


def _swapped(sizes: tuple[Any, ...]) -> tuple[Any, ...]:
    return sizes[0], sizes[2], sizes[1], sizes[3]


def _before_transposition(x: Node) -> Node | None:
    """The tensor whose dims 1 and 2 x has the other way round."""
    if not is_call(x, _aten.transpose.int) or not isinstance(x.args[0], Node):
        return None
    return x.args[0] if {dim % 4 for dim in x.args[1:3]} == {1, 2} else None  # type: ignore[operator]


# ---- query and key together ----


def _partner(first: _Rotation, others: list[_Rotation], alone: set[Node]) -> _Rotation | None:
    """The next rotation by the same angles."""
    for one in others:
        if not one.is_stale and one.sum not in alone and _belongs(first, one):
            return one
    return None


def _belongs(first: _Rotation, second: _Rotation) -> bool:
    """Whether two rotations are by the same angles."""
    return (
        first.way == second.way
        and first.shape.heads == second.shape.heads
        and first.shape.mode == second.shape.mode
        and same_place(first.cos, second.cos)
        and same_place(first.sin, second.sin)
    )


def _why_not_together(editor: Editor, first: _Rotation, second: _Rotation) -> str:
    if not find_operator("npu_apply_rotary_pos_emb"):
        return "torch_npu has no npu_apply_rotary_pos_emb"
    why = _why_not_apply(editor, first.shape, second.shape)
    if why and not _why_not_apply(editor, *map(_for_each_batch, (first.shape, second.shape))):
        why = ""
    if not why and not same_stream(first.sum, second.sum):
        why = "they run on two streams"
    if not why and _place(first, second) is None:
        why = "the one is read before the other is there"
    return why


def _why_not_apply(editor: Editor, query: Rotated, key: Rotated) -> str:
    return why_not_apply_rotary(query, key, editor.kind, get_product())


def _for_each_batch(shape: Rotated) -> Rotated:
    """With cos and sin repeated for each batch: two copies, which all layers share."""
    return shape if number(shape.sizes[0]) is None else replace(shape, cos=_repeated(shape))


def _repeated(shape: Rotated) -> tuple[Any, ...]:
    return shape.sizes[0], *shape.cos[1:]


def _place(first: _Rotation, second: _Rotation) -> Node | None:
    """A node before which both can be computed: at the second, if nobody reads the first before;
    else at the first, if what the second reads is there."""
    if all(second.sum < user for user in first.sum.users):
        return second.sum
    if all(one < first.sum for one in (second.x, second.cos, second.sin)):
        return first.sum
    return None


def _apply_rotary(editor: Editor, first: _Rotation, second: _Rotation) -> None:
    place = _place(first, second)
    assert place is not None
    query, key = _as_bsnd(editor, first, place), _as_bsnd(editor, second, place)
    cos, sin = _angles(editor, first)
    if _why_not_apply(editor, first.shape, second.shape):
        sizes = _sizes(_repeated(first.shape))
        cos, sin = (
            editor.call(_aten.expand.default, one, sizes, before=one.next) for one in (cos, sin)
        )
    # by default (B, S, N, D); older converters take no layout but their default, BSH
    npu = torch.ops.npu.npu_apply_rotary_pos_emb.default
    node = editor.call(npu, query, key, cos, sin, before=place, like=first.sum)
    turned = [editor.call(operator.getitem, node, i, before=place) for i in range(2)]
    new = [_as_it_was(editor, r, t, place) for r, t in zip((first, second), turned, strict=True)]
    editor.replace(first.sum, new[0])
    editor.replace(second.sum, new[1])
    editor.did(NAME, node)


# ---- query and key as heads of one tensor ----


def _why_not_as_one(editor: Editor, first: _Rotation, second: _Rotation) -> str:
    """Why query and key are not neighbours in one product, or cannot be rotated as one tensor.

    For captured graphs: there the parts are views; in GE each would be a kernel. Of several rows
    the parts would have gaps, and what reads them may need memory without.
    """
    if editor.kind != CAPTURED or _neighbours(first, second) is None:
        return "query and key are no neighbours in a captured graph"
    if not same_stream(first.sum, second.sum) or _place(first, second) is None:
        return "they are not computed at one place"
    if any(number(size) != 1 for size in first.shape.sizes[:2]):
        return "there are several rows, or run time alone knows B and S"
    return _why_not_rotary_mul(editor, _together(first, second))


def _neighbours(first: _Rotation, second: _Rotation) -> Part | None:
    """The part of a product that has query and then key, each (rows, N * D)."""
    one, two = (part_of(_behind_reshapes(r.x)) for r in (first, second))
    if one is None or two is None or first.shape.heads != 2:
        return None
    is_next = one.source is two.source and one.stop == two.start and one.step == two.step == 1
    wide = [r.shape.n * r.shape.d for r in (first, second)]
    if not is_next or [one.stop - one.start, two.stop - two.start] != wide:
        return None
    return Part(one.source, one.start, two.stop)


def _together(first: _Rotation, second: _Rotation) -> Rotated:
    b, s, n, d = first.shape.sizes
    return replace(first.shape, sizes=(b, s, n + second.shape.n, d))


def _as_one(editor: Editor, first: _Rotation, second: _Rotation) -> None:
    place, part = _place(first, second), _neighbours(first, second)
    assert place is not None and part is not None
    source, start, stop, _ = part
    x = editor.call(_aten.slice.Tensor, source, -1, start, stop, before=place, like=first.sum)
    x = editor.call(_aten.reshape.default, x, _sizes(_together(first, second).sizes), before=place)
    node = _call_rotary_mul(editor, first, x, place)
    n = first.shape.n
    new = []
    for one, span in ((first, (0, n)), (second, (n, n + second.shape.n))):
        heads = editor.call(_aten.slice.Tensor, node, 2, *span, before=place, like=one.sum)
        new.append(_as_it_was(editor, one, heads, place))
    editor.replace(first.sum, new[0])
    editor.replace(second.sum, new[1])
    editor.did(NAME, node)


# ---- one tensor ----


def _why_not_rotary_mul(editor: Editor, shape: Rotated) -> str:
    if not find_operator("npu_rotary_mul", *([] if shape.mode == HALF else ["rotary_mode"])):
        return f"torch_npu has no npu_rotary_mul of mode {shape.mode}"
    return why_not_rotary_mul(shape, editor.kind, get_product())


def _rotary_mul(editor: Editor, one: _Rotation) -> None:
    node = _call_rotary_mul(editor, one, _as_bsnd(editor, one, one.sum), one.sum)
    editor.replace(one.sum, _as_it_was(editor, one, node, one.sum))
    editor.did(NAME, node)


def _call_rotary_mul(editor: Editor, one: _Rotation, x: Node, before: Node) -> Node:
    cos, sin = _angles(editor, one)
    npu, mode = torch.ops.npu.npu_rotary_mul.default, one.shape.mode
    given = [] if mode == HALF else [mode]
    return editor.call(npu, x, cos, sin, *given, before=before, like=one.sum)


# ---- (B, S, N, D) and back ----


def _sizes(sizes: tuple[Any, ...]) -> list[int]:
    """Of a reshape; B may be unknown."""
    return [-1 if number(size) is None else size for size in sizes]


def _as_bsnd(editor: Editor, one: _Rotation, before: Node) -> Node:
    if one.way != _ONE_STEP:
        return one.x
    source = _behind_reshapes(one.x)
    return editor.call(_aten.reshape.default, source, _sizes(one.shape.sizes), before=before)


def _behind_reshapes(node: Node) -> Node:
    while is_call(node, *_RESHAPES) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _as_it_was(editor: Editor, one: _Rotation, node: Node, before: Node) -> Node:
    if one.way == _SAME:
        return node
    if same_size(one.shape.sizes[1], 1):
        sizes = _sizes(_swapped(one.shape.sizes))
        return editor.call(_aten.reshape.default, node, sizes, before=before)
    return editor.call(_aten.transpose.int, node, 1, 2, before=before)


def _angles(editor: Editor, one: _Rotation) -> tuple[Node, Node]:
    """cos and sin with the dims of what the operator reads, made where cos and sin are."""
    return _angle(editor, one.cos, one.way), _angle(editor, one.sin, one.way)


def _angle(editor: Editor, node: Node, way: str) -> Node:
    if way == _SAME and value_of(node).dim() == 4:
        return node
    before = node.next
    while before.op == "placeholder":
        before = before.next
    dims, start = value_of(node).dim(), node
    is_unsqueezed = is_call(node, _aten.unsqueeze.default) and dims == 4
    if way != _SAME and is_unsqueezed and node.args[1] in (1, -3):
        return editor.call(_aten.unsqueeze.default, node.args[0], 2, before=before, like=node)
    for _ in range(4 - dims):
        start = editor.call(_aten.unsqueeze.default, start, 0, before=before, like=node)
    if way == _SAME:
        return start
    flat = editor.call(_aten.squeeze.dim, start, 1, before=before, like=node)
    return editor.call(_aten.unsqueeze.default, flat, 2, before=before, like=node)
