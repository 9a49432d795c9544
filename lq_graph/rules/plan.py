"""plan(): the one place where LinearQuant's rules are applied.

The fake kernel, the CPU kernel, the NPU kernel and the GE converter all call plan() and have no
other checks, so all four refuse the same input with the same sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import TensorLike, is_cut
from .advice import cast
from .cann import CannVersion, Target, lacks, since_of, upgrade
from .dtypes import row_of_dtypes
from .products import get_target, target_with
from .refusal import refused
from .shapes import check_contiguous, check_shapes
from .symbolic import cached_decision, check_equal_sizes, known_true
from .tables import ROUND_MODE_SINCE, Product, Row, dtype_name

__all__ = [
    "Plan",
    "Spec",
    "TensorLike",
    "check_finite",
    "plan",
    "plan_trans_quant_param",
]


class Spec(NamedTuple):
    """A dtype and a shape: all that plan() reads of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}{list(self.shape)}"


@dataclass(frozen=True)
class Plan:
    """One legal LinearQuant call.

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
        since: the CANN release that brought these dtypes to the product.
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
    since: str


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
    cann: CannVersion | None = None,
) -> Plan:
    """Check a LinearQuant call, and return its Plan.

    Reads only dtypes, shapes and, for int4, strides, so the Plan is the same for real, fake and
    symbolic tensors. A Plan for sizes that are numbers is cached.

    Args:
        x1: int8 (..., m, k), or int32 (..., m, k/8) carrying int4; 2 to 6 dims.
        weight: the dtype of x1; (..., n, k), untransposed; int4 exactly (n, k/8).
        scale: float32, bfloat16 or packed int64; (1,) or (n,).
        offset: float32, (1,) or (n,); int8 output only.
        pertoken_scale: float32, (m,); float outputs only.
        bias: int32, or a float dtype if the row has it; (n,) or (batch, 1, n).
        output_dtype: torch.int8 (also None), float16, bfloat16 or int32.
        product: whose table to read; default `get_product()`.
        cann: the CANN version to ask about; default `get_cann_version()`.

    Returns:
        The Plan.

    Raises:
        LinearQuantTypeError: a dtype, or a combination of dtypes, outside the product's table, or
            that a newer CANN brought.
        LinearQuantValueError: a shape outside the specification.

    Source: the table of the vendor's module, and aclnnQuantMatmulV4.md (hicann/ops-nn).
    """
    target = get_target()
    if product is not None or cann is not None:
        target = target_with(product, cann)
    output = torch.int8 if output_dtype is None else output_dtype
    # The key is as short and as flat as it can be: every eager call pays for this look-up.
    key = (
        target,
        output,
        x1.dtype,
        x1.shape,
        weight.dtype,
        weight.shape,
        scale.dtype,
        scale.shape,
        None if offset is None else (offset.dtype, offset.shape),
        None if pertoken_scale is None else (pertoken_scale.dtype, pertoken_scale.shape),
        None if bias is None else (bias.dtype, bias.shape),
    )
    found = _decide(*key)
    if found.int4:
        check_contiguous("x1", x1)
        check_contiguous("weight", weight)
    return found


@cached_decision
def _decide(target: Target, output: torch.dtype, *key: Any) -> Plan:
    """plan() from dtypes and shapes alone, as its key has them."""
    x1, weight, scale = (Spec(key[at], tuple(key[at + 1])) for at in (0, 2, 4))
    offset, pertoken_scale, bias = (one and Spec(one[0], tuple(one[1])) for one in key[6:])
    dtypes = {
        "scale": scale.dtype,
        "offset": None if offset is None else offset.dtype,
        "pertoken_scale": None if pertoken_scale is None else pertoken_scale.dtype,
        "bias": None if bias is None else bias.dtype,
        "output_dtype": output,
    }
    row = row_of_dtypes(target, x1.dtype, weight.dtype, dtypes)
    sizes = check_shapes(target, row, x1, weight, scale, offset, pertoken_scale, bias)
    per_tensor = known_true(scale.shape[-1] == 1)
    return Plan(
        product=target.product,
        row=row,
        output_dtype=output,
        output_shape=sizes.output_shape,
        m=sizes.m,
        k=sizes.k,
        n=sizes.n,
        int4=row.storage == torch.int32,
        fold_scale=row.folds_scale and scale.dtype == torch.float32,
        cut_scale=target.product.cuts_scale
        and is_cut(scale, pertoken_scale, bias, output, per_tensor=per_tensor),
        since=since_of(row, target.product, dtypes),
    )


def plan_trans_quant_param(
    scale: TensorLike,
    offset: TensorLike | None,
    round_mode: int,
    product: Product | None = None,
    cann: CannVersion | None = None,
) -> tuple[int, ...]:
    """Shape of the packed scale that trans_quant_param returns.

    Args:
        scale: float32, (1,), (n,) or (1, n).
        offset: float32, as scale; if both have 1 dim, one of length 1 broadcasts.
        round_mode: 0 or 1.
        product: default `get_product()`.
        cann: the CANN version to ask about; default `get_cann_version()`.

    Raises:
        LinearQuantTypeError: a dtype other than float32.
        LinearQuantValueError: shapes that do not fit, another round_mode, or one that a newer CANN
            brought.

    Source: aclnnTransQuantParamV2 / V3 (hicann/ops-nn, quant/trans_quant_param_v2).
    """
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None:
            _check_packed(name, tensor)
    if round_mode not in (0, 1):
        raise _packing_refused(
            "round_mode",
            f"round_mode is {round_mode}",
            "0 (truncate the scale to 19 bits) or 1 (round it half to even)",
            "pass 0, which is what the kernels do with a float32 scale",
        )
    if round_mode and lacks(target := target_with(product, cann), ROUND_MODE_SINCE):
        raise _packing_refused(
            "round_mode",
            "round_mode is 1",
            f"it from CANN {ROUND_MODE_SINCE} on",
            str(upgrade(ROUND_MODE_SINCE)),
            product=target.product,
            why=f"this is CANN {target.cann}",
            since=ROUND_MODE_SINCE,
            code=None,
        )
    if offset is None:
        return tuple(scale.shape)
    fits = len(scale.shape) == len(offset.shape)
    if fits and len(scale.shape) == 1:
        if known_true(scale.shape[0] == 1):
            return tuple(offset.shape)
        if known_true(offset.shape[0] == 1):
            return tuple(scale.shape)
    if not fits or not check_equal_sizes(scale.shape[-1], offset.shape[-1]):
        raise _packing_refused(
            "offset",
            f"scale {tuple(scale.shape)} and offset {tuple(offset.shape)} do not fit",
            "equal shapes, or 1 dim each with length 1 in one of them",
            "expand the offset to the shape of the scale",
        )
    return tuple(scale.shape)


def _check_packed(name: str, tensor: TensorLike) -> None:
    """scale and offset of trans_quant_param: float32, and (1,), (n,) or (1, n)."""
    if tensor.dtype != torch.float32:
        raise refused(
            LinearQuantTypeError,
            "trans_quant_param",
            name,
            f"{name} is {dtype_name(tensor.dtype)}",
            "float32",
            cast(name, tensor.dtype, torch.float32),
        )
    dims = len(tensor.shape)
    if dims not in (1, 2) or (dims == 2 and known_true(tensor.shape[0] != 1)):
        raise _packing_refused(
            name,
            f"{name} has shape {tuple(tensor.shape)}",
            "(1,), (n,) or (1, n)",
            f"pass {name}.reshape(-1) if it belongs to one weight",
        )
    if known_true(tensor.shape[-1] == 0):
        raise _packing_refused(
            name,
            f"{name} is empty",
            "1 or n values",
            "pass one value, or one for each output channel",
        )


def _packing_refused(
    argument: str, given: str, allowed: str, todo: str, **details: Any
) -> LinearQuantValueError:
    return refused(
        LinearQuantValueError, "trans_quant_param", argument, given, allowed, todo, **details
    )


def check_finite(scale: torch.Tensor, offset: torch.Tensor | None) -> None:
    """Refuse a scale or offset that trans_quant_param cannot pack. Reads the values, so on the
    NPU it waits for them. Use it when a model is prepared, not in a forward.

    Raises:
        LinearQuantValueError: NaN or infinity.
    """
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise _packing_refused(
                name,
                f"{name} holds NaN or infinity, which the packed form cannot carry",
                "finite values",
                "check the calibration that produced it",
                code=None,
            )
