"""Autocast for the operators that take float activations: it casts the input, as for nn.Linear.

The first two arguments of each kernel, before those of the operator: the dispatch key that it is
registered for, and the device as torch.get_autocast_dtype names it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compat import excluded

__all__ = ["dynamic_quant", "static_quant"]


def dynamic_quant(
    key: str, device: str, x: Tensor, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Casts x to autocast's dtype."""
    with excluded(key):
        out: tuple[Tensor, Tensor] = torch.ops.lq_graph.dynamic_quant.default(
            _cast(x, torch.get_autocast_dtype(device)), dtype=dtype
        )
        return out


def static_quant(
    key: str,
    device: str,
    x: Tensor,
    scale_reciprocal: Tensor,
    offset: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    reciprocals: Tensor | None = None,
    zero_points: Tensor | None = None,
) -> Tensor:
    """Casts x to the dtype of the scale, which is part of the layer's numbers."""
    del device
    with excluded(key):
        out: Tensor = torch.ops.lq_graph.static_quant.default(
            _cast(x, scale_reciprocal.dtype),
            scale_reciprocal,
            offset,
            scale=scale,
            zero_point=zero_point,
            reciprocals=reciprocals,
            zero_points=zero_points,
        )
        return out


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast does: floats, but not float64."""
    casts = x.is_floating_point() and x.dtype not in (dtype, torch.float64)
    return x.to(dtype) if casts else x
