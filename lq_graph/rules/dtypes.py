"""Finds the row of the support table for the dtypes of a linear_quant call, or says why there is
none."""

from __future__ import annotations

from functools import lru_cache

import torch

from ..errors import LinearQuantTypeError
from .advice import Given, fixes_of_columns, fixes_of_storage, fixes_of_weight, nearest_rows
from .cann import Target, rows_in, since_of, target_of, upgrade
from .refusal import Fix, Refusal, list_of, names_of, refused
from .tables import (
    COLUMNS,
    PRODUCTS,
    STORAGE_DTYPES,
    Choice,
    Product,
    Row,
    dtype_name,
    rows_of,
    storage_name,
)

__all__ = ["row_of_dtypes"]

_BIAS_ORDER = "an int32 bias is added before the scale, a float bias after it"
_PACKED = "int64 is the packed form of lq_graph.trans_quant_param"


def row_of_dtypes(
    target: Target,
    x1: torch.dtype,
    weight: torch.dtype,
    given: Given,
) -> Row:
    """The first row of the product's table that has these dtypes.

    Args:
        target: whose table is read.
        x1, weight: their dtypes.
        given: the dtypes of the other columns; None: absent.

    Raises:
        LinearQuantTypeError: there is no such row, or a newer CANN brought it.
    """
    row = _find_row(target, x1, *(given[column] for column in COLUMNS)) if weight == x1 else None
    if row is not None:
        return row
    product = target.product
    if weight == x1:
        for newer in rows_of(product, x1):
            if not newer.misses(given):
                raise _newer_refused(target, newer, given)
    storages = list_of((storage_name(d) for d in STORAGE_DTYPES if rows_in(target, d)), "or")
    if not rows_in(target, x1):
        raise refused(
            LinearQuantTypeError,
            "linear_quant",
            "x1",
            f"x1 is {dtype_name(x1)}",
            storages,
            *fixes_of_storage(target, x1, weight, given),
            product=product,
        )
    if weight != x1:
        raise refused(
            LinearQuantTypeError,
            "linear_quant",
            "weight",
            f"weight is {dtype_name(weight)} and x1 is {dtype_name(x1)}",
            f"one dtype for both, {storages}",
            *fixes_of_weight(target, x1, weight, given),
            product=product,
        )
    raise _columns_refused(target, x1, given)


@lru_cache(maxsize=1024)
def _find_row(target: Target, storage: torch.dtype, *others: torch.dtype | None) -> Row | None:
    """Cached: with symbolic sizes a model looks up the same few rows on every call."""
    given = dict(zip(COLUMNS, others, strict=True))
    return next((row for row in rows_in(target, storage) if not row.misses(given)), None)


def _newer_refused(target: Target, row: Row, given: Given) -> LinearQuantTypeError:
    """A row that a newer CANN brought. The advice: that CANN, or a row that it has and that gives
    the same numbers."""
    since = since_of(row, target.product, given)
    others = fixes_of_columns(target, row.storage, given, rows_in(target, row.storage))
    dtypes = [
        f"{column} {dtype_name(given[column])}"
        for column in ("scale", "offset", "pertoken_scale", "bias")
        if given[column] is not None
    ]
    return Refusal(
        "linear_quant",
        ("x1", "weight"),
        f"x1 and weight are {storage_name(row.storage)} with {', '.join(dtypes)} and "
        f"{dtype_name(row.output)} output",
        f"this from CANN {since} on",
        product=target.product,
        why=f"this is CANN {target.cann}",
        since=since,
        fixes=(upgrade(since), *(fix for fix in others if not fix.numbers)),
        code=None,
    ).error(LinearQuantTypeError)


