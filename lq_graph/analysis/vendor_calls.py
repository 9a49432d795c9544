"""One call of a quantizing operator, torch_npu's or ours, as the rules of lq_graph read it.

torch_npu's operators compute what ours do, with other names and forms of the arguments. What they
have beyond that is not covered: no table of lq_graph says whether a device takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import LinearQuantValueError
from ..kernels import INT4_PER_INT32
from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.cann import CannVersion
from ..rules.plan import Spec, plan, plan_trans_quant_param
from ..rules.refusal import refused
from ..rules.tables import LAST_DIM_MAX, Product, QuantRow, Row, dtype_name

__all__ = ["Asked", "is_quantizing", "read_call"]

Arguments = Mapping[str, Any]
Decide = Callable[[Product, CannVersion | None], Row | QuantRow | None]

# c10::ScalarType: torch_npu's operators take dtypes as these numbers
_DTYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    12: torch.qint8,
    13: torch.quint8,
    15: torch.bfloat16,
    16: torch.quint4x2,
}


@dataclass(frozen=True)
class Asked:
    """A call, as the rules read it.

    Attributes:
        operator: whose rules apply, of lq_graph: "linear_quant". Empty if none do.
        tensors: dtype and shape by the names of that operator; None for an absent one.
        output_dtype: of the result, int32 for packed int4.
        results: shapes and dtypes of the results; empty if they are not known.
        decide: the row of a product's table, None if the operator has no table; raises
            LinearQuantError if the product refuses the call.
        why_not: why no rules apply; empty if some do.
    """

    operator: str
    tensors: dict[str, Spec | None]
    output_dtype: torch.dtype
    results: tuple[Spec, ...]
    decide: Decide
    why_not: str = ""


class _NotCoveredError(Exception):
    """No rules of lq_graph are about this call."""


def is_quantizing(namespace: str, name: str) -> bool:
    """Whether an operator quantizes, or multiplies what is quantized."""
    return namespace == "lq_graph" or (namespace == "npu" and "quant" in name)


def read_call(namespace: str, name: str, given: Arguments) -> Asked:
    """A call as the rules read it.

    Args:
        namespace, name: of the operator: "npu" and "npu_quant_matmul".
        given: its arguments by the names of its schema, defaults left out or not.
    """
    read = _READERS.get(f"{namespace}.{name}")
    tensors = {key: _spec(value) for key, value in given.items() if isinstance(value, Tensor)}
    if read is None:
        return _not_covered(tensors, "lq_graph has no table of this operator")
    try:
        return read(given)
    except _NotCoveredError as error:
        return _not_covered(tensors, str(error))


def _not_covered(tensors: dict[str, Spec | None], why: str) -> Asked:
    return Asked("", tensors, torch.int8, (), lambda _, __: None, why)


def _spec(tensor: Tensor | None) -> Spec | None:
    return None if tensor is None else Spec(tensor.dtype, tuple(tensor.shape))


def _dtype(given: Any, default: torch.dtype) -> torch.dtype:
    """The dtype that an argument means, which may be a number."""
    if given is None:
        return default
    if isinstance(given, torch.dtype):
        return given
    if given not in _DTYPES:
        raise _NotCoveredError(f"lq_graph does not know dtype number {given} of torch_npu")
    return _DTYPES[given]


def _only(given: Arguments, **usual: Any) -> None:
    """Refuse arguments that the rules do not know, unless they have their usual value."""
    for name, value in given.items():
        if name in usual and value not in (None, usual[name], []):
            raise _NotCoveredError(f"lq_graph has no rules for its argument {name}")


# ---- the product ----


def _linear_quant(given: Arguments) -> Asked:
    names = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")
    tensors = {name: given.get(name) for name in names}
    return _product(tensors, given.get("output_dtype"))


def _npu_quant_matmul(given: Arguments) -> Asked:
    unusual = ("x1_dtype", "x2_dtype", "pertoken_scale_dtype", "scale_dtype", "group_sizes")
    _only(given, y_scale=None, **dict.fromkeys(unusual))
    x1, x2 = given["x1"], given["x2"]
    is_row_major = x2.dtype == torch.int32 and x2.dim() == 2 and x2.is_contiguous()
    if is_row_major and x2.shape[0] == x1.shape[-1] * INT4_PER_INT32:
        raise _NotCoveredError("its x2 holds eight int4 of n in an int32, linear_quant of k")
    tensors = {
        "x1": x1,
        "weight": x2.mT if x2.dim() > 1 else x2,
        **{name: given.get(name) for name in ("scale", "offset", "pertoken_scale", "bias")},
    }
    asked = _product(tensors, given.get("output_dtype"))
    n = x2.shape[-1]
    is_untransposed = x2.dim() > 1 and x2.stride(-1) == 1 and x2.shape[-2] > 1
    if not is_untransposed or n <= LAST_DIM_MAX:
        return asked

    def decide(product: Product, cann: CannVersion | None) -> Row | QuantRow | None:
        row = asked.decide(product, cann)
        if product.limits_k:
            raise refused(
                LinearQuantValueError,
                "npu_quant_matmul",
                "x2",
                f"n is {n}, and x2 is not transposed",
                f"at most {LAST_DIM_MAX} as the last dim of x2",
                "store the weight as (n, k) and pass weight.t()",
                product=product,
                code=561002,
            )
        return row

    return replace(asked, decide=decide)


def _product(tensors: Mapping[str, Tensor | None], output: Any) -> Asked:
    dtype = _dtype(output, torch.int8)
    x1, weight = tensors["x1"], tensors["weight"]
    assert x1 is not None and weight is not None

    def decide(product: Product, cann: CannVersion | None) -> Row:
        found = plan(**tensors, output_dtype=dtype, product=product, cann=cann)  # type: ignore[arg-type]
        return found.row

    batch = x1.shape[:-2]
    if weight.dim() > 2:
        with suppress(RuntimeError):  # refused, in plan's words
            batch = torch.broadcast_shapes(batch, weight.shape[:-2])
    shape = (*batch, *x1.shape[-2:-1], *(weight.shape[-2:-1] or weight.shape))
    return Asked(
        "linear_quant",
        {name: _spec(tensor) for name, tensor in tensors.items()},
        dtype,
        (Spec(dtype, shape),),
        decide,
    )


# ---- what quantizes activations, and packs scales ----


def _dynamic_quant(given: Arguments) -> Asked:
    return _dynamic(given["x"], _dtype(given.get("dtype"), torch.int8))


def _npu_dynamic_quant(given: Arguments) -> Asked:
    _only(given, smooth_scales=None, group_index=None, quant_mode="pertoken", dst_type_max=0.0)
    dtype = _dtype(given.get("dst_type"), torch.int8)
    if dtype == torch.quint4x2:
        dtype = torch.int32
    elif dtype == torch.int32:
        raise _NotCoveredError("its dst_type is int32, and int4 is torch.quint4x2")
    return _dynamic(given["input"], dtype)


def _dynamic(x: Tensor, dtype: torch.dtype) -> Asked:
    def decide(product: Product, cann: CannVersion | None) -> QuantRow:
        return plan_dynamic_quant(x, dtype, product, cann).row

    words = x.shape[-1] // INT4_PER_INT32 if dtype == torch.int32 else x.shape[-1]
    results = Spec(dtype, (*x.shape[:-1], words)), Spec(torch.float32, tuple(x.shape[:-1]))
    return Asked("dynamic_quant", {"x": _spec(x)}, dtype, results, decide)


def _static_quant(given: Arguments) -> Asked:
    return _static(given["x"], given["scale_reciprocal"], given.get("offset"))


def _npu_quantize(given: Arguments) -> Asked:
    x, dtype = given["input"], _dtype(given["dtype"], torch.qint8)
    if given.get("div_mode", True):
        raise _NotCoveredError("its div_mode is True, and static_quant multiplies")
    if dtype not in (torch.qint8, torch.int8):
        raise _NotCoveredError(f"its dtype is {dtype_name(dtype)}, and static_quant's int8")
    if given.get("axis", 1) not in (-1, x.dim() - 1):
        raise _NotCoveredError("its axis is not the last one")
    return _static(x, given["scales"], given.get("zero_points"))


def _static(x: Tensor, scale: Tensor, offset: Tensor | None) -> Asked:
    def decide(product: Product, cann: CannVersion | None) -> QuantRow:
        return plan_static_quant(x, scale, offset, product, cann).row

    tensors = {"x": _spec(x), "scale_reciprocal": _spec(scale), "offset": _spec(offset)}
    result = Spec(torch.int8, tuple(x.shape))
    return Asked("static_quant", tensors, torch.int8, (result,), decide)


def _trans_quant_param(given: Arguments) -> Asked:
    scale, offset = given["scale"], given.get("offset")
    round_mode = given.get("round_mode") or 0

    def decide(product: Product, cann: CannVersion | None) -> None:
        plan_trans_quant_param(scale, offset, round_mode, product, cann)

    longest = scale if offset is None or offset.numel() < scale.numel() else offset
    return Asked(
        "trans_quant_param",
        {"scale": _spec(scale), "offset": _spec(offset)},
        torch.int64,
        (Spec(torch.int64, tuple(longest.shape)),),
        decide,
    )


_READERS: dict[str, Callable[[Arguments], Asked]] = {
    "lq_graph.linear_quant": _linear_quant,
    "lq_graph.dynamic_quant": _dynamic_quant,
    "lq_graph.static_quant": _static_quant,
    "lq_graph.trans_quant_param": _trans_quant_param,
    "npu.npu_quant_matmul": _npu_quant_matmul,
    "npu.npu_dynamic_quant": _npu_dynamic_quant,
    "npu.npu_quantize": _npu_quantize,
    "npu.npu_trans_quant_param": _trans_quant_param,
}
