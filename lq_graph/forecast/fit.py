"""Fit the parameters of the cost model to the published measurements.

`TORCH_DEVICE_BACKEND_AUTOLOAD=0 python -m lq_graph.forecast.fit` writes fitted.json. Rows that are
held out have no part in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..rules.chips import Chip
from .cost import ASSUMED, COLLECTIVES, FITTED, Parameters, Rate
from .least_squares import fit, relative_error
from .measurements import FIT, Measurement, measurements
from .operators import OPERATORS, Operator, Tensors, Work, operator_of, work_of

__all__ = ["Point", "fit_family", "fit_parameters", "points_of"]

FREE = (0.0, math.inf)
NONE_LEFT = 0.3  # the relative error where a family has no more measurements than unknowns


class Point(NamedTuple):
    """A measured kernel, in seconds."""

    operator: Operator
    work: Work
    chip: Chip
    seconds: float


def points_of(rows: Iterable[tuple[str, Tensors, Tensors, Chip, float]]) -> list[Point]:
    """Those of measured kernels (op type, inputs, outputs, chip, seconds) that have a record."""
    points = []
    for op_type, inputs, outputs, chip, seconds in rows:
        operator, known = operator_of(op_type, inputs, outputs)
        if known:
            points.append(
                Point(operator, work_of(operator, inputs, outputs, chip, {}), chip, seconds)
            )
    return points


class FamilyFit(NamedTuple):
    """Parameters of the operators of a family, and how well they fit."""

    launches: dict[str, float]
    rate: Rate
    errors: dict[str, float]
    points: dict[str, int]


def fit_family(points: Sequence[Point], bandwidth_limit: float) -> FamilyFit:
    """One launch for each operator, and one bandwidth and one rate of the matrix unit for all.

    Args:
        points: of operators of one family.
        bandwidth_limit: the share of the memory's peak that nothing exceeds.
    """
    operators = {point.operator.name: point.operator for point in points}
    names = list(operators)
    moves = any(point.work.moved for point in points)
    computes = any(point.work.computed for point in points)
    features, bounds = [], []
    for point in points:
        row = [1.0 if point.operator.name == name else 0.0 for name in names]
        if moves:
            row.append(point.work.moved / point.chip.bytes_per_second)
        if computes:
            computed = point.work.computed
            row.append(computed / point.chip.peak(point.work.dtype) if computed else 0.0)
        features.append(row)
    for one in operators.values():
        bounds.append(FREE if one.launch is None else (one.launch, one.launch))
    bounds += [(1 / bandwidth_limit, math.inf)] * moves + [(1.0, math.inf)] * computes
    measured = [point.seconds for point in points]
    found = fit(features, measured, bounds)
    launches = dict(zip(names, found, strict=False))
    slow = found[len(names)] if moves else 1 / bandwidth_limit
    rate = Rate(1 / slow, 1 / found[-1] if computes else 1.0)
    forecast = [sum(a * b for a, b in zip(row, found, strict=True)) for row in features]
    unknowns = sum(low != high for low, high in bounds)
    whole = relative_error(forecast, measured, unknowns)
    whole = NONE_LEFT if math.isinf(whole) else whole
    errors, counts = {}, {}
    for name in names:
        own = [i for i, point in enumerate(points) if point.operator.name == name]
        counts[name] = len(own)
        error = relative_error([forecast[i] for i in own], [measured[i] for i in own], 0)
        freedom = math.sqrt(len(points) / max(len(points) - unknowns, 1))
        errors[name] = error * freedom if len(own) > 2 else max(error, whole)
        if operators[name].launch is not None:
            errors[name] = max(errors[name], NONE_LEFT)
    return FamilyFit(launches, rate, errors, counts)


def fit_parameters(rows: Sequence[Measurement]) -> Parameters:
    """The parameters from measured rows; those that are not for the fit are left out."""
    rows = [row for row in rows if row.use == FIT]
    (copy,) = [row for row in rows if row.op == "copy"]
    limit = copy.value * 1e12 / copy.chip.bytes_per_second
    (gap,) = [row for row in rows if row.op == "gap"]
    points = points_of(
        (row.op, row.inputs, row.outputs, row.chip, row.value * 1e-6)
        for row in rows
        if row.is_kernel
    )
    launches: dict[str, float] = {}
    rates: dict[str, Rate] = {}
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    for family in dict.fromkeys(operator.family for operator in OPERATORS):
        found = fit_family([one for one in points if one.operator.family == family], limit)
        launches |= found.launches
        rates[family] = found.rate
        errors |= found.errors
        counts |= found.points
    for operator in OPERATORS:
        if operator.like:
            launches[operator.name] = launches[operator.like]
            errors[operator.name] = max(errors[operator.like], ASSUMED)
    collective, link, error = _collectives([row for row in rows if row.op in COLLECTIVES])
    return Parameters(launches, rates, errors, gap.value * 1e-6, collective, link, error, counts)


def _collectives(rows: Sequence[Measurement]) -> tuple[float, float, float]:
    """Seconds without a message, share of the link's peak, and relative error."""
    features = [
        [1.0, (row.devices - 1) * row.message / row.chip.link_of(row.devices)] for row in rows
    ]
    measured = [row.value * 1e-6 for row in rows]
    launch, slow = fit(features, measured, [FREE, (1.0, math.inf)])
    forecast = [launch + slow * received for _, received in features]
    return launch, 1 / slow, relative_error(forecast, measured, 2)


def write() -> None:
    """Write fitted.json."""
    FITTED.write_text(
        json.dumps(_rounded(fit_parameters(measurements()).as_json()), indent=2) + "\n"
    )


def _rounded(found: object) -> object:
    """Six digits: more are noise of the solver."""
    if isinstance(found, float):
        return float(f"{found:.6g}")
    if isinstance(found, dict):
        return {key: _rounded(value) for key, value in found.items()}
    return found


if __name__ == "__main__":
    write()
    print(f"written: {FITTED}")
