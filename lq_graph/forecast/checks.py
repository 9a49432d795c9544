"""Every measurement beside its forecast."""

from __future__ import annotations

from dataclasses import dataclass

from .cost import COLLECTIVES, Parameters, communication_cost, fitted, kernel_cost
from .decoders import PUBLIC
from .kernels import Shape
from .measurements import Measurement, measurements
from .model import Step, timed
from .published import published_kernels

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """A measurement and its forecast, in the measurement's unit; None if nothing forecasts it."""

    measurement: Measurement
    forecast: float | None

    @property
    def error(self) -> float | None:
        """Relative to the measurement."""
        return None if self.forecast is None else self.forecast / self.measurement.value - 1


def compare(parameters: Parameters | None = None) -> list[Comparison]:
    """All of them, in the order of measurements.json."""
    at = parameters or fitted()
    found: dict[str, Comparison] = {}
    for row in measurements():
        forecast = _forecast(row, at)
        if row.op == "ratio":
            first, second = (found[one].forecast for one in row.about["of"])
            assert first is not None and second is not None
            forecast = first / second
        found[row.id] = Comparison(row, forecast)
    return list(found.values())


def _forecast(row: Measurement, at: Parameters) -> float | None:
    if row.is_kernel:
        cost = kernel_cost(row.op, row.inputs, row.outputs, row.chip, at)
        return (cost.seconds - at.gap) * 1e6  # a profile's duration has no gap
    if row.op in COLLECTIVES:
        cost = communication_cost(row.op, row.message, row.devices, row.chip, at)
        return (cost.seconds - at.gap) * 1e6
    if row.op == "gap":
        return at.gap * 1e6
    if "model" in row.about:
        step = _published_step(row, at)
        return (step.computing if row.op == "computing" else step.seconds) * 1e3
    return None


def _published_step(row: Measurement, at: Parameters) -> Step:
    about = row.about
    queries = about["context"] if row.op == "prefill" else 1
    shape = Shape(about["batch"], queries, about["context"], about["tp"])
    kernels = published_kernels(about["kernels"], PUBLIC[about["model"]], shape, about["quant"])
    return timed(kernels, row.chip, shape.tp, at)
