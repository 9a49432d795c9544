"""Layers split on k whose result, or quantized input, is one device's, bit for bit."""

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

from ..kernels import numerics
from ..kernels.native import refuse_not_finite
from ..kernels.numerics import INT4_PER_INT32, Arithmetic
from ..rules.plan import check_finite
from .moves import move, wait_for

__all__ = ["exact_forward", "quantize_rows_together", "read_scale"]

_linear_quant = torch.ops.lq_graph.linear_quant.default
_I8, _I32 = torch.int8, torch.int32


def read_scale(layer: Any, fold: bool) -> None:
    """Keep the scale and the offset as the kernel reads them; made once, not at every call."""
    scale, offset = layer.scale, layer.offset
    if fold:
        if scale.dtype == torch.float32:
            check_finite(scale, offset)
            scale = numerics.pack_scale(scale, offset)
        scale, offset = numerics.unpack_scale(scale)
        if not bool(scale.isfinite().all()):
            refuse_not_finite()
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
    if cuts and numerics.is_cut(
        scale, pertoken, layer.bias, output, per_tensor=scale.shape[-1] == 1
    ):
        scale = numerics.s19(scale)
    return numerics.epilogue(
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
    """dynamic_quant of rows whose k is split, with the largest magnitude of all parts."""
    peak = rows.to(torch.float32).abs().max(-1).values  # torchair has no converter for amax
    if mesh.size() > 1:
        # A backend's maximum may lose NaN. It keeps infinity, with which the row is NaN too.
        peak = peak.nan_to_num(torch.inf, torch.inf, 0.0)
        peak = wait_for(collectives.all_reduce(peak, "max", mesh.get_group()))
    bits = 4 if dtype == _I32 else 8
    values, scale = numerics.quantize_rows(rows, peak, bits, arithmetic)
    return (_pack_int4(values) if bits == 4 else values), scale


def _pack_int4(values: Tensor) -> Tensor:
    """`numerics.pack_int4`, with operators that torch.compile and torchair can lower."""
    nibbles = values.to(torch.int32).reshape(*values.shape[:-1], -1, INT4_PER_INT32)
    packed = nibbles[..., -1]  # the last one has the highest bits and the sign
    for i in range(INT4_PER_INT32 - 2, -1, -1):
        packed = packed * 16 + nibbles[..., i].remainder(16)
    return packed
