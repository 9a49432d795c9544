"""plan() of the operators that quantize activations: the one place their rules are applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import Arithmetic, TensorLike, for_rows, logical_k, storage_k
from .advice import cast, is_exact
from .cann import CannVersion, Target, quant_rows_in, since_of, upgrade
from .plan import Spec
from .products import get_target, target_with
from .refusal import Fix, list_of, refused
from .symbolic import cached_decision, check_equal_sizes, known_true
from .tables import (
    MIN_DIMS,
    QUANT_MAX_DIMS,
    STORAGE_DTYPES,
    Product,
    QuantRow,
    dtype_name,
    quant_rows_of,
    storage_name,
)

__all__ = ["QuantPlan", "dynamic_arithmetic", "plan_dynamic_quant", "plan_static_quant"]


@dataclass(frozen=True)
class QuantPlan:
    """One legal call of dynamic_quant or static_quant.

    Attributes:
        row: the matching row of the table.
        output_shape: of the quantized tensor: x's, the last dim an eighth of it for int4.
        scale_shape: of the per-token scale: x's without the last dim.
        int4: the output is int32 carrying eight int4 each.
        product: the product whose table was read.
    """

    row: QuantRow
    output_shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    int4: bool
    product: Product

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """Of the product's DynamicQuant kernel, for rows of this length; k is a number."""
        k = logical_k(self.output_shape[-1], self.row.output_dtype)
        return dynamic_arithmetic(self.product, k)


def dynamic_arithmetic(product: Product, k: int) -> Arithmetic:
    """The arithmetic of a product's DynamicQuant kernel for rows of k values."""
    return for_rows(product.dynamic_quant, k)


def plan_dynamic_quant(
    x: TensorLike,
    dtype: torch.dtype | None,
    product: Product | None = None,
    cann: CannVersion | None = None,
) -> QuantPlan:
    """Check a dynamic_quant call, and return its plan, cached as `plan` does.

    Args:
        x: float16, bfloat16 if the product has it; (..., m, k), 2 to 8 dims.
        dtype: torch.int8 (also None), or torch.int32 for int4.
        product: whose table to read; default `get_product()`.
        cann: the CANN version to ask about; default `get_cann_version()`.

    Raises:
        LinearQuantTypeError: a dtype that the product has no row for.
        LinearQuantValueError: a shape outside the specification.

    Source: aclnnDynamicQuant.md (hicann/ops-nn, quant/dynamic_quant/docs).
    """
    target = get_target()
    if product is not None or cann is not None:
        target = target_with(product, cann)
    return _decide_dynamic(target, dtype or torch.int8, x.dtype, x.shape)


@cached_decision
def _decide_dynamic(
    target: Target, output: torch.dtype, dtype: torch.dtype, shape: Sequence[int]
) -> QuantPlan:
    product, x = target.product, Spec(dtype, tuple(shape))
    row = _row("dynamic_quant", target, x, output)
    _check_dims("dynamic_quant", x, MIN_DIMS)
    *rows, k = x.shape
    pack = STORAGE_DTYPES[row.output_dtype]
    pad = "pad k with zeros here and in the weight"
    if known_true(k % pack != 0):
        to_int8 = Fix(
            "quantize to int8", (("dtype", torch.int8),), "the values have 8 bits instead of 4"
        )
        raise _refused(
            "dynamic_quant", "x", f"x has k = {k}", f"a multiple of {pack} for int4", pad, to_int8
        )
    if known_true(k % product.dynamic_quant_k != 0):
        allowed = f"a multiple of {product.dynamic_quant_k}"
        raise _refused("dynamic_quant", "x", f"x has k = {k}", allowed, pad, product=product)
    return QuantPlan(row, (*rows, storage_k(k, row.output_dtype)), tuple(rows), pack > 1, product)


def plan_static_quant(
    x: TensorLike,
    scale_reciprocal: TensorLike,
    offset: TensorLike | None,
    product: Product | None = None,
    cann: CannVersion | None = None,
) -> QuantPlan:
    """Check a static_quant call, and return its plan, cached as `plan` does.

    Args:
        x: float16, float32, bfloat16 if the product has it; (..., k), 1 to 8 dims.
        scale_reciprocal: the dtype of x; (1,) or (k,).
        offset: the dtype and shape of scale_reciprocal.
        product: whose table to read; default `get_product()`.
        cann: the CANN version to ask about; default `get_cann_version()`.

    Raises:
        LinearQuantTypeError: a dtype that the product has no row for, or different dtypes.
        LinearQuantValueError: a shape outside the specification.

    Source: aclnnAscendQuantV3.md (hicann/ops-nn, quant/ascend_quant_v2/docs) and the operator's
    definition, which takes one dtype for all three.
    """
    return _decide_static(
        target_with(product, cann),
        x.dtype,
        x.shape,
        scale_reciprocal.dtype,
        scale_reciprocal.shape,
        *((None, None) if offset is None else (offset.dtype, offset.shape)),
    )


