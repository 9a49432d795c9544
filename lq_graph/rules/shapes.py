"""The shapes that linear_quant takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..errors import LinearQuantValueError
from ..kernels import TensorLike, logical_k
from .advice import is_exact
from .cann import Target, lacks, rows_in, upgrade
from .refusal import Fix, refused
from .symbolic import check_equal_sizes, known_true
from .tables import (
    DIM_MAX,
    LAST_DIM_MAX,
    LONG_K_SINCE,
    MAX_DIMS,
    MIN_DIMS,
    STORAGE_DTYPES,
    Product,
    Row,
    dtype_name,
)

__all__ = ["Sizes", "check_contiguous", "check_shapes"]


class Sizes(NamedTuple):
    """The sizes of a call.

    Attributes:
        m, k, n: k counts int4 values, not int32 words.
        output_shape: (..., m, n), batch dims broadcast.
    """

    m: int
    k: int
    n: int
    output_shape: tuple[int, ...]


def check_shapes(
    target: Target,
    row: Row,
    x1: TensorLike,
    weight: TensorLike,
    scale: TensorLike,
    offset: TensorLike | None,
    pertoken_scale: TensorLike | None,
    bias: TensorLike | None,
) -> Sizes:
    """The sizes of a call whose dtypes are those of a row.

    Raises:
        LinearQuantValueError: a shape outside the specification.
    """
    int4 = row.storage == torch.int32
    _check_dims(x1, weight, int4)
    pack = STORAGE_DTYPES[row.storage]
    m, n, k = x1.shape[-2], weight.shape[-2], logical_k(x1.shape[-1], row.storage)
    _check_same_k(x1, weight, row.storage)
    for name, tensor in (("x1", x1), ("weight", weight)):
        _check_not_empty(target.product, name, tensor)
    if int4 and known_true(n % pack != 0):
        raise _refused(
            "weight",
            f"weight has n = {n} rows",
            f"a multiple of {pack} for int4",
            "pad the output channels with zeros and slice the result",
        )
    _check_limits(target, row, m, k, n, scale, pertoken_scale)
    shape = (*_broadcast(x1, weight), m, n)
    _check_vector("scale", scale, n)
    if offset is not None:
        _check_vector("offset", offset, n)
    if pertoken_scale is not None and not (
        len(pertoken_scale.shape) == 1 and check_equal_sizes(pertoken_scale.shape[0], m)
    ):
        raise _refused(
            "pertoken_scale",
            f"pertoken_scale has shape {_shape(pertoken_scale)}",
            f"(m,) = ({m},), one value for each row of x1",
            "pass the scales this input was quantized with",
        )
    if bias is not None:
        _check_bias(bias, shape, row)
    return Sizes(m, k, n, shape)


def check_contiguous(name: str, tensor: TensorLike) -> None:
    """Refuse int4 tensors that are not contiguous. aclnn reads an int32 tensor as eight times as
    many int4 values and ignores its strides (aclnn_quant_matmul_v4.cpp, hicann/ops-nn).

    Raises:
        LinearQuantValueError: x1 or weight is not contiguous.
    """
    if not isinstance(tensor, torch.Tensor) or any(known_true(size == 0) for size in tensor.shape):
        return
    expected: int = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not known_true(size == 1) and known_true(stride != expected):
            raise _refused(
                name,
                f"{name} has shape {_shape(tensor)} with strides {tuple(tensor.stride())}",
                "contiguous memory for int32 (int4)",
                f"check that k is the packed dim, and pass {name}.contiguous()",
            )
        expected = expected * size


def _refused(
    argument: str, given: str, allowed: str, *fixes: Fix | str, **details: Any
) -> LinearQuantValueError:
    return refused(
        LinearQuantValueError, "linear_quant", argument, given, allowed, *fixes, **details
    )


def _shape(tensor: TensorLike) -> str:
    return str(tuple(tensor.shape))


def _check_dims(x1: TensorLike, weight: TensorLike, int4: bool) -> None:
    """2 to 6 dims each; an int4 weight 2."""
    for name, tensor in (("x1", x1), ("weight", weight)):
        dims = len(tensor.shape)
        if name == "weight" and int4:
            if dims != 2:
                raise _refused(
                    name,
                    f"weight has shape {_shape(tensor)}",
                    "(n, k/8): an int4 weight has exactly 2 dims",
                    "make one LinearQuant for each matrix",
                )
        elif not MIN_DIMS <= dims <= MAX_DIMS:
            raise _refused(
                name,
                f"{name} has {dims} dims, shape {_shape(tensor)}",
                f"{MIN_DIMS} to {MAX_DIMS} dims",
                "unsqueeze or flatten leading dims",
            )


def _check_same_k(x1: TensorLike, weight: TensorLike, storage: torch.dtype) -> None:
    words = x1.shape[-1], weight.shape[-1]
    if check_equal_sizes(*words):
        return
    values = [logical_k(word, storage) for word in words]
    counted = f" ({values[0]} and {values[1]} int4 values)" if storage == torch.int32 else ""
    transposed = known_true(weight.shape[-2] == x1.shape[-1])
    raise _refused(
        "weight",
        f"x1 {_shape(x1)} and weight {_shape(weight)} differ in k: {words[0]} and {words[1]}"
        f"{counted}",
        "one k for both, the last dim of each",
        "the weight looks transposed: pass it as (n, k)"
        if transposed
        else "pass x1 and weight with one k, and weight as (n, k), untransposed",
    )


def _check_not_empty(product: Product, name: str, tensor: TensorLike) -> None:
    """No dim is 0, except m if the product returns an empty output for it."""
    for dim, size in enumerate(tensor.shape):
        if known_true(size == 0):
            is_m = name == "x1" and dim == len(tensor.shape) - 2
            if is_m and product.empty_m:
                continue
            what = {1: "k", 2: "m" if name == "x1" else "n"}.get(len(tensor.shape) - dim, "a batch")
            raise _refused(
                name,
                f"{name} has shape {_shape(tensor)}, {what} is 0",
                f"no empty {name}",
                "skip the layer when there is nothing to compute",
                product=product,
            )


def _check_limits(
    target: Target,
    row: Row,
    m: int,
    k: int,
    n: int,
    scale: TensorLike,
    pertoken_scale: TensorLike | None,
) -> None:
    """The limit of k as a last dim, and every dim fits in 32 bits."""
    if target.product.limits_k and known_true(k > LAST_DIM_MAX):
        exempt = row.storage == torch.int8 and not row.folds_scale and pertoken_scale is not None
        old = lacks(target, LONG_K_SINCE)
        if not exempt or old:
            raise _long_k_refused(target, row, k, scale, exempt, old)
    for name, size in (("m", m), ("k", k), ("n", n)):
        if known_true(size > DIM_MAX):
            raise _refused(
                "weight" if name == "n" else "x1",
                f"{name} is {size}",
                f"at most {DIM_MAX} for any dim",
                _split_k(row) if name == "k" else f"split {name} over several calls",
            )


def _long_k_refused(
    target: Target, row: Row, k: int, scale: TensorLike, exempt: bool, old: bool
) -> LinearQuantValueError:
    """exempt: whether the newest CANN takes this k. old: whether this one takes no longer k."""
    pertoken = any(
        r.output == row.output and torch.float32 in r.pertoken_scale
        for r in rows_in(target, row.storage)
    )
    lifts = row.storage == torch.int8 and pertoken
    why = "more where a float scale comes with pertoken_scale" if lifts else ""
    fixes = [_split_k(row)]
    if exempt:
        fixes.insert(0, upgrade(LONG_K_SINCE))
        why = f"more from CANN {LONG_K_SINCE} on; this is CANN {target.cann}"
    elif old:
        why = ""
    elif lifts and is_exact(scale.dtype, torch.float32):
        ones: tuple[tuple[str, torch.dtype], ...] = (("pertoken_scale", torch.float32),)
        text = "pass a pertoken_scale of ones, torch.ones(m)"
        if row.folds_scale and scale.dtype != torch.float32:
            text += ", and scale.float()"
            ones += (("scale", torch.float32),)
        fixes.insert(0, Fix(text, ones))
    return _refused(
        "x1",
        f"k is {k}",
        f"at most {LAST_DIM_MAX} as the last dim of x1 and weight",
        *fixes,
        product=target.product,
        why=why,
        since=LONG_K_SINCE if exempt else "",
        aclnn="aclnn would report 561002, with a FRACTAL_NZ weight 161002",
        code=561002,
    )


def _split_k(row: Row) -> Fix:
    """The advice to split k over two layers, and how that changes the numbers."""
    text = "split k over two layers and add their results"
    if row.output == torch.int32:
        return Fix(text)
    if row.output == torch.int8:
        return Fix(
            "split k over two layers with float output, add their results and quantize the sum",
            numbers="each result is rounded",
        )
    return Fix(text, numbers=f"each result is rounded to {dtype_name(row.output)}")


def _broadcast(x1: TensorLike, weight: TensorLike) -> tuple[int, ...]:
    left, right = tuple(x1.shape[:-2]), tuple(weight.shape[:-2])
    width = max(len(left), len(right))
    left = (1,) * (width - len(left)) + left
    right = (1,) * (width - len(right)) + right
    batch = []
    for a, b in zip(left, right, strict=True):
        if known_true(a == 1):
            batch.append(b)
        elif known_true(b == 1) or check_equal_sizes(a, b):
            batch.append(a)
        else:
            raise _refused(
                "weight",
                f"the batch dims of x1 {_shape(x1)} and weight {_shape(weight)} do not broadcast: "
                f"{a} against {b}",
                "equal batch dims, or 1 in one of the two",
                "make them equal, or 1 in one of the two",
            )
    return tuple(batch)


def _check_vector(name: str, tensor: TensorLike, n: int) -> None:
    """scale and offset: (1,) or (n,)."""
    if len(tensor.shape) != 1:
        raise _refused(
            name,
            f"{name} has shape {_shape(tensor)}",
            f"(1,) or (n,) = ({n},)",
            f"pass {name}.reshape(-1) if it holds 1 or n values",
        )
    size = tensor.shape[0]
    if not (known_true(size == 1) or check_equal_sizes(size, n)):
        raise _refused(
            name,
            f"{name} has {size} values",
            f"1 (per-tensor) or n = {n} (per-channel, one for each row of weight)",
            "pass one value, or one for each output channel",
        )


def _check_bias(bias: TensorLike, output_shape: tuple[int, ...], row: Row) -> None:
    """bias: (n,), or (batch, 1, n) if the output has 3 dims."""
    n = output_shape[-1]
    if len(bias.shape) == 1:
        if not check_equal_sizes(bias.shape[0], n):
            raise _refused(
                "bias",
                f"bias has {bias.shape[0]} values",
                f"n = {n}, one for each row of weight",
                "pass one value for each output channel",
            )
        return
    int8 = row.storage == torch.int8
    if len(bias.shape) == 3 and len(output_shape) == 3 and int8:
        wanted = (output_shape[0], 1, n)
        if all(check_equal_sizes(a, b) for a, b in zip(bias.shape, wanted, strict=True)):
            return
    allowed = f"(n,) = ({n},)"
    if int8:
        allowed += " or, with a 3-dim output, (batch, 1, n)"
        if len(output_shape) == 3:
            allowed += f" = ({output_shape[0]}, 1, {n})"
    raise _refused(
        "bias",
        f"bias has shape {_shape(bias)} and the output {output_shape}",
        allowed,
        "reshape it",
        *_bias_after(bias, row),
    )


def _bias_after(bias: TensorLike, row: Row) -> list[Fix]:
    """The advice to add a bias of another shape to the result."""
    if row.output == torch.int8:
        return []  # its rounding and offset come after the bias
    if row.output == torch.int32:
        return [Fix("add it to the result")]
    text = "add bias * scale to the result" if bias.dtype == torch.int32 else "add it to the result"
    numbers = f"the result is rounded to {dtype_name(row.output)} before the sum"
    return [Fix(text, numbers=numbers)]
