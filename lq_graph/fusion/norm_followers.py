"""What follows a sum and its norm, npu_add_rms_norm: quantizations of the norm, or a cast of it.

What the operators take is hicann/ops-nn's: norm/add_rms_norm_dynamic_quant, add_rms_norm_quant,
add_rms_norm_quant_v2 and add_rms_norm_cast (op_host: definition and tiling).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..rules.products import get_cann_version, get_product
from ..rules.tables import dtype_name
from .editor import (
    Editor,
    arguments_of,
    is_call,
    same_shape,
    same_size,
    shape_of,
    value_of,
)
from .matching import (
    VIEWS,
    cast_from,
    check_place,
    every,
    need,
    operator_of,
    replace_results,
    results,
)

__all__ = ["add_rms_norm_cast", "add_rms_norm_dynamic_quant", "add_rms_norm_quant"]

_ours, _npu = torch.ops.lq_graph, torch.ops.npu
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# AddRmsNormDynamicQuant and AddRmsNormCast, which the 310P does not have
HALVES: dict[str, tuple[torch.dtype, ...]] = {
    "310P": (),
    "A2": (F16, BF16),
    "A3": (F16, BF16),
    "950": (F16, BF16),
}
_NO_SUM = "there is no sum before the norm, and no operator without it"
# AddRmsNormQuant: product, (dtypes of x1, x2 and gamma, dtype of scales, of zero points). The 950
# has more.
_WITH_INTEGERS = ((F16, BF16), F32, torch.int32)
QUANT: dict[str, tuple[tuple[tuple[torch.dtype, ...], torch.dtype, torch.dtype], ...]] = {
    "310P": (((F16,), F32, torch.int32),),
    "A2": (_WITH_INTEGERS, ((BF16,), BF16, BF16)),
    "A3": (_WITH_INTEGERS, ((BF16,), BF16, BF16)),
    "950": (_WITH_INTEGERS, ((BF16,), BF16, BF16), ((F16,), F16, F16)),
}
LEAST_310P = 32  # values of the weight
BLOCK = 32  # bytes; torchair's own pattern takes rows of a multiple of it
MULTIPLIES_SINCE = "8.3.RC1"  # aclnnAddRmsNormQuantV2, which has div_mode


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Each node that reads a tensor, or a view of it with the same last dim, and what it reads."""
    for user in node.users:
        size, view = shape_of(node)[-1], is_call(user, *VIEWS)
        if view and shape_of(user) and same_size(shape_of(user)[-1], size):
            yield from _readers(user)
        else:
            yield user, node


def _items(call: Node, index: int) -> list[Node]:
    """The nodes of one result of a call."""
    return [n for n in call.users if n.op == "call_function" and n.args[1] == index]


@dataclass(frozen=True)
class _Quantization:
    """A dynamic quantization to int8.

    Attributes:
        call: the node.
        reads: the norm or a view of it.
        smooth: its smooth scales.
    """

    call: Node
    reads: Node
    smooth: Node | None


def _dynamic_quant(call: Node, reads: Node) -> _Quantization | None:
    """A reader of a norm as a quantization; None if it is another operator."""
    if not _is_quantization(call):
        return None
    given = arguments_of(call)
    plain = {"group_index": None, "quant_mode": "pertoken", "dst_type_max": 0.0}
    for name, value in plain.items():
        need(given.get(name, value) == value, f"the quantization has {name}")
    dtype = value_of(call)[0].dtype
    need(dtype == torch.int8, "the quantization is to int4, which torchair lowers to more nodes")
    return _Quantization(call, reads, given.get("smooth_scales"))


def add_rms_norm_dynamic_quant(editor: Editor) -> None:
    """npu_add_rms_norm and one or two dynamic quantizations: npu_add_rms_norm_dynamic_quant."""
    every(editor, "add_rms_norm_dynamic_quant", _norms(editor), _add_rms_norm_dynamic_quant_at)


def _norms(editor: Editor) -> list[Node]:
    """Norms with a sum before them, and those without, for which the reason is told."""
    names = ("npu_add_rms_norm", "npu_rms_norm")
    return editor.calls(*(getattr(_npu, name).default for name in names if hasattr(_npu, name)))


