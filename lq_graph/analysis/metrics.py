"""How far a tensor is from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import LinearQuantValueError

__all__ = ["Error", "RunningErrors"]


@dataclass(frozen=True)
class Error:
    """How far a tensor is from its reference, over all batches.

    Attributes:
        sqnr: signal to quantization noise in dB, 10 log10(sum a^2 / sum (a - b)^2); infinite for
            equal tensors, NaN where one of them holds NaN or infinity.
        max_abs: the largest |a - b|.
        cosine: of the flattened tensors.
    """

    sqnr: float
    max_abs: float
    cosine: float

    @property
    def badness(self) -> float:
        """A number to find the worst by: NaN is worse than any noise."""
        return math.inf if math.isnan(self.sqnr) else -self.sqnr

    def cells(self) -> list[object]:
        """As a table shows it."""
        return [f"{self.sqnr:.1f}", f"{self.max_abs:.2e}", f"{self.cosine:.5f}"]


class RunningErrors:
    """The running sums behind an Error, in float64."""

    def __init__(self) -> None:
        self.calls = 0
        self.signal = self.noise = self.other = self.product = self.largest = 0.0

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        if a.shape != b.shape:
            raise LinearQuantValueError(
                f"compare: {name} gives {tuple(a.shape)} in model_a and {tuple(b.shape)} in "
                "model_b. What to do: compare models of one architecture."
            )
        self.calls += 1
        if not a.numel():
            return
        difference = a - b
        self.signal += a.square().sum().item()
        self.other += b.square().sum().item()
        self.noise += difference.square().sum().item()
        self.product += (a * b).sum().item()
        largest = difference.abs().max().item()
        self.largest = max(self.largest, largest) if largest == largest else largest

    def error(self) -> Error:
        if not math.isfinite(self.noise):
            return Error(math.nan, self.largest, math.nan)
        if not self.noise:
            return Error(math.inf, 0.0, 1.0)
        sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        length = math.sqrt(self.signal * self.other)
        return Error(sqnr, self.largest, self.product / length if length else 0.0)
