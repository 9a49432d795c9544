"""plan(): the one place where LinearQuant's rules are applied.

The fake kernel, the CPU kernel, the NPU kernel and the GE converter all ask here and hold no
checks of their own, so all four refuse the same input with the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import torch

from ..errors import PARAM_INVALID, LinearQuantTypeError, LinearQuantValueError
from ..kernels import TensorLike, is_cut, logical_k
from .products import get_product
from .symbolic import differ, sure
from .tables import (
    COLUMNS,
    DIM_MAX,
    LAST_DIM_MAX,
    MAX_DIMS,
    MIN_DIMS,
    PRODUCTS,
    STORAGE_DTYPES,
    Product,
    Row,
    dtype_name,
    rows_of,
    storage_name,
)

__all__ = [
    "Plan",
    "Spec",
    "TensorLike",
    "check_finite",
    "nearest_rows",
    "plan",
    "plan_trans_quant_param",
]


class Spec(NamedTuple):
    """A dtype and a shape: all that is decided by."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


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
        cut_scale: the kernel keeps only the first 19 bits of the float32 scale.
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
    cut_scale: bool


def _type_error(text: str, aclnn: str = PARAM_INVALID) -> NoReturn:
    raise LinearQuantTypeError(f"linear_quant: {text} {aclnn}")


def _value_error(text: str, aclnn: str = PARAM_INVALID) -> NoReturn:
    raise LinearQuantValueError(f"linear_quant: {text} {aclnn}")


def _shape(tensor: TensorLike) -> str:
    return str(tuple(tensor.shape))


def _names(dtypes: Sequence[torch.dtype | None]) -> str:
    """'float32, int64 or absent' for a list of choices."""
    words = sorted({dtype_name(d) for d in dtypes if d is not None})
    if None in dtypes:
        words.append("absent")
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _storages(product: Product) -> str:
    """'int8 or int32 (eight int4 each)': what x1 and weight may be on a product."""
    return " or ".join(storage_name(dtype) for dtype in STORAGE_DTYPES if rows_of(product, dtype))


# said of a refused column, before what to do
_WHY = {
    "offset": "only int8 output takes an offset",
    "pertoken_scale": "float16 and bfloat16 outputs take one, with a float scale",
    "bias": "an int32 bias is added before the scale, a float bias after it",
}
_WHY_PACKED = (
    "int64 is the packed form (lq_graph.trans_quant_param) and serves int8 output and, without "
    "pertoken_scale, float16 output"
)

Given = dict[str, "torch.dtype | None"]


@lru_cache(maxsize=1024)
def _row_for(
    product: Product,
    storage: torch.dtype,
    output: torch.dtype,
    scale: torch.dtype,
    offset: torch.dtype | None,
    pertoken_scale: torch.dtype | None,
    bias: torch.dtype | None,
) -> Row | None:
    """The first row that has these dtypes. Cached: a model asks the same few on every call."""
    given = _given(output, scale, offset, pertoken_scale, bias)
    return next((row for row in rows_of(product, storage) if not row.misses(given)), None)


def _given(
    output: torch.dtype,
    scale: torch.dtype,
    offset: torch.dtype | None,
    pertoken_scale: torch.dtype | None,
    bias: torch.dtype | None,
) -> Given:
    return {
        "scale": scale,
        "offset": offset,
        "pertoken_scale": pertoken_scale,
        "bias": bias,
        "output_dtype": output,
    }


def nearest_rows(product: Product, storage: torch.dtype, given: Given) -> list[Row]:
    """A product's rows for one storage dtype, those with the fewest wrong columns first; among
    equals, those that have the output asked for."""
    return sorted(
        rows_of(product, storage),
        key=lambda row: (len(row.misses(given)), "output_dtype" in row.misses(given)),
    )


