"""plan() of the operators that quantize activations: the one place their rules are applied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch

from ..errors import PARAM_INVALID, LinearQuantTypeError, LinearQuantValueError
from ..kernels import Arithmetic, for_rows, storage_k
from .plan import TensorLike
from .products import get_product
from .symbolic import differ, sure
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
    """What one call is, once it is known to be legal.

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


def dynamic_arithmetic(product: Product, k: int) -> Arithmetic:
    """What a product's DynamicQuant kernel computes for rows of k."""
    return for_rows(product.dynamic_quant, k)


def plan_dynamic_quant(x: TensorLike, dtype: torch.dtype | None) -> QuantPlan:
    """Decide what a dynamic_quant call is, or say why it is none.

    Args:
        x: float16, bfloat16 where the product has it; (..., m, k), 2 to 8 dims.
        dtype: torch.int8 (also None), or torch.int32 for int4.

    Raises:
        LinearQuantTypeError: a dtype the product has no row for.
        LinearQuantValueError: a shape outside the specification.

    Source: aclnnDynamicQuant.md (hicann/ops-nn, quant/dynamic_quant/docs).
    """
    row = _row("dynamic_quant", x, torch.int8 if dtype is None else dtype)
    _check_dims("dynamic_quant", x, MIN_DIMS)
    *rows, k = x.shape
    pack = STORAGE_DTYPES[row.output_dtype]
    if sure(k % pack != 0):
        _value_error(
            f"dynamic_quant: x has k = {k}; int4 needs a multiple of {pack}. What to do: quantize "
            "to int8, or pad k with zeros here and in the weight."
        )
    product = get_product()
    if sure(k % product.dynamic_quant_k != 0):
        _value_error(
            f"dynamic_quant: x has k = {k}; on {product} it must be a multiple of "
            f"{product.dynamic_quant_k}. What to do: pad k with zeros here and in the weight."
        )
    return QuantPlan(row, (*rows, storage_k(k, row.output_dtype)), tuple(rows), pack > 1, product)


def plan_static_quant(
    x: TensorLike, scale_reciprocal: TensorLike, offset: TensorLike | None
) -> QuantPlan:
    """Decide what a static_quant call is, or say why it is none.

    Args:
        x: float16, float32, bfloat16 where the product has it; (..., k), 1 to 8 dims.
        scale_reciprocal: the dtype of x; (1,) or (k,).
        offset: as scale_reciprocal, of one shape with it.

    Raises:
        LinearQuantTypeError: a dtype the product has no row for, or another one than x's.
        LinearQuantValueError: a shape outside the specification.

    Source: aclnnAscendQuantV3.md (hicann/ops-nn, quant/ascend_quant_v2/docs) and the operator's
    definition, which takes one dtype for all three.
    """
    row = _row("static_quant", x, torch.int8)
    _check_dims("static_quant", x, 1)
    k = x.shape[-1]
    for name, tensor in (("scale_reciprocal", scale_reciprocal), ("offset", offset)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise LinearQuantTypeError(
                f"static_quant: {name} is {dtype_name(tensor.dtype)} and x {dtype_name(x.dtype)}; "
                f"both must be of one dtype. What to do: pass {name}.to(x.dtype). {PARAM_INVALID}"
            )
        shape = tuple(tensor.shape)
        if len(shape) != 1 or not (sure(shape[0] == 1) or not differ(shape[0], k)):
            _value_error(
                f"static_quant: {name} has shape {shape}; allowed is (1,) or (k,) = ({k},). What "
                f"to do: pass {name}.reshape(-1) if it holds 1 or k values."
            )
    if offset is not None and differ(offset.shape[0], scale_reciprocal.shape[0]):
        _value_error(
            f"static_quant: offset has {offset.shape[0]} values and scale_reciprocal "
            f"{scale_reciprocal.shape[0]}; both must have as many. What to do: expand the shorter."
        )
    return QuantPlan(row, tuple(x.shape), tuple(x.shape[:-1]), False, get_product())


def _value_error(text: str) -> NoReturn:
    raise LinearQuantValueError(f"{text} {PARAM_INVALID}")


def _row(op: str, x: TensorLike, output: torch.dtype) -> QuantRow:
    product = get_product()
    rows = quant_rows_of(product, op)
    outputs = [row for row in rows if row.output_dtype == output]
    if not outputs:
        raise LinearQuantTypeError(
            f"{op}: dtype is {dtype_name(output)}; {product} allows "
            f"{_names([storage_name(row.output_dtype) for row in rows])}. What to do: ask for one "
            f"of them. {PARAM_INVALID}"
        )
    for row in outputs:
        if x.dtype in row.x:
            return row
    allowed = [dtype for row in outputs for dtype in row.x]
    raise LinearQuantTypeError(
        f"{op}: x is {dtype_name(x.dtype)}; {product} allows {_names(map(dtype_name, allowed))}. "
        f"What to do: pass x.to(torch.{dtype_name(allowed[-1])}), or have the layer before it give "
        f"that. {PARAM_INVALID}"
    )


def _names(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


def _check_dims(op: str, x: TensorLike, fewest: int) -> None:
    dims = len(x.shape)
    if not fewest <= dims <= QUANT_MAX_DIMS:
        _value_error(
            f"{op}: x has {dims} dims, shape {tuple(x.shape)}; allowed are {fewest} to "
            f"{QUANT_MAX_DIMS}. What to do: unsqueeze or flatten leading dims."
        )
    if sure(x.shape[-1] == 0):
        _value_error(f"{op}: x has shape {tuple(x.shape)}, k is 0. What to do: skip the layer.")