@cached_decision
def _decide_static(target: Target, *key: Any) -> QuantPlan:
    """plan_static_quant() from dtypes and shapes alone: those of the three tensors in order."""
    x, scale_reciprocal = Spec(key[0], tuple(key[1])), Spec(key[2], tuple(key[3]))
    offset = None if key[4] is None else Spec(key[4], tuple(key[5]))
    row = _row("static_quant", target, x, torch.int8, scale_reciprocal, offset)
    _check_dims("static_quant", x, 1)
    k = x.shape[-1]
    for name, tensor in (("scale_reciprocal", scale_reciprocal), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise refused(
                LinearQuantTypeError,
                "static_quant",
                name,
                f"{name} is {dtype_name(tensor.dtype)} and x {dtype_name(x.dtype)}",
                "one dtype for both",
                *_to_one_dtype(row, x, scale_reciprocal, offset),
            )
        shape = tuple(tensor.shape)
        if len(shape) != 1 or not (known_true(shape[0] == 1) or check_equal_sizes(shape[0], k)):
            raise _refused(
                "static_quant",
                name,
                f"{name} has shape {shape}",
                f"(1,) or (k,) = ({k},)",
                f"pass {name}.reshape(-1) if it holds 1 or k values",
            )
    if offset is not None and not check_equal_sizes(offset.shape[0], scale_reciprocal.shape[0]):
        raise _refused(
            "static_quant",
            "offset",
            f"offset has {offset.shape[0]} values and scale_reciprocal {scale_reciprocal.shape[0]}",
            "as many values as scale_reciprocal has",
            "expand the shorter",
        )
    return QuantPlan(row, tuple(x.shape), tuple(x.shape[:-1]), False, target.product)


def _refused(
    op: str, argument: str, given: str, allowed: str, *fixes: Fix | str, **details: Any
) -> LinearQuantValueError:
    return refused(LinearQuantValueError, op, argument, given, allowed, *fixes, **details)


def _row(
    op: str,
    target: Target,
    x: TensorLike,
    output: torch.dtype,
    *others: TensorLike | None,
) -> QuantRow:
    """The product's row for a dtype of x and of the output. others: scale_reciprocal and offset of
    static_quant, which take the dtype of x."""
    rows = quant_rows_in(target, op)
    outputs = [row for row in rows if row.output_dtype == output]
    if not outputs:
        _check_newer(op, target, x.dtype, output)
        raise refused(
            LinearQuantTypeError,
            op,
            "dtype",
            f"dtype is {dtype_name(output)}",
            list_of((storage_name(row.output_dtype) for row in rows), "or"),
            *(_ask_for(row.output_dtype, output) for row in rows),
            product=target.product,
        )
    for row in outputs:
        if x.dtype in row.x:
            return row
    allowed = [dtype for row in outputs for dtype in row.x]
    exact = [dtype for dtype in allowed if is_exact(x.dtype, dtype)]
    wanted = (exact or allowed)[-1]
    fix = cast("x", x.dtype, wanted)
    names = ("scale_reciprocal", "offset")
    along = [
        name
        for name, tensor in zip(names, others, strict=False)
        if tensor is not None and tensor.dtype != wanted
    ]
    if along:
        fix = Fix(
            f"{fix.text}, and {list_of(along)} in the same dtype",
            fix.changes + tuple((name, wanted) for name in along),
            fix.numbers,
        )
    raise refused(
        LinearQuantTypeError,
        op,
        "x",
        f"x is {dtype_name(x.dtype)}",
        list_of(map(dtype_name, allowed), "or"),
        fix,
        product=target.product,
    )


def _check_newer(op: str, target: Target, x: torch.dtype, output: torch.dtype) -> None:
    """Refuse a row that a newer CANN brought, and the operator if a newer CANN brought all rows."""
    rows = quant_rows_of(target.product, op)
    newer = [row for row in rows if row.output_dtype == output and x in row.x]
    if not newer and quant_rows_in(target, op):
        return
    since = since_of((newer or list(rows))[0], target.product)
    raise refused(
        LinearQuantTypeError,
        op,
        "dtype",
        f"x is {dtype_name(x)} and dtype is {storage_name(output)}",
        f"this from CANN {since} on" if newer else f"no {op} before CANN {since}",
        upgrade(since),
        product=target.product,
        why=f"this is CANN {target.cann}",
        since=since,
        code=None,
    )


def _ask_for(target: torch.dtype, given: torch.dtype) -> Fix:
    bits = 8 if target == torch.int8 else 4
    numbers = f"the values have {bits} bits" if given != target else ""
    return Fix(f"ask for dtype {storage_name(target)}", (("dtype", target),), numbers)


def _to_one_dtype(
    row: QuantRow, x: TensorLike, scale_reciprocal: TensorLike, offset: TensorLike | None
) -> list[Fix]:
    """The advice to pass the others in the dtype of x; or x in their dtype, if the row has it and
    it holds x's values."""
    others = {"scale_reciprocal": scale_reciprocal.dtype}
    if offset is not None:
        others["offset"] = offset.dtype
    casts = [cast(name, dtype, x.dtype) for name, dtype in others.items() if dtype != x.dtype]
    fixes = [
        Fix(
            " and ".join(fix.text for fix in casts),
            tuple(change for fix in casts for change in fix.changes),
            "; ".join(fix.numbers for fix in casts if fix.numbers),
        )
    ]
    target, *more = set(others.values())
    if not more and target in row.x and is_exact(x.dtype, target):
        fixes.append(cast("x", x.dtype, target))
    return sorted(fixes, key=lambda fix: bool(fix.numbers))


def _check_dims(op: str, x: TensorLike, fewest: int) -> None:
    dims = len(x.shape)
    if not fewest <= dims <= QUANT_MAX_DIMS:
        raise _refused(
            op,
            "x",
            f"x has {dims} dims, shape {tuple(x.shape)}",
            f"{fewest} to {QUANT_MAX_DIMS} dims",
            "unsqueeze or flatten leading dims",
        )
    if known_true(x.shape[-1] == 0):
        raise _refused(
            op,
            "x",
            f"x has shape {tuple(x.shape)}, k is 0",
            "k of at least 1",
            "skip the layer when there is nothing to compute",
        )