def _columns_refused(target: Target, storage: torch.dtype, given: Given) -> LinearQuantTypeError:
    """Name one wrong column if changing it is enough, else the columns that the nearest row does
    not have."""
    product = target.product
    rows = [row for row in rows_in(target, storage) if len(row.misses(given)) == 1]
    rows = rows or nearest_rows(target, storage, given)[:1]
    fixes = fixes_of_columns(target, storage, given, rows)
    blamed = _blamed(given, fixes)
    missed = [row for row in rows if row.misses(given) == blamed]
    choices = tuple(
        (column, tuple(dict.fromkeys(d for row in missed for d in row.choices(column))))
        for column in blamed
    )
    return Refusal(
        "linear_quant",
        blamed,
        " and ".join(f"{column} is {_word(given[column])}" for column in blamed),
        choices=choices,
        context=_context(storage, given, blamed),
        product=product,
        why=_why(target, storage, given, *choices[0]) if len(choices) == 1 else "",
        fixes=fixes,
        takers=tuple(
            other
            for other in PRODUCTS
            if other is not product
            and any(
                not row.misses(given) for row in rows_in(target_of(other, target.cann), storage)
            )
        ),
        aclnn=_taken_by_aclnn(product, storage, given, blamed),
    ).error(LinearQuantTypeError)


def _blamed(given: Given, fixes: tuple[Fix, ...]) -> tuple[str, ...]:
    """The columns of the best fix; given arguments are blamed before absent ones."""
    of_columns = [
        tuple(column for column, _ in fix.changes)
        for fix in fixes
        if all(column in COLUMNS for column, _ in fix.changes)
    ]
    return min(of_columns, key=lambda columns: any(given[column] is None for column in columns))


def _word(dtype: torch.dtype | None) -> str:
    return "absent" if dtype is None else dtype_name(dtype)


def _context(storage: torch.dtype, given: Given, blamed: tuple[str, ...]) -> str:
    """The other arguments that a refusal of the blamed columns depends on."""
    others = [
        f"{column} {dtype_name(given[column])}"
        for column in ("scale", "offset", "pertoken_scale", "bias")
        if column not in blamed and given[column] is not None
    ]
    context = f"{storage_name(storage)} x1 and weight"
    if "output_dtype" not in blamed:
        context += f", {dtype_name(given['output_dtype'])} output"
    return f"{context} and {', '.join(others)}" if others else context


def _why(target: Target, storage: torch.dtype, given: Given, column: str, allowed: Choice) -> str:
    """Which rows of the product take the refused dtype, and what the dtypes mean."""
    value = given[column]
    if column == "output_dtype" or value is None:
        return ""
    anything = set(allowed) == {None}  # no dtype is allowed
    takers = [
        row
        for row in rows_in(target, storage)
        if (row.choices(column) != (None,) if anything else value in row.choices(column))
    ]
    what = "one" if anything else dtype_name(value)
    reasons = []
    outputs = sorted({dtype_name(row.output) for row in takers})
    same_output = [row for row in takers if row.output == given["output_dtype"]]
    if same_output:
        row = min(same_output, key=lambda row: len(row.misses(given)))
        others = [other for other in row.misses(given) if other != column]
        conditions = [f"{other} {names_of(row.choices(other))}" for other in others]
        reasons.append(f"{dtype_name(row.output)} output takes {what} with {list_of(conditions)}")
    elif takers:
        plural = "outputs take" if len(outputs) > 1 else "output takes"
        reasons.append(f"only {list_of(outputs)} {plural} {what}")
    elif anything:
        reasons.append("no output takes one")
    if column == "bias" and value.is_floating_point:
        reasons.append(_BIAS_ORDER)
    if column == "scale" and value == torch.int64:
        reasons.append(_PACKED)
    return "; ".join(reasons)


def _taken_by_aclnn(
    product: Product, storage: torch.dtype, given: Given, blamed: tuple[str, ...]
) -> str:
    """What aclnn does with a call that only the table refuses; empty if aclnn refuses it too
    (quant_matmul_checker.cpp, hicann/ops-nn)."""
    only_offset = blamed == ("offset",) and given["offset"] == torch.float32
    pertoken, output = given["pertoken_scale"], given["output_dtype"]
    if only_offset and (pertoken is not None or torch.int32 in (storage, output)):
        return "aclnn would take the offset and not read it"
    if product.key == "310P" and "pertoken_scale" in blamed and pertoken == torch.float32:
        return "the newest aclnn takes one in some calls, but no graph does"
    return ""
