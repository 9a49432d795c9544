"""RMSNorm: its pieces are one operator, and with the sum before it.

The pieces are those that models write, in any of these orders:

    transformers        weight * (x32 * rsqrt(mean(x32 ** 2) + epsilon)).to(x.dtype)
    torch.nn.RMSNorm    (x32 * rsqrt(mean(x32 ** 2) + epsilon) * weight).to(x.dtype)
    Gemma               (x32 * rsqrt(mean(x32 ** 2) + epsilon) * (1 + weight.float())).to(x.dtype)

x32 is x in float32, or x itself. What the operators take is hicann/ops-nn's: norm/rms_norm and
norm/add_rms_norm (op_host: definition and tiling).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..rules.products import get_product
from ..rules.tables import dtype_name
from .editor import (
    Editor,
    arguments_of,
    is_call,
    is_contiguous,
    same_shape,
    same_size,
    shape_of,
    value_of,
)
from .matching import (
    cast_from,
    check_place,
    every,
    need,
    only_user,
    operator_of,
    replace_results,
    results,
)
from .parts import order_of

__all__ = ["add_rms_norm", "rms_norm"]

_aten, _npu = torch.ops.aten, torch.ops.npu
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

# ---- what the operators take ----

_SINCE_A2 = {F16: (F16, F32), BF16: (BF16, F32), F32: (F32,)}
# RmsNorm: product, dtype of x, dtypes of gamma
RMS_NORM: dict[str, dict[torch.dtype, tuple[torch.dtype, ...]]] = {
    "310P": {F16: (F16,), F32: (F32,)},
    "A2": _SINCE_A2,
    "A3": _SINCE_A2,
    "950": _SINCE_A2,
}
# AddRmsNorm: product, dtypes of x1, which x2 and gamma have too
ADD_RMS_NORM: dict[str, tuple[torch.dtype, ...]] = {
    "310P": (F16, F32),
    "A2": (F16, BF16, F32),
    "A3": (F16, BF16, F32),
    "950": (F16, BF16, F32),
}
MAX_DIMS = 8


# ---- RmsNorm ----


def rms_norm(editor: Editor) -> None:
    """The pieces of a norm over the last dim: npu_rms_norm."""
    every(editor, "rms_norm", editor.calls(_aten.mean.dim), _rms_norm_at)


def _rms_norm_at(editor: Editor, mean: Node, written: set[int]) -> bool:
    wide = _squared(mean.args[0])
    root = None if wide is None else _inverse_root(mean)
    if wide is None or root is None:
        return False
    x, epsilon, normal = _normalized(mean, wide, root)
    gamma, result, nodes = _weighted(x, normal)
    target = operator_of("npu_rms_norm")
    check_place(written, [x, gamma], mean, root.last, normal, *nodes)
    rows = _rows(x, result)
    call = editor.call(target, rows, gamma, epsilon, before=result, like=mean)
    new = editor.call(operator.getitem, call, 0, before=result, like=mean)
    if rows is not x:
        new = editor.call(x.target, new, *x.args[1:], before=result, like=mean)
    editor.replace(result, new)
    return True


def _rows(x: Node, result: Node) -> Node:
    """What the operator reads so that its result, which is contiguous, has the layout of the
    pieces' result: x, or what x transposes, which is then transposed afterwards."""
    if is_contiguous(x) or is_contiguous(result):
        return x
    order, last = order_of(x), len(shape_of(x)) - 1
    need(order is not None and order[-1] == last, "x is not contiguous")
    assert order is not None
    back = [order.index(dim) for dim in range(last + 1)]
    need(is_contiguous(result, back), "x is not contiguous")
    source = x.args[0]
    assert isinstance(source, Node)
    return source


def _squared(node: Any) -> Node | None:
    """x of x ** 2, x * x or square(x)."""
    x: Node | None = None
    if (
        (is_call(node, _aten.pow.Tensor_Scalar) and node.args[1] == 2)
        or (is_call(node, _aten.mul.Tensor) and node.args[0] is node.args[1])
        or is_call(node, _aten.square.default)
    ):
        x = node.args[0]
    return x