def _add_rms_norm_dynamic_quant_at(editor: Editor, norm: Node, written: set[int]) -> bool:
    readers = [pair for y in _items(norm, 0) for pair in _readers(y)]
    if not any(_is_quantization(user) for user, _ in readers):
        return False
    given = arguments_of(norm)
    need("x1" in given, _NO_SUM)
    need(not _items(norm, 1), "the reciprocal root is used")
    found = [(user, _dynamic_quant(user, reads)) for user, reads in readers]
    others = [str(user.target) for user, quantization in found if quantization is None]
    need(not others, f"{', '.join(others)} reads the norm too, which the operator does not give")
    ways: dict[Node | None, list[_Quantization]] = {}
    for _, one in found:
        assert one is not None
        ways.setdefault(one.smooth, []).append(one)
    need(len(ways) <= 2, f"{len(ways)} quantizations; the operator has two results")
    x1, x2, gamma = (given[name] for name in ("x1", "x2", "gamma"))
    _check_quantized(norm, gamma, list(ways))
    options: dict[str, Any] = {
        f"smooth_scale{i}": s for i, s in enumerate(ways, 1) if s is not None
    }
    if len(ways) == 2 and None in ways:  # else the smooth scales say it
        options["output_mask"] = [True, True]
    target = operator_of("npu_add_rms_norm_dynamic_quant", *options)
    inputs = [x1, x2, gamma, *(smooth for smooth in ways if smooth is not None)]
    check_place(written, inputs, norm, *(user for user, _ in readers))
    options["epsilon"] = given["epsilon"]
    call = editor.call(target, x1, x2, gamma, before=norm, like=norm, **options)
    made = results(editor, call)
    for total in _items(norm, 2):
        editor.replace(total, made(2))
    for index, same in enumerate(ways.values()):
        for one in same:
            values = _viewed(editor, made(index), one, drop=0)
            scale = _viewed(editor, made(3 + index), one, drop=1)
            replace_results(editor, one.call, {0: values, 1: scale})
    return True


def _viewed(
    editor: Editor, result: Node, one: _Quantization | _StaticQuantization, drop: int
) -> Node:
    """A result of the norm's shape in the shape of what the quantization reads."""
    if not is_call(one.reads, *VIEWS):
        return result
    sizes = list(one.reads.args[1])  # type: ignore[arg-type]
    target = one.reads.target
    return editor.call(target, result, sizes[: len(sizes) - drop], before=one.call)


def _is_quantization(node: Node) -> bool:
    npu = getattr(_npu, "npu_dynamic_quant", None)
    return is_call(node, _ours.dynamic_quant.default, *([npu.default] if npu else []))


def _check_quantized(norm: Node, gamma: Node, smooth: list[Node | None]) -> None:
    """The conditions of AddRmsNormDynamicQuant beyond those of AddRmsNorm."""
    given, product = arguments_of(norm), get_product()
    dtype = value_of(given["x1"]).dtype
    need(dtype in HALVES.get(product.key, ()), f"{product} takes no {dtype_name(dtype)}")
    epsilon = given["epsilon"]
    need(isinstance(epsilon, int | float) and epsilon > 0, f"epsilon is {epsilon}")
    need(len(shape_of(gamma)) == 1, f"the weight has shape {shape_of(gamma)}")
    need(len(shape_of(given["x1"])) >= 2, "x1 has one dim")
    for scales in smooth:
        if scales is not None:
            need(value_of(scales).dtype == dtype, "the smooth scales have another dtype")
            need(same_shape(scales, gamma), f"the smooth scales have shape {shape_of(scales)}")
            need(scales < norm, "the smooth scales are computed after the norm")


@dataclass(frozen=True)
class _StaticQuantization:
    """A static quantization to int8.

    Attributes:
        call: the node.
        reads: the norm or a view of it.
        scale, points: its scale, and its zero points if it has some.
        divides: whether it divides by the scale.
    """

    call: Node
    reads: Node
    scale: Node
    points: Node | None
    divides: bool


def _static_quant(call: Node, reads: Node) -> _StaticQuantization | None:
    """A reader of a norm as a static quantization; None if it is another operator."""
    if is_call(call, _ours.static_quant.default):
        given = arguments_of(call)
        scale, points = given["reciprocals"], given["zero_points"]
        if scale is None:
            scale, points = given["scale_reciprocal"], given["offset"]
        return _StaticQuantization(call, reads, scale, points, False)
    npu = getattr(_npu, "npu_quantize", None)
    if npu is None or not is_call(call, npu.default) or value_of(call).dtype != torch.int8:
        return None
    given = arguments_of(call)
    last = len(shape_of(call)) - 1
    need(given["axis"] in (-1, last), f"the quantization is along axis {given['axis']}")
    divides = given.get("div_mode", True)
    return _StaticQuantization(call, reads, given["scales"], given["zero_points"], divides)


def add_rms_norm_quant(editor: Editor) -> None:
    """npu_add_rms_norm and one or two static quantizations: npu_add_rms_norm_quant."""
    every(editor, "add_rms_norm_quant", _norms(editor), _add_rms_norm_quant_at)


