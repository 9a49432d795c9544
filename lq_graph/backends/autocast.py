"""Autocast for the operators that take float activations: it casts the input, as for nn.Linear.

The first two arguments of each kernel, before those of the operator: the dispatch key that it is
registered for, and the device as torch.get_autocast_dtype names it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.plan import Spec
from .compat import excluded

__all__ = ["dynamic_quant", "static_quant", "when_cast"]


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


def when_cast(x: Tensor, dtype: torch.dtype | None = None) -> Tensor | Spec:
    """What an operator gets for x: under autocast, an x of another dtype.

    Args:
        dtype: that it casts to; None for autocast's own.
    """
    device = x.device.type
    if device not in ("cpu", "npu") or not torch.is_autocast_enabled(device):
        return x
    dtype = dtype or torch.get_autocast_dtype(device)
    return Spec(dtype, tuple(x.shape)) if _casts(x, dtype) else x


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if _casts(x, dtype) else x


def _casts(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast casts x: floats, but not float64."""
    return x.is_floating_point() and x.dtype not in (dtype, torch.float64)
