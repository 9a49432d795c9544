"""Linear least squares of relative errors, each unknown between two bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

__all__ = ["fit", "relative_error"]


def fit(
    features: Sequence[Sequence[float]],
    values: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> list[float]:
    """The x with the smallest sum of (features x / value - 1)^2, low <= x <= high.

    Exact for a few unknowns: every choice of those that lie on a bound is tried.

    Args:
        features: a row for each measurement, a column for each unknown.
        values: the measured values, positive.
        bounds: (low, high) of each unknown; high may be infinite.
    """
    rows = torch.tensor(features, dtype=torch.float64)
    rows = rows / torch.tensor(values, dtype=torch.float64)[:, None]
    best: tuple[float, list[float]] | None = None
    choices = [(None, low) if high == math.inf else (None, low, high) for low, high in bounds]
    for choice in itertools.product(*choices):
        x = torch.tensor([0.0 if one is None else one for one in choice], dtype=torch.float64)
        free = [i for i, one in enumerate(choice) if one is None]
        if free:
            rest = torch.ones(len(values), dtype=torch.float64) - rows @ x
            columns = rows[:, free]
            scale = columns.norm(dim=0).clamp_min(1e-300)
            solved = torch.linalg.lstsq(columns / scale, rest[:, None], driver="gelsd").solution
            x[free] = solved[:, 0] / scale
        found = [float(one) for one in x]
        inside = all(
            low - 1e-12 * abs(low) <= one <= high
            for one, (low, high) in zip(found, bounds, strict=True)
        )
        if inside:
            loss = float(((rows @ x - 1) ** 2).sum())
            if best is None or loss < best[0] - 1e-12:
                best = loss, found
    assert best is not None  # all on their low bounds is always a choice
    return best[1]


def relative_error(forecast: Sequence[float], measured: Sequence[float], unknowns: int) -> float:
    """The standard error of a forecast, relative: the root mean square of the residuals, with the
    degrees of freedom that the unknowns take; infinite if none are left."""
    left = len(measured) - unknowns
    if left <= 0:
        return math.inf
    squares = [(f / m - 1) ** 2 for f, m in zip(forecast, measured, strict=True)]
    return math.sqrt(sum(squares) / left)