def _refuse_dtypes(product: Product, storage: torch.dtype, given: Given) -> NoReturn:
    """Blame one column if changing it alone would do, else those the nearest row misses."""
    fixes: dict[str, tuple[torch.dtype | None, ...]] = {}
    for row in rows_of(product, storage):
        misses = row.misses(given)
        if len(misses) == 1:
            fixes[misses[0]] = (*fixes.get(misses[0], ()), *row.choices(misses[0]))
    blamed: tuple[str, ...]
    if fixes:
        blamed = (min(fixes.items(), key=_order(given))[0],)
    else:
        nearest = nearest_rows(product, storage, given)[0]
        blamed = nearest.misses(given)
        fixes = {column: nearest.choices(column) for column in blamed}

    def is_given(column: str) -> str:
        dtype = given[column]
        return f"{column} is {'absent' if dtype is None else dtype_name(dtype)}"

    others = [
        f"{column} {dtype_name(given[column])}"
        for column in ("scale", "offset", "pertoken_scale", "bias")
        if column not in blamed and given[column] is not None
    ]
    context = f"{storage_name(storage)} x1 and weight"
    if "output_dtype" not in blamed:
        context += f", {dtype_name(given['output_dtype'])} output"
    allowed = " and ".join(
        _allowed(column, fixes[column], named=len(blamed) > 1) for column in blamed
    )
    packed = "scale" in blamed and given["scale"] == torch.int64
    why = _WHY_PACKED if packed else _WHY.get(blamed[0]) if len(blamed) == 1 else None
    together = " and ".join(_advice(column, given[column], fixes[column]) for column in blamed)
    instead = [
        _advice(column, given[column], choices)
        for column, choices in sorted(fixes.items(), key=_order(given))
        if column not in blamed
    ]
    takers = [
        str(other)
        for other in PRODUCTS
        if other is not product and any(not row.misses(given) for row in rows_of(other, storage))
    ]
    _type_error(
        f"{' and '.join(map(is_given, blamed))}; with {context}"
        f"{' and ' + ', '.join(others) if others else ''}, {product} {allowed}"
        + (f" ({why})" if why else "")
        + f". What to do: {', or '.join([together, *instead])}."
        + (f" {', '.join(takers)} would take it as it is." if takers else ""),
        _taken_by_aclnn(product, storage, given, blamed) or PARAM_INVALID,
    )


def _taken_by_aclnn(
    product: Product, storage: torch.dtype, given: Given, blamed: tuple[str, ...]
) -> str:
    """What aclnn does with a call that the table refuses and aclnn does not; empty if it refuses
    too (quant_matmul_checker.cpp, hicann/ops-nn)."""
    only_offset = blamed == ("offset",) and given["offset"] == torch.float32
    pertoken, output = given["pertoken_scale"], given["output_dtype"]
    if only_offset and (pertoken is not None or torch.int32 in (storage, output)):
        return "(aclnn would take the offset and not read it)"
    if product.key == "310P" and "pertoken_scale" in blamed and pertoken == torch.float32:
        return "(the newest aclnn takes one in some calls, but no graph does)"
    return ""


def _order(given: Given) -> Callable[[tuple[str, Any]], tuple[bool, int]]:
    """Blame what was given before what is absent, then by COLUMNS."""
    return lambda fix: (given[fix[0]] is None, COLUMNS.index(fix[0]))


def _allowed(column: str, choices: Sequence[torch.dtype | None], *, named: bool) -> str:
    if set(choices) == {None}:
        return f"takes no {column}"
    return f"allows {column + ' ' if named else ''}{_names(choices)}"


def _advice(column: str, given: torch.dtype | None, choices: Sequence[torch.dtype | None]) -> str:
    """What to do about one column."""
    present = [dtype for dtype in choices if dtype is not None]
    if not present:
        return f"drop {column}"
    if column == "output_dtype":
        return f"ask for output_dtype {_names(present)} and convert the result"
    if given is not None and given.is_floating_point and torch.float32 in present:
        return f"pass {column}.float()"
    packed = column == "scale" and given == torch.int64 and torch.int64 not in present
    return f"pass {column} as {_names(present)}" + (", as it was before packing" if packed else "")


def _check_not_empty(product: Product, name: str, tensor: TensorLike) -> None:
    """No dim is 0, except m where the product gives an empty output for it."""
    for dim, size in enumerate(tensor.shape):
        if sure(size == 0):
            is_m = name == "x1" and dim == len(tensor.shape) - 2
            if is_m and product.empty_m:
                continue
            what = {1: "k", 2: "m" if name == "x1" else "n"}.get(len(tensor.shape) - dim, "a batch")
            _value_error(
                f"{name} has shape {_shape(tensor)}, {what} is 0; {product} takes no empty {name}. "
                "What to do: skip the layer when there is nothing to compute."
            )