@dataclass(frozen=True)
class _Root:
    """1 / sqrt(mean + epsilon).

    Attributes:
        added: the sum.
        last: the reciprocal root, or the root if `divides`.
        divides: whether x is divided by it.
    """

    added: Node
    last: Node
    divides: bool = False


def _inverse_root(mean: Node) -> _Root | None:
    """The reciprocal root of a mean; None if there is none, so that it is no norm."""
    for added in mean.users:
        if not is_call(added, _aten.add.Tensor, _aten.add.Scalar):
            continue
        for root in added.users:
            if is_call(root, _aten.rsqrt.default):
                return _Root(added, root)
            if is_call(root, _aten.pow.Tensor_Scalar) and root.args[1] == -0.5:
                return _Root(added, root)
            if not is_call(root, _aten.sqrt.default):
                continue
            for last in root.users:
                if is_call(last, _aten.reciprocal.default):
                    return _Root(added, last)
                if is_call(last, _aten.div.Tensor) and last.args[1] is root:
                    return _Root(added, root, divides=True)
    return None


def _normalized(mean: Node, wide: Node, root: _Root) -> tuple[Node, float, Node]:
    """x, epsilon, and x / rms(x)."""
    given = arguments_of(mean)
    last = len(shape_of(wide)) - 1
    need(last >= 0, "x has no dims")
    need(bool(given["keepdim"]), "the mean drops its dim")
    dims = [dim % (last + 1) for dim in given["dim"] or ()]
    need(dims == [last], f"the mean is over the dims {dims}, not over the last alone")
    need(given["dtype"] in (None, value_of(wide).dtype), "the mean has another dtype")
    epsilon = _epsilon(mean, root.added)
    only_user(mean, "the mean square")
    only_user(root.added, "the sum with epsilon")
    normal = only_user(root.last, "the reciprocal root")
    need(value_of(wide).dtype == F32, f"it is computed in {dtype_name(value_of(wide).dtype)}")
    source = cast_from(wide, same_layout=False)
    x = source if source is not None and value_of(source).dtype in (F16, BF16) else wide
    if root.divides:
        factors = [normal.args[0]]
    else:
        factors = list(normal.args) if is_call(normal, _aten.mul.Tensor) else []
    # x itself, which the product widens, or a second cast of it
    fits = any(one in (x, wide) or cast_from(one, same_layout=False) is x for one in factors)
    fits = fits and same_shape(normal, wide) and value_of(normal).dtype == F32
    need(fits, "the reciprocal root multiplies another tensor")
    need(last < MAX_DIMS, f"x has {last + 1} dims")
    need(not any(same_size(size, 0) for size in shape_of(x)), "x is empty")
    return x, epsilon, normal


def _epsilon(mean: Node, added: Node) -> float:
    given = arguments_of(added)
    values = [given["self"], given["other"]]
    values.remove(mean)
    (epsilon,) = values
    need(
        not isinstance(epsilon, Node),
        "epsilon is a tensor; torch.compile with dynamic=True makes it one of a Python number, "
        "unless torch._dynamo.config.specialize_float is True",
    )
    need(given["alpha"] == 1, "epsilon has a factor")
    need(type(epsilon) in (int, float), f"epsilon is {epsilon}")
    need(epsilon >= 0, f"epsilon is {epsilon}")
    return float(epsilon)


def _weighted(x: Node, normal: Node) -> tuple[Node, Node, list[Node]]:
    """The weight, the norm in x's dtype, and the nodes between."""
    dtype, nodes = value_of(x).dtype, []
    node, before = only_user(normal, "x / rms(x)"), normal
    if cast_from(node) is normal:
        need(
            value_of(node).dtype == dtype, f"x / rms(x) becomes {dtype_name(value_of(node).dtype)}"
        )
        nodes.append(node)
        node, before = only_user(node, "x / rms(x)"), node
    need(is_call(node, _aten.mul.Tensor), "no weight")
    others = [one for one in node.args if one is not before]
    need(len(others) == 1 and isinstance(others[0], Node), "no weight")
    gamma, result = others[0], node
    assert isinstance(gamma, Node)
    if value_of(result).dtype != dtype:
        result = only_user(result, "the norm before its last cast")
        nodes.append(node)
        fits = cast_from(result) is node and value_of(result).dtype == dtype
        need(fits, f"the norm is {dtype_name(value_of(node).dtype)} and x {dtype_name(dtype)}")
    shape, size = shape_of(gamma), shape_of(x)[-1]
    need(len(shape) == 1 and same_size(shape[0], size), f"the weight has shape {shape}")
    source = cast_from(gamma)
    if source is not None and value_of(source).dtype == dtype:
        gamma = source  # it was widened, which changes no value
    product = get_product().key
    allowed = RMS_NORM.get(product, {}).get(dtype, ())
    kind = value_of(gamma).dtype
    need(kind in allowed, f"the weight is {dtype_name(kind)} and x {dtype_name(dtype)}")
    need(is_contiguous(gamma), "the weight is not contiguous")
    need(same_shape(result, x), "the weight broadcasts x")
    return gamma, result, [*nodes, result]


