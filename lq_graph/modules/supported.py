"""Which quantized layers the product in force can run, with their quantizing operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import LinearQuantError
from ..kernels import storage_k
from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.plan import Plan, Spec, plan
from ..rules.products import get_product
from ..rules.tables import STORAGE_DTYPES, Product, dtype_name

if TYPE_CHECKING:
    from .linear_quant import LinearQuant

__all__ = [
    "A4W4_DYNAMIC",
    "A8W8_DYNAMIC",
    "A8W8_STATIC",
    "LayerKind",
    "plan_of_layer",
    "runs_in",
    "what_runs",
    "why_not_supported",
]

_M = 16  # rows of the input, where a plan needs a number


class LayerKind(NamedTuple):
    """How a layer is quantized.

    Attributes:
        storage: dtype of its weight: int8, or int32 carrying int4.
        static: whether its input is quantized with one scale for the whole tensor; else per token.
    """

    storage: torch.dtype
    static: bool

    def __str__(self) -> str:
        bits = "A4W4" if self.storage == torch.int32 else "A8W8"
        return f"{bits} {'static' if self.static else 'dynamic'}"


A8W8_DYNAMIC = LayerKind(torch.int8, static=False)
A8W8_STATIC = LayerKind(torch.int8, static=True)
A4W4_DYNAMIC = LayerKind(torch.int32, static=False)


def plan_of_layer(layer: LinearQuant) -> Plan:
    """The Plan of a call of a layer, without a pertoken_scale that forward gets.

    Args:
        layer: of lq_graph, or of the vendor, with the same attributes.

    Raises:
        LinearQuantTypeError, LinearQuantValueError: the layer has no row.
    """
    weight, pertoken, bias = layer.weight, layer.pertoken_scale, layer.bias
    rows = 1 if pertoken is None else pertoken.shape[0]
    # a 3-dim bias means that the input has a batch dim
    batch = bias.shape[:1] if bias is not None and bias.dim() == 3 else ()
    x1 = torch.empty(*batch, rows, weight.shape[-1], dtype=weight.dtype, device="meta")
    return plan(
        x1, weight, layer.scale, layer.offset, pertoken, bias, output_dtype=layer.output_dtype
    )


def why_not_supported(
    kind: LayerKind,
    k: int,
    n: int,
    *,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    scale: torch.dtype | None = torch.float32,
    bias: torch.dtype | None,
    product: Product | None = None,
) -> tuple[str, str]:
    """Why a product cannot run a quantized layer, and what to do; both empty if it can.
    For sizes that int4 does not take, only why.

    Args:
        kind: how it is quantized.
        k, n: its sizes.
        input_dtype, output_dtype: of the layer.
        scale, bias: dtypes of those parameters; None for no bias.
        product: the one in force by default; what to do is for that one.
    """
    if why := _partial_group(kind, k, n):
        return why, ""
    scale = scale or torch.float32
    if why := _refusal(kind, k, n, input_dtype, output_dtype, scale, bias, product):
        return why, what_runs(k, n)
    return "", ""


def _partial_group(kind: LayerKind, k: int, n: int) -> str:
    pack = STORAGE_DTYPES[kind.storage]
    return f"k = {k}, n = {n}: int4 needs multiples of {pack}" if k % pack or n % pack else ""


def _refusal(
    kind: LayerKind,
    k: int,
    n: int,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    scale: torch.dtype,
    bias: torch.dtype | None,
    product: Product | None = None,
) -> str:
    """Why the tables refuse the layer. Without the advice, which is for one call of an operator."""
    x, one = Spec(input_dtype, (_M, k)), Spec(input_dtype, (1,))
    words = storage_k(k, kind.storage)
    try:
        if kind.static:
            plan_static_quant(x, one, one, product)
        else:
            plan_dynamic_quant(x, kind.storage, product)
        plan(
            Spec(kind.storage, (_M, words)),
            Spec(kind.storage, (n, words)),
            Spec(scale, (n,)),
            pertoken_scale=None if kind.static else Spec(torch.float32, (_M,)),
            bias=None if bias is None else Spec(bias, (n,)),
            output_dtype=output_dtype,
            product=product,
        )
    except LinearQuantError as error:
        refusal = error.refusal
        assert refusal is not None  # an error of plan() has a refusal
        return f"{refusal.operator}: {refusal.reason()}".rstrip(".")
    return ""


def runs_in(kind: LayerKind, k: int, n: int) -> list[torch.dtype]:
    """The dtypes, float16 and bfloat16, in which the product in force runs a layer of these sizes
    whose input and output have one dtype."""
    bias = torch.int32 if kind.static else None
    return [
        dtype
        for dtype in (torch.float16, torch.bfloat16)
        if not _partial_group(kind, k, n)
        and not _refusal(kind, k, n, dtype, dtype, torch.float32, bias)
    ]


def what_runs(k: int, n: int) -> str:
    """The schemes and dtypes in which the product in force runs a layer of these sizes."""
    found = []
    for kind in (A8W8_DYNAMIC, A8W8_STATIC, A4W4_DYNAMIC):
        if dtypes := runs_in(kind, k, n):
            found.append(f"{kind} in {' or '.join(map(dtype_name, dtypes))}")
    return f"{get_product()} runs {', '.join(found)}" if found else "leave the layer float"