def _check_contiguous(name: str, tensor: TensorLike) -> None:
    """int4 is read as packed memory: aclnn counts the elements of an int32 view eight times over
    without looking at its strides (aclnn_quant_matmul_v4.cpp, hicann/ops-nn)."""
    if not isinstance(tensor, torch.Tensor) or any(sure(size == 0) for size in tensor.shape):
        return
    expected: int = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not sure(size == 1) and sure(stride != expected):
            _value_error(
                f"{name} has shape {_shape(tensor)} with strides {tuple(tensor.stride())}; "
                f"int32 (int4) must be contiguous. What to do: pass {name}.contiguous(), having "
                "made sure that k is what was packed."
            )
        expected = expected * size


def _check_vector(name: str, tensor: TensorLike, n: int) -> None:
    """scale and offset: (1,) or (n,)."""
    if len(tensor.shape) != 1:
        _value_error(
            f"{name} has shape {_shape(tensor)}; allowed is (1,) or (n,) = ({n},). "
            f"What to do: pass {name}.reshape(-1) if it holds 1 or n values."
        )
    size = tensor.shape[0]
    if not sure(size == 1) and differ(size, n):
        _value_error(
            f"{name} has {size} values; allowed is 1 (per-tensor) or n = {n} (per-channel, one "
            f"for each row of weight). What to do: pass one value or one for each output channel."
        )


def _check_bias(bias: TensorLike, plan_shape: tuple[int, ...], int4: bool) -> None:
    """bias: (n,), or (batch, 1, n) where the output has 3 dims."""
    n = plan_shape[-1]
    if len(bias.shape) == 1:
        if differ(bias.shape[0], n):
            _value_error(
                f"bias has {bias.shape[0]} values; allowed is n = {n}, one for each row of weight. "
                "What to do: pass one value for each output channel, or no bias."
            )
        return
    if len(bias.shape) == 3 and len(plan_shape) == 3 and not int4:
        wanted = (plan_shape[0], 1, n)
        if not any(differ(a, b) for a, b in zip(bias.shape, wanted, strict=True)):
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
        if sure(a == 1):
            batch.append(b)
        elif sure(b == 1) or not differ(a, b):
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

    Looks only at dtypes, shapes and, for int4, strides, so it answers alike for real, fake and
    symbolic tensors. An answer for sizes that are numbers is kept.

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
    # one flat key of dtypes and shapes: what a look-up costs is what every eager call pays
    key = (
        product,
        output,
        x1.dtype,
        x1.shape,
        weight.dtype,
        weight.shape,
        scale.dtype,
        scale.shape,
        *((None, None) if offset is None else (offset.dtype, offset.shape)),
        *((None, None) if pertoken_scale is None else (pertoken_scale.dtype, pertoken_scale.shape)),
        *((None, None) if bias is None else (bias.dtype, bias.shape)),
    )
    try:
        found = _cached_decision(*key)
    except TypeError as error:
        if isinstance(error, LinearQuantTypeError):
            raise
        found = _decide(*key)  # symbolic sizes cannot be looked up
    if found.int4:
        _check_contiguous("x1", x1)
        _check_contiguous("weight", weight)
    return found


