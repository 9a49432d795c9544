"""Scale and zero point of an activation from the range that calibration saw."""

from __future__ import annotations

import torch

from ..rules.tables import dtype_name

__all__ = ["affine", "why_no_range"]


def _step_of(low: float, high: float, symmetric: bool) -> float:
    """The distance of neighbours among 255 or 256 values from low to high."""
    return max(-low, high) / 127 if symmetric else (high - low) / 255


def _least_step(dtype: torch.dtype) -> float:
    """The smallest scale whose reciprocal the dtype holds, and float32 as a normal number."""
    return max(1 / torch.finfo(dtype).max, 2 * torch.finfo(torch.float32).tiny)


def why_no_range(low: float, high: float, dtype: torch.dtype, symmetric: bool) -> str:
    """Why an activation's range gives no scale; empty if it does."""
    if not (step := _step_of(low, high, symmetric)):
        return "calibration gave it only zeros, so the range of its input is unknown"
    if step < _least_step(dtype):
        return (
            f"its activations are too small for {dtype_name(dtype)}, from {low:.3g} to {high:.3g}: "
            "the reciprocal of their scale is infinite"
        )
    return ""


def affine(low: float, high: float, dtype: torch.dtype, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of an activation from its range, 0 included, which `why_no_range` has
    nothing against. The scale is such that its reciprocal, which is what the chip multiplies by, is
    exact in the activation's dtype."""
    step = _step_of(low, high, symmetric)
    reciprocal = torch.tensor(1 / step, dtype=torch.float64, device="cpu").to(dtype)
    scale = float(reciprocal.to(torch.float32).reciprocal())
    offset = 0 if symmetric else round(-128 - low / scale)
    return scale, min(max(offset, -128), 127)
