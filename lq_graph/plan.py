"""plan(): the one place where LinearQuant's rules are applied.

The fake kernel, the CPU kernel, the NPU kernel and the GE converter all ask here and hold no
checks of their own, so all four refuse the same input with the same sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, cast

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import (
    LAST_DIM_MAX,
    MAX_DIMS,
    MIN_DIMS,
    STORAGE_DTYPES,
    Product,
    Row,
    dtype_name,
    rows_of,
)
from .product import get_product

__all__ = ["Plan", "TensorLike", "plan", "plan_trans_quant_param"]

_PARAM_INVALID = "161002"  # ACLNN_ERR_PARAM_INVALID

# the dtype columns of a row, in the order a message should blame them
_COLUMNS = ("scale", "offset", "pertoken_scale", "bias")


class TensorLike(Protocol):
    """What plan() looks at: a tensor, a fake tensor, or any record of a dtype and a shape."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Plan:
    """What one LinearQuant call is, once it is known to be legal.

    Attributes:
        product: the product whose table was read.
        row: the matching row of the table.
        output_dtype: dtype of the result.
        output_shape: (..., m, n), batch dims broadcast.
        m, k, n: logical sizes (k counts int4 values, not int32 words).
        int4: x1 and weight are int32 carrying eight int4 each.
        fold_scale: the scale is float32 and the kernel wants it folded, with the offset, into
            the packed int64 form.
    """

    product: Product
    row: Row
    output_dtype: torch.dtype
    output_shape: tuple[int, ...]
    m: int
    k: int
    n: int
    int4: bool
    fold_scale: bool


def _type_error(text: str) -> NoReturn:
    raise LinearQuantTypeError(f"linear_quant: {text} (aclnn would report {_PARAM_INVALID})")


def _value_error(text: str) -> NoReturn:
    raise LinearQuantValueError(f"linear_quant: {text} (aclnn would report {_PARAM_INVALID})")


def _shape(tensor: TensorLike) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


