"""The fit, and the forecast beside published figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lq_graph.forecast.checks import compare
from lq_graph.forecast.cost import FITTED, Parameters, fitted
from lq_graph.forecast.fit import fit_parameters
from lq_graph.forecast.least_squares import fit, relative_error
from lq_graph.forecast.measurements import FIT, HELD_OUT, INFORMATION, measurements

FREE = (0.0, math.inf)


def test_fitted_json_is_what_the_fit_gives() -> None:
    found = fit_parameters(measurements()).as_json()
    written = json.loads(FITTED.read_text())
    assert found.keys() == written.keys()
    for key, value in written.items():
        assert _flat(found[key]) == pytest.approx(_flat(value), rel=1e-4), key


def _flat(found: object) -> dict[str, float]:
    if not isinstance(found, dict):
        assert isinstance(found, float | int)
        return {"": found}
    return {f"{k}.{n}": v for k, one in found.items() for n, v in _flat(one).items()}


def test_nothing_that_is_held_out_is_in_the_fit() -> None:
    rows = measurements()
    changed = [
        row if row.use == FIT else replace(row, value=row.value * 3 if row.value else 1.0)
        for row in rows
    ]
    assert fit_parameters(changed) == fit_parameters(rows)
    assert fit_parameters([row for row in rows if row.use == FIT]) == fit_parameters(rows)


def test_every_measurement_has_a_source_and_a_use() -> None:
    rows = measurements()
    assert len({row.id for row in rows}) == len(rows) > 100
    for row in rows:
        assert row.use in (FIT, HELD_OUT, INFORMATION)
        assert "/" in row.source and row.value > 0, row.id
        assert "RECALLED" not in row.source


@pytest.mark.parametrize(
    ("features", "values", "bounds", "expected"),
    [
        # y = 2 + 3 x, exactly
        ([[1, 1], [1, 2], [1, 5]], [5, 8, 17], [FREE, FREE], [2, 3]),
        # the second would be -1: it stays at 0, and the first is what relative errors ask for,
        # sum(1/y) / sum(1/y^2)
        ([[1, 1], [1, 2]], [3, 2], [FREE, FREE], [(1 / 3 + 1 / 2) / (1 / 9 + 1 / 4), 0]),
        # a bound from above
        ([[1], [1]], [4, 4], [(0, 3)], [3]),
        # a fixed one
        ([[1, 1], [1, 2]], [5, 7], [(1, 1), FREE], [1, (4 / 25 + 12 / 49) / (1 / 25 + 4 / 49)]),
    ],
)
def test_least_squares(features, values, bounds, expected) -> None:  # type: ignore[no-untyped-def]
    assert fit(features, values, bounds) == pytest.approx(expected)


def test_the_error_is_that_of_the_residuals() -> None:
    assert relative_error([1.1, 0.9, 1.1], [1, 1, 1], 1) == pytest.approx(math.sqrt(0.03 / 2))
    assert relative_error([1.1], [1], 1) == math.inf


COMPARED = {one.measurement.id: one for one in compare()}


@pytest.mark.parametrize("quant", ["bf16", "w8a8"])
@pytest.mark.parametrize("tp", [1, 2])
def test_decode_of_the_published_dense_recipe(quant: str, tp: int) -> None:
    """Held out of the fit: within 15 %."""
    one = COMPARED[f"qwen3-8b-a3-{quant}-tp{tp}-decode"]
    assert one.measurement.use == HELD_OUT
    assert one.error is not None and abs(one.error) < 0.15


@pytest.mark.parametrize("tp", [1, 2])
def test_its_ratio_of_w8a8_to_bf16(tp: int) -> None:
    """Held out of the fit: within 10 %."""
    one = COMPARED[f"qwen3-8b-a3-ratio-tp{tp}"]
    assert one.measurement.use == HELD_OUT
    assert one.error is not None and abs(one.error) < 0.10


def test_fitted_errors_hold_for_their_own_measurements() -> None:
    """The error beside a figure is no promise, but the residuals of the fit are within three."""
    products = [one for name, one in COMPARED.items() if name.startswith(("mm", "qmm"))]
    inside = [one for one in products if one.measurement.use == FIT]
    assert len(inside) == 34
    for one in inside:
        assert one.error is not None and abs(one.error) < 3 * 0.13


def test_parameters_are_shares_of_the_peaks() -> None:
    found = fitted()
    for name, rate in found.rates.items():
        assert 0.1 < rate.bandwidth <= 1.446 / 1.6 + 1e-6, name
        assert 0.1 < rate.compute <= 1, name
    assert Parameters.from_json(found.as_json()) == found
