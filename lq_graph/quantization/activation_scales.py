"""Scale and zero point of an activation, from its range in calibration."""

from __future__ import annotations

import torch

from ..rules.tables import dtype_name

__all__ = ["affine", "why_no_range"]


def _step_of(low: float, high: float, symmetric: bool) -> float:
    """The scale with which 255 (symmetric) or 256 integers cover low to high."""
    return max(-low, high) / 127 if symmetric else (high - low) / 255


def _least_step(dtype: torch.dtype) -> float:
    """The smallest scale whose reciprocal is finite in a dtype and normal in float32."""
    return max(1 / torch.finfo(dtype).max, 2 * torch.finfo(torch.float32).tiny)


def why_no_range(low: float, high: float, dtype: torch.dtype, symmetric: bool) -> str:
    """Why there is no usable scale for an activation's range; empty if there is one."""
    if not (step := _step_of(low, high, symmetric)):
        return "calibration gave it only zeros, so the range of its input is unknown"
    if step < _least_step(dtype):
        return (
            f"its activations are too small for {dtype_name(dtype)}, from {low:.3g} to {high:.3g}: "
            "the reciprocal of their scale is infinite"
        )
    return ""


def affine(low: float, high: float, dtype: torch.dtype, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of an activation. The chip multiplies by the scale's reciprocal, so the
    scale is chosen such that its reciprocal is exact in the activation's dtype.

    Args:
        low, high: the range, 0 included; one that `why_no_range` accepts.
        dtype: of the activation.
        symmetric: whether the zero point is 0.
    """
    step = _step_of(low, high, symmetric)
    reciprocal = torch.tensor(1 / step, dtype=torch.float64, device="cpu").to(dtype)
    scale = float(reciprocal.to(torch.float32).reciprocal())
    offset = 0 if symmetric else round(-128 - low / scale)
    return scale, min(max(offset, -128), 127)