def _differ(a: int, b: int) -> bool:
    """a != b. Sizes only known at run time are taken to agree, and recorded as such."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    if guard_or_false(a != b):
        return True
    torch._check(a == b)
    return False


def _names(dtypes: Sequence[torch.dtype | None]) -> str:
    """'float32, int64 or absent' for a list of choices."""
    words = sorted({dtype_name(d) for d in dtypes if d is not None})
    if None in dtypes:
        words.append("absent")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _storages(product: Product) -> str:
    """'int8 or int32 (eight int4 each)': what x1 and weight may be on a product."""
    notes = {torch.int32: "int32 (eight int4 each)"}
    return " or ".join(
        notes.get(dtype, dtype_name(dtype)) for dtype in STORAGE_DTYPES if rows_of(product, dtype)
    )


_ADVICE = {
    "scale": {
        torch.int64: "an int64 scale is the packed form (lq_graph.trans_quant_param) and only "
        "serves int8 output and float16 output without pertoken_scale; pass the float scale",
        torch.bfloat16: "convert it with scale.float()",
        torch.float16: "convert it with scale.float()",
        torch.float64: "convert it with scale.float()",
        torch.float32: "pack it with lq_graph.trans_quant_param",
    },
    "offset": "only int8 output takes an offset: drop it, or leave output_dtype at torch.int8",
    "pertoken_scale": "only float16 and bfloat16 outputs take one, and it is float32",
    "bias": "an int32 bias is added before the scale, a float bias after it",
}


def _find_row(product: Product, given: dict[str, torch.dtype | None], rows: Sequence[Row]) -> Row:
    """The matching row, or an error that blames the one column that is furthest from the table."""
    for row in rows:
        if all(row.allows(column, given[column]) for column in _COLUMNS):
            return row

    def misses(row: Row) -> list[str]:
        return [column for column in _COLUMNS if not row.allows(column, given[column])]

    nearest = min(rows, key=lambda row: len(misses(row)))
    column = misses(nearest)[0]
    # all rows that would match if only this column were right
    choices: list[torch.dtype | None] = []
    for row in rows:
        if set(misses(row)) <= {*misses(nearest)}:
            choices += [c for c in getattr(row, column) if c not in choices]
    dtype = given[column]
    advice = _ADVICE[column]
    if isinstance(advice, dict):
        advice = advice.get(cast(torch.dtype, dtype), "see the support table in README")
    allowed = f"takes no {column}" if choices == [None] else f"allows {_names(choices)}"
    storage = "int4 (in int32)" if nearest.storage == torch.int32 else "int8"
    what = "is absent" if dtype is None else f"is {dtype_name(dtype)}"
    others = ", ".join(
        f"{name} {dtype_name(given[name])}"
        for name in _COLUMNS
        if name != column and given[name] is not None
    )
    _type_error(
        f"{column} {what}; with {storage} x1 and weight, {dtype_name(nearest.output)} output"
        f"{' and ' + others if others else ''}, {product} {allowed}. "
        f"What to do: {advice}."
    )


def _check_vector(name: str, tensor: TensorLike, n: int) -> None:
    """scale and offset: (1,) or (n,)."""
    if len(tensor.shape) != 1:
        _value_error(
            f"{name} has shape {_shape(tensor)}; allowed is (1,) or (n,) = ({n},). "
            f"What to do: pass {name}.reshape(-1) if it holds 1 or n values."
        )
    size = tensor.shape[0]
    if not guard_or_false(size == 1) and _differ(size, n):
        _value_error(
            f"{name} has {size} values; allowed is 1 (per-tensor) or n = {n} (per-channel, one "
            f"for each row of weight). What to do: pass one value or one for each output channel."
        )


def _check_bias(bias: TensorLike, plan_shape: tuple[int, ...], int4: bool) -> None:
    """bias: (n,), or (batch, 1, n) where the output has 3 dims."""
    n = plan_shape[-1]
    if len(bias.shape) == 1:
        if _differ(bias.shape[0], n):
            _value_error(
                f"bias has {bias.shape[0]} values; allowed is n = {n}, one for each row of weight. "
                "What to do: pass one value for each output channel, or no bias."
            )
        return
    if len(bias.shape) == 3 and len(plan_shape) == 3 and not int4:
        wanted = (plan_shape[0], 1, n)
        if not any(_differ(a, b) for a, b in zip(bias.shape, wanted, strict=True)):
            return
    allowed = f"(n,) = ({n},)"
    if not int4:
        allowed += " or, with a 3-dim output, (batch, 1, n)"
        if len(plan_shape) == 3:
            allowed += f" = ({plan_shape[0]}, 1, {n})"
    _value_error(
        f"bias has shape {_shape(bias)} and the output {tuple(plan_shape)}; allowed is {allowed}. "
        "What to do: reshape it, or add it after the layer."
    )


def _broadcast(x1: TensorLike, weight: TensorLike) -> tuple[int, ...]:
    left, right = tuple(x1.shape[:-2]), tuple(weight.shape[:-2])
    width = max(len(left), len(right))
    left = (1,) * (width - len(left)) + left
    right = (1,) * (width - len(right)) + right
    batch = []
    for a, b in zip(left, right, strict=True):
        if guard_or_false(a == 1):
            batch.append(b)
        elif guard_or_false(b == 1) or not _differ(a, b):
            batch.append(a)
        else:
            _value_error(
                f"the batch dims of x1 {_shape(x1)} and weight {_shape(weight)} do not broadcast: "
                f"{a} against {b}. What to do: make them equal, or 1 in one of the two."
            )
    return tuple(batch)


def plan(
    x1: TensorLike,
    weight: TensorLike,
    scale: TensorLike,
    offset: TensorLike | None = None,
    pertoken_scale: TensorLike | None = None,
    bias: TensorLike | None = None,
    *,
    output_dtype: torch.dtype | None = None,
    product: Product | None = None,
) -> Plan:
    """Decide what a LinearQuant call is, or say why it is none.

    Looks only at dtypes and shapes, so it costs the same for real, fake and symbolic tensors.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying int4; 2 to 6 dims.
        weight: the dtype of x1; (..., n, k), untransposed; int4 exactly (n, k/8).
        scale: float32, bfloat16 or packed int64; (1,) or (n,).
        offset: float32, (1,) or (n,); int8 output only.
        pertoken_scale: float32, (m,); float outputs only.
        bias: int32, or a float dtype where the row has it; (n,) or (batch, 1, n).
        output_dtype: torch.int8 (also None), float16, bfloat16 or int32.
        product: whose table to read; default `get_product()`.

    Returns:
        The Plan.

    Raises:
        LinearQuantTypeError: a dtype, or combination of dtypes, outside the product's table.
        LinearQuantValueError: a shape outside the specification.

    Source: the module's table and aclnnQuantMatmulV4.md (hicann/ops-nn).
    """
    product = product or get_product()
    output = torch.int8 if output_dtype is None else output_dtype

    # dtypes
    of_storage = rows_of(product, x1.dtype)
    if not of_storage:
        _type_error(
            f"x1 is {dtype_name(x1.dtype)}; {product} allows {_storages(product)}. What to do: "
            "quantize the activation first (int8), or pack int4 values with lq_graph.pack_int4."
        )
    if weight.dtype != x1.dtype:
        _type_error(
            f"weight is {dtype_name(weight.dtype)} and x1 is {dtype_name(x1.dtype)}; both must be "
            f"of one dtype, {_storages(product)}. What to do: load or convert the weight as "
            f"{dtype_name(x1.dtype)}."
        )
    int4 = x1.dtype == torch.int32
    rows = [row for row in of_storage if row.output == output]
    if not rows:
        outputs = tuple(dict.fromkeys(row.output for row in of_storage))
        _type_error(
            f"output_dtype is {dtype_name(output)}; with {'int4 (in int32)' if int4 else 'int8'} "
            f"x1 and weight, {product} allows {_names(outputs)}. What to do: "
            + (
                f"pass output_dtype={outputs[0]}."
                if output_dtype is None
                else "choose one of these and convert the result."
            )
        )
    given = {
        "scale": scale.dtype,
        "offset": None if offset is None else offset.dtype,
        "pertoken_scale": None if pertoken_scale is None else pertoken_scale.dtype,
        "bias": None if bias is None else bias.dtype,
    }
    row = _find_row(product, given, rows)

    # shapes
    for name, tensor in (("x1", x1), ("weight", weight)):
        dims = len(tensor.shape)
        if name == "weight" and int4:
            if dims != 2:
                _value_error(
                    f"weight has shape {_shape(tensor)}; an int4 weight has exactly 2 dims, "
                    "(n, k/8). What to do: one LinearQuant for each matrix."
                )
        elif not MIN_DIMS <= dims <= MAX_DIMS:
            _value_error(
                f"{name} has {dims} dims, shape {_shape(tensor)}; allowed are {MIN_DIMS} to "
                f"{MAX_DIMS}. What to do: unsqueeze or flatten leading dims."
            )
    pack = STORAGE_DTYPES[x1.dtype]
    words, n = weight.shape[-1], weight.shape[-2]
    m, k = x1.shape[-2], x1.shape[-1] * pack
    if _differ(x1.shape[-1], words):
        counted = f" ({k} and {words * pack} int4 values)" if int4 else ""
        transposed = guard_or_false(weight.shape[-2] == x1.shape[-1])
        hint = (
            "the weight looks transposed: pass it as (n, k)"
            if transposed
            else "weight is (n, k), untransposed, with the k of x1"
        )
        _value_error(
            f"x1 {_shape(x1)} and weight {_shape(weight)} differ in k: {x1.shape[-1]} and "
            f"{words}{counted}. What to do: {hint}."
        )
    for name, size in (("k", k), ("n", n)):
        if guard_or_false(size == 0):
            _value_error(
                f"{name} is 0, x1 {_shape(x1)}, weight {_shape(weight)}; allowed is 1 or more. "
                "What to do: skip the layer."
            )
    if int4 and guard_or_false(n % pack != 0):
        _value_error(
            f"weight has n = {n} rows; int4 needs n and k to be multiples of {pack}. What to do: "
            "pad the output channels with zeros and slice the result."
        )
    unlimited = not int4 and not row.folds_scale and pertoken_scale is not None
    if not unlimited and guard_or_false(k > LAST_DIM_MAX):
        _value_error(
            f"k is {k}; the last dim of x1 and weight is at most {LAST_DIM_MAX} on {product}"
            + (" unless pertoken_scale is given" if not int4 else "")
            + ". What to do: split k over two layers with int32 output and add them."
        )
    shape = (*_broadcast(x1, weight), m, n)

    _check_vector("scale", scale, n)
    if offset is not None:
        _check_vector("offset", offset, n)
    if pertoken_scale is not None and (
        len(pertoken_scale.shape) != 1 or _differ(pertoken_scale.shape[0], m)
    ):
        _value_error(
            f"pertoken_scale has shape {_shape(pertoken_scale)}; allowed is (m,) = ({m},), one "
            "value for each row of x1. What to do: pass the scales this input was quantized with."
        )
    if bias is not None:
        _check_bias(bias, shape, int4)

    return Plan(
        product=product,
        row=row,
        output_dtype=output,
        output_shape=shape,
        m=m,
        k=k,
        n=n,
        int4=int4,
        fold_scale=row.folds_scale and scale.dtype == torch.float32,
    )


def plan_trans_quant_param(
    scale: TensorLike, offset: TensorLike | None, round_mode: int
) -> tuple[int, ...]:
    """Shape of the packed scale trans_quant_param gives.

    Args:
        scale: float32, (1,), (n,) or (1, n).
        offset: float32, as scale; where both have 1 dim, one of length 1 broadcasts.
        round_mode: 0 or 1.

    Raises:
        LinearQuantTypeError: a dtype other than float32.
        LinearQuantValueError: shapes that do not fit, or another round_mode.

    Source: aclnnTransQuantParamV2 / V3 (hicann/ops-nn, quant/trans_quant_param_v2).
    """
    code = f"(aclnn would report {_PARAM_INVALID})"
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            raise LinearQuantTypeError(
                f"trans_quant_param: {name} is {dtype_name(tensor.dtype)}; allowed is float32. "
                f"What to do: convert it with {name}.float(). {code}"
            )
        dims = len(tensor.shape)
        if dims not in (1, 2) or (dims == 2 and guard_or_false(tensor.shape[0] != 1)):
            raise LinearQuantValueError(
                f"trans_quant_param: {name} has shape {_shape(tensor)}; allowed are (1,), (n,) and "
                f"(1, n). {code}"
            )
        if guard_or_false(tensor.shape[-1] == 0):
            raise LinearQuantValueError(f"trans_quant_param: {name} is empty. {code}")
    if round_mode not in (0, 1):
        raise LinearQuantValueError(
            f"trans_quant_param: round_mode is {round_mode}; allowed are 0 (truncate the scale to "
            f"19 bits) and 1 (round it half to even). {code}"
        )
    if offset is None:
        return tuple(scale.shape)
    fits = len(scale.shape) == len(offset.shape)
    if fits and len(scale.shape) == 1:
        if guard_or_false(scale.shape[0] == 1):
            return tuple(offset.shape)
        if guard_or_false(offset.shape[0] == 1):
            return tuple(scale.shape)
    if not fits or _differ(scale.shape[-1], offset.shape[-1]):
        raise LinearQuantValueError(
            f"trans_quant_param: scale {_shape(scale)} and offset {_shape(offset)} do not fit; "
            f"allowed are equal shapes, or 1 dim each with length 1 in one of them. {code}"
        )
    return tuple(scale.shape)