def _add_rms_norm_quant_at(editor: Editor, norm: Node, written: set[int]) -> bool:
    readers = [pair for y in _items(norm, 0) for pair in _readers(y)]
    found = [(user, _static_quant(user, reads)) for user, reads in readers]
    if not any(one for _, one in found):
        return False
    given = arguments_of(norm)
    need("x1" in given, _NO_SUM)
    others = [str(user.target) for user, one in found if one is None]
    need(not others, f"{', '.join(others)} reads the norm too, which the operator does not give")
    need(not _items(norm, 1), "the reciprocal root is used")
    ways: dict[tuple[Node, Node | None], list[_StaticQuantization]] = {}
    for _, one in found:
        assert one is not None
        ways.setdefault((one.scale, one.points), []).append(one)
    need(len(ways) <= 2, f"{len(ways)} quantizations with scales of their own")
    x1, x2, gamma = (given[name] for name in ("x1", "x2", "gamma"))
    divides = {one.divides for _, one in found if one is not None}
    need(len(divides) == 1, "one quantization divides and one multiplies")
    for same in ways.values():
        _check_static(norm, same[0], gamma)
    options: dict[str, Any] = {} if divides == {True} else {"div_mode": False}
    (scale, points), *more = ways
    for other in more:
        kinds = [value_of(one).dtype for one in (scale, other[0])]
        need(kinds[0] == kinds[1], "the scales have two dtypes")
        options["scales2"], options["zero_points2"] = other
    target = operator_of("npu_add_rms_norm_quant", *options)
    inputs = [x1, x2, gamma, *(tensor for way in ways for tensor in way if tensor is not None)]
    check_place(written, inputs, norm, *(user for user, _ in readers))
    options["epsilon"] = given["epsilon"]
    tensors = (x1, x2, gamma, scale, points)
    call = editor.call(target, *tensors, before=norm, like=norm, **options)
    made = results(editor, call)
    for total in _items(norm, 2):
        editor.replace(total, made(2))
    for index, same in enumerate(ways.values()):
        for one in same:
            editor.replace(one.call, _viewed(editor, made(index), one, drop=0))
    return True


def _check_static(norm: Node, one: _StaticQuantization, gamma: Node) -> None:
    """The conditions of AddRmsNormQuant beyond those of AddRmsNorm."""
    dtype, product = value_of(arguments_of(norm)["x1"]).dtype, get_product()
    shape = shape_of(gamma)
    need(len(shape) == 1, f"the weight has shape {shape}")
    k, width = shape[0], value_of(gamma).element_size()
    whole = isinstance(k, int) and k * width % BLOCK == 0
    need(whole, f"a row has {k} values of {width} bytes; a multiple of {BLOCK} bytes is taken")
    need(product.key != "310P" or k >= LEAST_310P, f"{product} takes {LEAST_310P} values or more")
    for what, tensor in (("the scale", one.scale), ("the zero point", one.points)):
        if tensor is not None:
            fits = same_shape(tensor, gamma)
            need(fits, f"{what} has shape {shape_of(tensor)}; the operator takes {shape}")
            need(tensor < norm, f"{what} is computed after the norm")
    rows = [row for row in QUANT.get(product.key, ()) if dtype in row[0]]
    need(bool(rows), f"{product} takes no {dtype_name(dtype)}")
    scale, points = value_of(one.scale).dtype, one.points
    allowed = " or ".join(dtype_name(row[1]) for row in rows)
    rows = [row for row in rows if row[1] == scale]
    need(bool(rows), f"the scale is {dtype_name(scale)}; {product} takes {allowed}")
    if points is not None:
        kind, wanted = value_of(points).dtype, rows[0][2]
        need(kind == wanted, f"the zero point is {dtype_name(kind)}, not {dtype_name(wanted)}")
    cann = get_cann_version()
    multiplies = cann is None or cann.has(MULTIPLIES_SINCE)
    need(one.divides or multiplies, f"CANN {cann} divides only; {MULTIPLIES_SINCE} multiplies")


def add_rms_norm_cast(editor: Editor) -> None:
    """npu_add_rms_norm and a cast of the norm to float32: npu_add_rms_norm_cast."""
    target = getattr(_npu, "npu_add_rms_norm", None)
    if target is not None:
        every(editor, "add_rms_norm_cast", editor.calls(target.default), _add_rms_norm_cast_at)


def _add_rms_norm_cast_at(editor: Editor, norm: Node, written: set[int]) -> bool:
    casts = [
        (user, reads)
        for y in _items(norm, 0)
        for user, reads in _readers(y)
        if cast_from(user) is not None and value_of(user).dtype == F32
    ]
    if not casts:
        return False
    given, product = arguments_of(norm), get_product()
    x1, x2, gamma = (given[name] for name in ("x1", "x2", "gamma"))
    dtype = value_of(x1).dtype
    need(dtype in HALVES.get(product.key, ()), f"{product} takes no {dtype_name(dtype)}")
    target = operator_of("npu_add_rms_norm_cast")
    check_place(written, [x1, x2, gamma], norm, *(user for user, _ in casts))
    call = editor.call(target, x1, x2, gamma, given["epsilon"], before=norm, like=norm)
    made = results(editor, call)
    for user, reads in casts:
        viewed = _viewed(editor, made(0), _Quantization(user, reads, None), drop=0)
        editor.replace(user, viewed)
    replace_results(editor, norm, {i: made(i + 1) for i in (0, 1, 2)})
    return True
