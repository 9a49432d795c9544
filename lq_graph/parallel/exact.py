"""Layers split on k whose result, or quantized input, equals one device's bit for bit."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    Partial,
    Replicate,
)

from .. import kernels
from ..errors import LinearQuantValueError
from ..kernels import Arithmetic, OperandError
from ..rules.plan import check_finite
from .moves import move, wait_for

__all__ = ["exact_forward", "quantize_rows_together", "read_scale"]

_linear_quant = torch.ops.lq_graph.linear_quant.default
_I8, _I32 = torch.int8, torch.int32


def read_scale(layer: Any, fold: bool) -> None:
    """Store the scale and the offset as the kernel reads them, once and not at every call."""
    scale, offset = layer.scale, layer.offset
    if fold:
        if scale.dtype == torch.float32:
            check_finite(scale, offset)
            scale = kernels.pack_scale(scale, offset)
        try:
            scale, offset = kernels.unpack_finite_scale(scale)
        except OperandError as error:
            raise LinearQuantValueError(f"linear_quant: {error}") from None
    layer._fixed_scale, layer._fixed_offset = scale.data, offset if fold else None


def exact_forward(
    mesh: DeviceMesh,
    fold: bool,
    cuts: bool,
    layer: Any,
    x1: Tensor,
    pertoken_scale: Tensor | None = None,
) -> Tensor:
    """Sum the int32 accumulators of all devices, then scale and add the bias once."""
    part = _linear_quant(x1, layer.weight, layer._ones, None, None, None, output_dtype=_I32)
    pertoken = layer.pertoken_scale if pertoken_scale is None else pertoken_scale
    scale, output = layer._fixed_scale, layer.output_dtype or _I8
    if cuts and kernels.is_cut(
        scale, pertoken, layer.bias, output, per_tensor=scale.shape[-1] == 1
    ):
        scale = kernels.s19(scale)
    return kernels.epilogue(
        move(part, Partial(), Replicate(), mesh),
        scale,
        folded=fold,
        offset=layer._fixed_offset,
        bias=layer.bias,
        pertoken_scale=pertoken,
        output_dtype=output,
    )


def quantize_rows_together(
    mesh: DeviceMesh, arithmetic: Arithmetic, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dynamic_quant of rows whose k is split, with the largest magnitude over all parts."""
    peak = rows.to(torch.float32).abs().max(-1).values  # torchair has no converter for amax
    if mesh.size() > 1:
        # A backend's maximum may lose NaN. It keeps infinity, with which the row is NaN too.
        peak = peak.nan_to_num(torch.inf, torch.inf, 0.0)
        peak = wait_for(collectives.all_reduce(peak, "max", mesh.get_group()))
    bits = 4 if dtype == _I32 else 8
    values, scale = kernels.quantize_rows(rows, peak, bits, arithmetic)
    return (kernels.pack_int4_in_graph(values) if bits == 4 else values), scale