def _decide(product: Product, output: torch.dtype, *key: Any) -> Plan:
    """plan(), from dtypes and shapes alone: those of the six tensors in turn, None if absent."""
    given = [None if dtype is None else Spec(dtype, tuple(shape)) for dtype, shape in _pairs(key)]
    x1, weight, scale, offset, pertoken_scale, bias = given
    assert x1 is not None and weight is not None and scale is not None

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
    dtypes = (
        output,
        scale.dtype,
        None if offset is None else offset.dtype,
        None if pertoken_scale is None else pertoken_scale.dtype,
        None if bias is None else bias.dtype,
    )
    row = _row_for(product, x1.dtype, *dtypes)
    if row is None:
        _refuse_dtypes(product, x1.dtype, _given(*dtypes))

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
    m, k = x1.shape[-2], logical_k(x1.shape[-1], x1.dtype)
    if differ(x1.shape[-1], words):
        counted = f" ({k} and {logical_k(words, weight.dtype)} int4 values)" if int4 else ""
        transposed = sure(weight.shape[-2] == x1.shape[-1])
        hint = (
            "the weight looks transposed: pass it as (n, k)"
            if transposed
            else "weight is (n, k), untransposed, with the k of x1"
        )
        _value_error(
            f"x1 {_shape(x1)} and weight {_shape(weight)} differ in k: {x1.shape[-1]} and "
            f"{words}{counted}. What to do: {hint}."
        )
    for name, tensor in (("x1", x1), ("weight", weight)):
        _check_not_empty(product, name, tensor)
    if int4 and sure(n % pack != 0):
        _value_error(
            f"weight has n = {n} rows; int4 needs n and k to be multiples of {pack}. What to do: "
            "pad the output channels with zeros and slice the result."
        )
    exempt = not int4 and not row.folds_scale and pertoken_scale is not None
    if product.limits_k and not exempt and sure(k > LAST_DIM_MAX):
        same = [r for r in rows_of(product, torch.int8) if r.output == row.output and not int4]
        pertoken = any(torch.float32 in r.pertoken_scale for r in same)
        _value_error(
            f"k is {k}; the last dim of x1 and weight is at most {LAST_DIM_MAX} on {product}"
            + (" unless a float scale comes with pertoken_scale" if pertoken else "")
            + ". What to do: split k over two layers and add their results.",
            "(aclnn would report 561002, with a FRACTAL_NZ weight 161002)",
        )
    for name, size in (("m", m), ("k", k), ("n", n)):
        if sure(size > DIM_MAX):
            _value_error(
                f"{name} is {size}; no dim may exceed {DIM_MAX}. What to do: split the layer."
            )
    shape = (*_broadcast(x1, weight), m, n)

    _check_vector("scale", scale, n)
    if offset is not None:
        _check_vector("offset", offset, n)
    if pertoken_scale is not None and (
        len(pertoken_scale.shape) != 1 or differ(pertoken_scale.shape[0], m)
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
        cut_scale=product.cuts_scale
        and is_cut(scale, pertoken_scale, bias, output, per_tensor=sure(scale.shape[-1] == 1)),
    )


def _pairs(key: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(key[::2], key[1::2], strict=True)


# A model asks the same few questions on every call. A refusal is not kept.
_cached_decision = lru_cache(maxsize=4096)(_decide)


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
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            raise LinearQuantTypeError(
                f"trans_quant_param: {name} is {dtype_name(tensor.dtype)}; allowed is float32. "
                f"What to do: convert it with {name}.float(). {PARAM_INVALID}"
            )
        dims = len(tensor.shape)
        if dims not in (1, 2) or (dims == 2 and sure(tensor.shape[0] != 1)):
            raise LinearQuantValueError(
                f"trans_quant_param: {name} has shape {_shape(tensor)}; allowed are (1,), (n,) and "
                f"(1, n). {PARAM_INVALID}"
            )
        if sure(tensor.shape[-1] == 0):
            raise LinearQuantValueError(f"trans_quant_param: {name} is empty. {PARAM_INVALID}")
    if round_mode not in (0, 1):
        raise LinearQuantValueError(
            f"trans_quant_param: round_mode is {round_mode}; allowed are 0 (truncate the scale to "
            f"19 bits) and 1 (round it half to even). {PARAM_INVALID}"
        )
    if offset is None:
        return tuple(scale.shape)
    fits = len(scale.shape) == len(offset.shape)
    if fits and len(scale.shape) == 1:
        if sure(scale.shape[0] == 1):
            return tuple(offset.shape)
        if sure(offset.shape[0] == 1):
            return tuple(scale.shape)
    if not fits or differ(scale.shape[-1], offset.shape[-1]):
        raise LinearQuantValueError(
            f"trans_quant_param: scale {_shape(scale)} and offset {_shape(offset)} do not fit; "
            f"allowed are equal shapes, or 1 dim each with length 1 in one of them. {PARAM_INVALID}"
        )
    return tuple(scale.shape)


def check_finite(scale: torch.Tensor, offset: torch.Tensor | None) -> None:
    """Refuse a scale or offset that trans_quant_param cannot pack. Reads the values, so on the
    NPU it waits for them: for preparation, not for a forward.

    Raises:
        LinearQuantValueError: NaN or infinity.
    """
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise LinearQuantValueError(
                f"trans_quant_param: {name} holds NaN or infinity, which the packed form cannot "
                "carry. What to do: check the calibration that produced it."
            )
