"""The products on which the other tests do not run, each in a separate process."""

from __future__ import annotations

import os

import pytest

from lq_graph.rules.tables import QUANT_ROWS
from support.processes import run, start
from support.table import LEGAL

SOCS = {"310P": "Ascend310P3", "A3": "Ascend910_9391", "950": "Ascend950PR_9579"}
stand_in = pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="a card is one product"
)


@pytest.mark.slow
@stand_in
@pytest.mark.parametrize("product", SOCS)
def test_every_row_runs_eagerly_and_in_a_graph(product: str, tally) -> None:
    said = run("every_row.py", CANN_HOST_SOC=SOCS[product])
    count = len(LEGAL[product])
    assert f"{product}: {count} of {count} rows" in said
    tally(f"rows of {product} run eagerly and in a graph", count)
    quant = [row for row in QUANT_ROWS if product in (p.key for p in row.products)]
    dtypes, schemes = sum(len(row.x) for row in quant), 1 if product == "310P" else 3
    assert f"{dtypes} dtypes of activations, {schemes} schemes of quantize" in said


@pytest.mark.slow
@stand_in
def test_a_device_no_table_is_known_for_is_named() -> None:
    done = start("unknown_chip.py", CANN_HOST_SOC="Ascend910B2")
    assert done.stdout.strip().endswith("A2")
    assert "lq_graph has no support table for Ascend910A and uses that of Atlas A2" in done.stderr
