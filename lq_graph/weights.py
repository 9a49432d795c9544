"""Weight preparation: int4 packing, scale folding, FRACTAL_NZ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from . import numerics
from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import FRACTAL_NZ, dtype_name
from .module import LinearQuant
from .numerics import INT4_PER_INT32
from .ops import trans_quant_param
from .plan import plan
from .product import get_product

__all__ = ["Prepared", "pack_int4", "unpack_int4", "use_internal_format_weight"]


def pack_int4(values: Tensor) -> Tensor:
    """Pack int4 values, eight to an int32, along the last dim; `unpack_int4` is the inverse.

    Value i of a group of eight sits in bits 4i..4i+3, two's complement.

    Args:
        values: an integer dtype, (..., k), k a multiple of 8, each value in -8..7.

    Returns:
        int32, (..., k/8), contiguous, on values' device.

    Raises:
        LinearQuantTypeError: values is not of a signed integer dtype.
        LinearQuantValueError: k is not a multiple of 8, or a value does not fit int4.

    Source: torch_npu.contrib.module.LinearQuant (int4 in int32).
    """
    if values.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise LinearQuantTypeError(
            f"pack_int4: values is {dtype_name(values.dtype)}; allowed are int8, int16, int32 and "
            "int64. What to do: quantize first, then pass the integers."
        )
    if values.dim() == 0 or values.shape[-1] % INT4_PER_INT32:
        raise LinearQuantValueError(
            f"pack_int4: values has shape {tuple(values.shape)}; the last dim (k) must be a "
            f"multiple of {INT4_PER_INT32}. What to do: pad k with zeros in x1 and weight alike."
        )
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        if low < -8 or high > 7:
            raise LinearQuantValueError(
                f"pack_int4: values range over {low}..{high}; int4 holds -8..7. What to do: clamp "
                "after rounding, or quantize with a larger scale."
            )
    return numerics.pack_int4(values.to(torch.int8))


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`.

    Args:
        packed: int32, (..., k/8).

    Returns:
        int8, (..., k), values in -8..7.

    Raises:
        LinearQuantTypeError: packed is not int32.
        LinearQuantValueError: packed has no dims.
    """
    if packed.dtype != torch.int32:
        raise LinearQuantTypeError(
            f"unpack_int4: packed is {dtype_name(packed.dtype)}; allowed is int32, eight int4 each."
        )
    if packed.dim() == 0:
        raise LinearQuantValueError("unpack_int4: packed has no dims; allowed is (..., k/8).")
    return numerics.unpack_int4(packed)


@dataclass(frozen=True)
class Prepared:
    """What use_internal_format_weight did to one layer.

    Attributes:
        name: the module's qualified name.
        scale: dtype of the scale after preparation.
        weight_format: "FRACTAL_NZ" or "ND".
        done: what changed, or why nothing did.
    """

    name: str
    scale: str
    weight_format: str
    done: str

    def __str__(self) -> str:
        return f"{self.name}: scale {self.scale}, weight {self.weight_format} ({self.done})"


def use_internal_format_weight(model: nn.Module) -> list[Prepared]:
    """Prepare every LinearQuant of a model for graph mode on the NPU, once.

    Folds a float32 scale with its offset into the packed int64 scale where the layer's row reads
    that, and casts int8 weights to FRACTAL_NZ; int4 stays ND. Everything else in the model
    (Linear, Conv2d, the vendor's own modules) is handed to torchair's function of the same name.
    Calling it again changes nothing. All or nothing: whatever fails, the layers are as before.

    A layer whose pertoken_scale comes as an argument of forward has to be made with
    pertoken_scale=True, or its float16 output reads as the row without one, and is folded.

    Args:
        model: on the NPU.

    Returns:
        One `Prepared` for each LinearQuant, in the order of `named_modules`.

    Raises:
        LinearQuantValueError: the model is not on the NPU.
        LinearQuantTypeError: a layer has no row in the product's table. Nothing is changed.

    Source: torchair's use_internal_format_weight.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LinearQuant)]
    for name, layer in layers:
        if layer.weight.device.type != "npu":
            raise LinearQuantValueError(
                f"use_internal_format_weight: {name or 'the model'} is on {layer.weight.device}; "
                "FRACTAL_NZ exists on the NPU only. What to do: call model.npu() first."
            )
    import torch_npu  # noqa: F401  (makes the name `torchair` importable)
    import torchair

    folds = [_folds_scale(layer) for _, layer in layers]
    undo: list[Callable[[], None]] = []
    try:
        report = [
            _prepare(name, layer, fold, undo)
            for (name, layer), fold in zip(layers, folds, strict=True)
        ]
        torchair.use_internal_format_weight(model)
    except BaseException:
        # A cast is undone by casting back, so that no second copy of the weights is kept.
        for step in reversed(undo):
            step()
        raise
    return report


def _prepare(name: str, layer: LinearQuant, fold: bool, undo: list[Callable[[], None]]) -> Prepared:
    """Fold and cast one layer; what takes it back is added to undo before each change."""
    import torch_npu

    done = []
    if fold:
        undo.append(partial(setattr, layer.scale, "data", layer.scale.data))
        layer.scale.data = trans_quant_param(layer.scale.data, layer.offset)
        done.append("scale folded")
    why_nd = _why_nd(layer)
    before = torch_npu.get_npu_format(layer.weight)
    if not why_nd and before != FRACTAL_NZ:
        undo.append(partial(_cast, layer, before))
        _cast(layer, FRACTAL_NZ)
        if torch_npu.get_npu_format(layer.weight) == FRACTAL_NZ:
            done.append("weight cast")
        else:
            why_nd = "weight stays ND: torch.npu.config.allow_internal_format is off"
    if why_nd:
        done.append(why_nd)
    return Prepared(
        name,
        dtype_name(layer.scale.dtype),
        "ND" if why_nd else "FRACTAL_NZ",
        ", ".join(done) or "already prepared",
    )


def _cast(layer: LinearQuant, acl_format: int) -> None:
    import torch_npu

    if torch_npu.get_npu_format(layer.weight) != acl_format:
        layer.weight.data = torch_npu.npu_format_cast(layer.weight.data, acl_format)


def _why_nd(layer: LinearQuant) -> str | None:
    """Why a weight is not cast to FRACTAL_NZ; None if it is."""
    if layer.weight.dtype not in get_product().nz_storage:
        return f"{dtype_name(layer.weight.dtype)} weight stays ND"
    if 1 in layer.weight.shape[-2:]:
        # quant_matmul_checker.cpp (hicann/ops-nn) refuses NZ there
        return "weight stays ND: n or k is 1"
    return None


def _folds_scale(layer: LinearQuant) -> bool:
    """Whether the layer's row of the table reads the packed scale and it is still float32."""
    rows = 1 if layer.pertoken_scale is None else layer.pertoken_scale.shape[0]
    # a 3-dim bias says that the input has a batch dim
    batch = layer.bias.shape[:1] if layer.bias is not None and layer.bias.dim() == 3 else ()
    x1 = torch.empty(*batch, rows, layer.weight.shape[-1], dtype=layer.weight.dtype, device="meta")
    return plan(
        x1,
        layer.weight,
        layer.scale,
        layer.offset,
        layer.pertoken_scale,
        layer.bias,
        output_dtype=layer.output_dtype,
    ).fold_scale
