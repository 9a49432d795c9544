"""Scales of a weight, and the weight rounded to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["peaks_of", "round_weight"]

# parts of a row's range that int4 weights may cover: a smaller part has finer steps
_CLIPS = [1 - step / 20 for step in range(11)]


def _rows(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows, about a million values each, so that temporary tensors stay small."""
    step = max(1, (1 << 20) // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def peaks_of(weight: Tensor, top: int) -> Tensor:
    """float64 (n,): for each row the magnitude that the largest integer stands for.

    For int8 it is the largest magnitude of the row, for int4 the one with the smallest squared
    error.

    Args:
        weight: float (n, k).
        top: the largest integer, 127 or 7.
    """
    peaks = torch.empty(weight.shape[0], dtype=torch.float64, device="cpu")
    for part in _rows(weight):
        rows = weight[part].float()
        peak = rows.abs().amax(1, keepdim=True)
        if top == 7:
            steps = torch.stack([peak * clip / top for clip in _CLIPS])
            steps = steps.where(steps > 0, 1.0)
            errors = torch.stack([_error(rows, step, top) for step in steps])
            peak = steps.gather(0, errors.argmin(0, keepdim=True))[0] * top
        peaks[part] = peak.squeeze(1).double().cpu()
    return peaks


def _error(rows: Tensor, step: Tensor, top: int) -> Tensor:
    """float32 (rows, 1): the squared error of rounding to multiples of step."""
    rounded = (rows / step).round_().clamp_(-top, top).mul_(step)
    return rounded.sub_(rows).square_().sum(1, keepdim=True)


def round_weight(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """int8 (n, k): weight / scale, rounded half to even and clamped to -top..top."""
    out = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = scale.to(weight.device, torch.float32).unsqueeze(1)
    for part in _rows(weight):
        out[part] = (weight[part].float() / scale[part]).round_().clamp_(-top, top).to(torch.int8)
    return out