# ---- AddRmsNorm ----


def add_rms_norm(editor: Editor) -> None:
    """A sum of two tensors and its npu_rms_norm: npu_add_rms_norm, which gives the sum too."""
    target = getattr(_npu, "npu_rms_norm", None)
    if target is not None:
        every(editor, "add_rms_norm", editor.calls(target.default), _add_rms_norm_at)


def _one_plus(gamma: Node, dtype: torch.dtype) -> tuple[Node, float] | None:
    """w and the number, if the weight is w + number, as Gemma's 1 + w, computed in float32 of a w
    that has the sum's dtype: the operator asks for that dtype."""
    if not is_call(gamma, _aten.add.Tensor, _aten.add.Scalar) or value_of(gamma).dtype != F32:
        return None
    given = arguments_of(gamma)
    terms = [given["self"], given["other"]]
    numbers = [one for one in terms if type(one) in (int, float)]
    tensors = [one for one in terms if isinstance(one, Node)]
    if given["alpha"] != 1 or len(numbers) != 1 or len(tensors) != 1:
        return None
    source = tensors[0] if dtype == F32 else cast_from(tensors[0])
    fits = source is not None and value_of(source).dtype == dtype
    return (source, numbers[0]) if source is not None and fits else None


def _add_rms_norm_at(editor: Editor, norm: Node, written: set[int]) -> bool:
    given = arguments_of(norm)
    added, gamma, epsilon = norm.args[0], given["gamma"], given["epsilon"]
    if not is_call(added, _aten.add.Tensor):
        return False
    assert isinstance(added, Node)
    terms = arguments_of(added)
    x1, x2 = terms["self"], terms["other"]
    if not isinstance(x1, Node) or not isinstance(x2, Node):
        return False  # a tensor and a number
    dtype = value_of(added).dtype
    need(isinstance(epsilon, int | float), "epsilon is not a number")
    need(terms["alpha"] == 1, f"the sum has alpha {terms['alpha']}")
    need(same_shape(x1, x2), f"the sum is of {shape_of(x1)} and {shape_of(x2)}")
    dtypes = [value_of(one).dtype for one in (x1, x2)]
    need(
        dtypes == [dtype, dtype],
        f"the sum is of {dtype_name(dtypes[0])} and {dtype_name(dtypes[1])}",
    )
    kind, weight = value_of(gamma).dtype, _one_plus(gamma, dtype)
    fits = kind == dtype or weight is not None
    need(fits, f"the weight is {dtype_name(kind)} and the sum {dtype_name(dtype)}")
    product = get_product()
    need(dtype in ADD_RMS_NORM.get(product.key, ()), f"{product} takes no {dtype_name(dtype)}")
    need(is_contiguous(x1) and is_contiguous(x2), "a tensor of the sum is not contiguous")
    target = operator_of("npu_add_rms_norm")
    start = gamma if weight is None else weight[0]
    check_place(written, [x1, x2, start], added, norm)
    # where the sum is: its other users may come before the norm
    place = added if start < added else min(added.users)
    need(start < place, "the weight is computed after the sum is used")
    if weight is not None:
        gamma = editor.call(_aten.add.Tensor, *weight, before=place, like=gamma)
    call = editor.call(target, x1, x2, gamma, epsilon, before=place, like=norm)
    result = results(editor, call)
    replace_results(editor, norm, {0: result(0), 1: result(1)})
    editor.replace(added, result(2))
    return True
