"""How far a tensor is from its reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ..errors import LinearQuantValueError

__all__ = ["ErrorMetrics", "MetricSums"]


@dataclass(frozen=True)
class ErrorMetrics:
    """How far a tensor b is from its reference a, over all batches.

    Attributes:
        sqnr: signal to quantization noise in dB, 10 log10(sum a^2 / sum (a - b)^2); infinite for
            equal tensors, NaN if one of them holds NaN or infinity.
        max_abs: the largest absolute difference, in the unit of the tensors.
        cosine: of the flattened tensors, -1 to 1.
    """

    sqnr: float
    max_abs: float
    cosine: float

    @property
    def severity(self) -> float:
        """A number to sort by, larger is worse; it is -sqnr, and infinity for NaN."""
        return math.inf if math.isnan(self.sqnr) else -self.sqnr

    @property
    def is_exact(self) -> bool:
        """Whether the tensors are equal."""
        return self.sqnr == math.inf

    @property
    def decibels(self) -> str:
        """`sqnr` as a table shows it."""
        return "exact" if self.is_exact else f"{self.sqnr:.1f}"

    def __str__(self) -> str:
        sqnr = self.decibels if self.is_exact else f"{self.decibels} dB"
        return f"{sqnr}, cosine {self.cosine:.5f}, largest difference {self.max_abs:.2e}"

    def as_json(self) -> dict[str, float | bool | None]:
        """The attributes, and "exact"; what is not finite is None, because JSON has no word for it:
        a `sqnr` of None is infinite if "exact", else NaN or minus infinity."""
        values = {"sqnr": self.sqnr, "max_abs": self.max_abs, "cosine": self.cosine}
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        return {**finite, "exact": self.is_exact}


class MetricSums:
    """The running sums that ErrorMetrics are computed from, in float64."""

    def __init__(self) -> None:
        self.calls = 0
        self.signal = self.noise = self.other = self.product = self.largest = 0.0

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add a tensor and its reference.

        Args:
            name: for the message.
            a: the reference.
            b: of the same shape.

        Raises:
            LinearQuantValueError: the shapes differ.
        """
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        if a.shape != b.shape:
            raise LinearQuantValueError(
                f"compare: {name} returns {tuple(a.shape)} in model_a and {tuple(b.shape)} in "
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

    def metrics(self) -> ErrorMetrics:
        """The metrics of all tensors that were added."""
        if not math.isfinite(self.noise):
            return ErrorMetrics(math.nan, self.largest, math.nan)
        if not self.noise:
            return ErrorMetrics(math.inf, 0.0, 1.0)
        sqnr = 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        length = math.sqrt(self.signal * self.other)
        return ErrorMetrics(sqnr, self.largest, self.product / length if length else 0.0)
