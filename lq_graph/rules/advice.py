"""What to do about dtypes that no row of a table has, and how that changes the numbers.

The advice that keeps the numbers comes first, then advice that changes the last bits, then the
rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .cann import Target, rows_in
from .refusal import Fix
from .tables import COLUMNS, Choice, Row, dtype_name

__all__ = [
    "Given",
    "cast",
    "fixes_of_columns",
    "fixes_of_storage",
    "fixes_of_weight",
    "is_exact",
    "nearest_rows",
]

# the dtypes of a call by argument, one for each of COLUMNS; None for absent
Given = Mapping[str, "torch.dtype | None"]

_I8, _I32, _I64, _U8 = torch.int8, torch.int32, torch.int64, torch.uint8
_F16, _BF16, _F32, _F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# the dtypes that hold every value of a dtype
_EXACT: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    _I8: (_I32, _I64, _F16, _BF16, _F32, _F64),
    _U8: (_I32, _I64, _F16, _BF16, _F32, _F64),
    _I32: (_I64, _F64),
    _F16: (_F32, _F64),
    _BF16: (_F32, _F64),
    _F32: (_F64,),
}
_SAME, _ROUNDED, _CHANGED = range(3)  # how a step changes the numbers of the result


def is_exact(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether target can hold every value of source."""
    return target == source or target in _EXACT.get(source, ())


def cast(argument: str, source: torch.dtype, target: torch.dtype) -> Fix:
    """The advice to pass an argument in another dtype."""
    name = dtype_name(target)
    text = {_F32: f"pass {argument}.float()", _I32: f"pass {argument}.int()"}
    numbers = "" if is_exact(source, target) else f"{argument} is rounded to {name}"
    return Fix(
        text.get(target, f"pass {argument}.to(torch.{name})"), ((argument, target),), numbers
    )


class _Step(NamedTuple):
    """A change of one column."""

    dtype: torch.dtype | None
    text: str
    rank: int = _SAME
    numbers: str = ""


def fixes_of_columns(
    target: Target, storage: torch.dtype, given: Given, rows: Sequence[Row]
) -> tuple[Fix, ...]:
    """How to change a call that matches no row, so that it matches one.

    Args:
        target: whose table is read.
        storage: the dtype of x1 and weight.
        given: the dtypes of the rest.
        rows: the rows to match. Rows that differ in the same columns share one fix.
    """
    fixes = _by_row(given, rows)
    if storage == _I32 and _has_row(target, _I8, given):  # the same values, so the same numbers
        kept = sum(not fix.numbers for fix in fixes)
        fixes.insert(kept, _to_storage("x1 and weight", _I32, _I8))
    return tuple(fixes)


def _by_row(given: Given, rows: Sequence[Row]) -> list[Fix]:
    found: dict[tuple[str, ...], tuple[tuple[int, int, int], Fix]] = {}
    for row in rows:
        columns = row.misses(given)
        steps = [_STEPS[column](given, row) for column in columns]
        fix = Fix(
            ", and ".join(step.text for step in steps),
            tuple((column, step.dtype) for column, step in zip(columns, steps, strict=True)),
            "; ".join(dict.fromkeys(step.numbers for step in steps if step.numbers)),
        )
        dropped = sum(step.dtype is None for step in steps)
        rank = max(step.rank for step in steps), max(map(COLUMNS.index, columns)), dropped
        if columns not in found or rank < found[columns][0]:
            found[columns] = rank, fix
    return [fix for _, fix in sorted(found.values(), key=lambda one: one[0])]


def fixes_of_storage(
    target: Target, x1: torch.dtype, weight: torch.dtype, given: Given
) -> tuple[Fix, ...]:
    """What to do about an x1 of a dtype that the product has no row for."""
    storage = weight if rows_in(target, weight) else _I8
    if weight == storage:
        fixes = [_to_storage("x1", x1, storage)]
    elif weight == x1:
        fixes = [_to_storage("x1 and weight", x1, storage)]
    else:
        fixes = [_to_storage("x1", x1, storage), _to_storage("weight", weight, storage)]
    rows = nearest_rows(target, storage, given)[:1]
    fixes += [fix for row in rows if row.misses(given) for fix in _by_row(given, [row])]
    text = ", and ".join(fix.text for fix in fixes)
    numbers = "; ".join(fix.numbers for fix in fixes if fix.numbers)
    rest = tuple(change for fix in fixes for change in fix.changes if change[0] in COLUMNS)
    return (Fix(text, (("x1", storage), ("weight", storage), *rest), numbers),)


def fixes_of_weight(
    target: Target, x1: torch.dtype, weight: torch.dtype, given: Given
) -> tuple[Fix, ...]:
    """What to do about a weight of another dtype than x1."""
    fixes = [_to_storage("weight", weight, x1)]
    if (x1, weight) == (_I32, _I8) and _has_row(target, _I8, given):
        fixes.insert(0, _to_storage("x1", x1, _I8))
    return tuple(fixes)


def _to_storage(which: str, source: torch.dtype, target: torch.dtype) -> Fix:
    """Bring x1, weight or both to a storage dtype."""
    changes = tuple((name, target) for name in which.split(" and "))
    if source == _I32:
        return Fix(f"unpack {which} with lq_graph.unpack_int4", changes)
    name = "int4 in int32" if target == _I32 else "int8"
    if source.is_floating_point:
        verb = "are" if len(changes) > 1 else "is"
        numbers = f"{which} {verb} rounded to {name}"
        how = (
            "lq_graph.dynamic_quant" if target == _I32 else "lq_graph.dynamic_quant or static_quant"
        )
        text = f"quantize {which} to {name}" + (f" ({how})" if which == "x1" else "")
        return Fix(text, changes, numbers)
    text = f"pass {which} as {name}, if the values fit"
    return Fix(text + (" (lq_graph.pack_int4)" if target == _I32 else ""), changes)


def _has_row(target: Target, storage: torch.dtype, given: Given) -> bool:
    return any(not row.misses(given) for row in rows_in(target, storage))


def nearest_rows(target: Target, storage: torch.dtype, given: Given) -> list[Row]:
    """A product's rows for one storage dtype, the rows with the fewest wrong columns first; among
    equals, first the rows with the given output_dtype."""
    return sorted(
        rows_in(target, storage),
        key=lambda row: (len(row.misses(given)), "output_dtype" in row.misses(given)),
    )


# ---- one column each: the step from what is given to what a row has ----


def _to_choice(column: str, source: torch.dtype, choices: Choice) -> _Step:
    """The step to a dtype that holds the values, float32 before others; else to float32."""
    present = [dtype for dtype in choices if dtype is not None]
    exact = [dtype for dtype in present if is_exact(source, dtype)]
    target = _F32 if _F32 in (exact or present) else (exact or present)[0]
    fix = cast(column, source, target)
    return _Step(target, fix.text, _ROUNDED if fix.numbers else _SAME, fix.numbers)


def _offset(given: Given, row: Row) -> _Step:
    dtype = given["offset"]
    assert dtype is not None  # every row may go without
    if row.offset != (None,):
        return _to_choice("offset", dtype, row.offset)
    output = row.output
    packed, pertoken = given["scale"] == _I64, given["pertoken_scale"] is not None
    if packed or pertoken or _I32 in (row.storage, output):
        return _Step(None, "drop offset, which is not read")
    numbers = f"the result is rounded to {dtype_name(output)} before the sum"
    return _Step(None, "drop offset and add it to the result", _ROUNDED, numbers)


def _pertoken_scale(given: Given, row: Row) -> _Step:
    dtype, output = given["pertoken_scale"], dtype_name(row.output)
    if dtype is None:
        return _Step(_F32, "pass a pertoken_scale of ones, torch.ones(m)")
    if row.pertoken_scale != (None,):
        return _to_choice("pertoken_scale", dtype, row.pertoken_scale)
    if row.output == _I32:
        return _Step(None, "drop pertoken_scale, which int32 output (the sums) does not contain")
    if row.output == _I8:
        return _Step(None, "drop pertoken_scale", _CHANGED, "each row lacks its factor")
    numbers = f"the result is rounded to {output} before the product"
    text = "drop pertoken_scale and multiply each row of the result by it"
    return _Step(None, text, _ROUNDED, numbers)


def _bias(given: Given, row: Row) -> _Step:
    dtype, output = given["bias"], dtype_name(row.output)
    assert dtype is not None  # every row may go without
    if not dtype.is_floating_point:  # an integer is added before the scale
        fits = ", if its values fit" if dtype == _I64 else ""
        return _Step(_I32, f"pass bias.int(){fits}")
    floats = tuple(d for d in row.bias if d is not None and d.is_floating_point)
    if floats:
        return _to_choice("bias", dtype, floats)
    if row.output == _I32:
        return _Step(None, "drop bias and add it to the result, after the scale")
    if row.output == _I8:
        scale = "the float32 scale" if given["scale"] == _I64 else "scale"
        numbers = "bias is rounded to a multiple of scale"
        return _Step(_I32, f"pass bias as int32, round(bias / {scale})", _ROUNDED, numbers)
    numbers = f"the result is rounded to {output} before the sum"
    return _Step(None, "drop bias and add it to the result", _ROUNDED, numbers)


def _scale(given: Given, row: Row) -> _Step:
    dtype = given["scale"]
    assert dtype is not None  # an argument that is always there
    if dtype == _I64:
        text = "pass scale as float32, as it was before packing"
        return _Step(_F32, text, _ROUNDED, "packing kept 19 of its bits")
    floats = tuple(d for d in row.scale if d != _I64)
    if floats:
        return _to_choice("scale", dtype, floats)
    text = "pack scale with lq_graph.trans_quant_param"
    return _Step(_I64, text, _CHANGED, "packing keeps 19 of its bits")


def _output_dtype(given: Given, row: Row) -> _Step:
    dtype, target = given["output_dtype"], row.output
    assert dtype is not None
    name, wanted = dtype_name(target), dtype_name(dtype)
    text = f"ask for output_dtype {name}"
    if target == _I32:
        if dtype in (_F32, _F64):
            return _Step(target, f"{text}, the sums, and multiply them by scale")
        if dtype == _I64:
            return _Step(target, f"{text} and convert the result")
        return _Step(target, text, _CHANGED, f"int32 is the sums before scale, not {wanted}")
    if (dtype, target) == (_U8, _I8):
        return _Step(target, text, _ROUNDED, "the result is clamped to [-128, 127], not [0, 255]")
    if target == _I8:
        numbers = "the result is rounded to an integer and clamped to [-128, 127]"
        return _Step(target, text, _CHANGED, numbers)
    if dtype.is_floating_point:
        order = _ROUNDED if dtype in (_F32, _F64) else _CHANGED
        return _Step(target, text, order, f"the result has the range and precision of {name}")
    if dtype == _I8:
        text += " and quantize the result with lq_graph.static_quant"
        return _Step(target, text, _ROUNDED, "it is rounded twice")
    return _Step(target, text, _CHANGED, f"the result is {name}, with the scale in it")


_STEPS = {
    "offset": _offset,
    "pertoken_scale": _pertoken_scale,
    "bias": _bias,
    "scale": _scale,
    "output_dtype": _output_dtype,
}
