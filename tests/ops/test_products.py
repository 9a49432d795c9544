"""The products the other tests do not run on, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lq_graph.rules.tables import QUANT_ROWS
from support.table import LEGAL

SCRIPTS = Path(__file__).parents[1] / "scripts"
SOCS = {"310P": "Ascend310P3", "A3": "Ascend910_9391", "950": "Ascend950PR_9579"}
stand_in = pytest.mark.skipif(
    os.environ.get("LQ_GRAPH_TEST_NPU") == "1", reason="a card is one product"
)


def run(soc: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CANN_HOST_SOC": soc}
    command = [sys.executable, "-m", "cann_host", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=SCRIPTS, check=False
    )


@stand_in
@pytest.mark.parametrize("product", SOCS)
def test_every_row_runs_eagerly_and_in_a_graph(product: str, tally) -> None:
    done = run(SOCS[product], "every_row.py")
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(LEGAL[product])
    assert f"{product}: {count} of {count} rows" in done.stdout
    tally(f"rows of {product} run eagerly and in a graph", count)
    quant = [row for row in QUANT_ROWS if product in (p.key for p in row.products)]
    dtypes, schemes = sum(len(row.x) for row in quant), 1 if product == "310P" else 3
    assert f"{dtypes} dtypes of activations, {schemes} schemes of quantize" in done.stdout


@stand_in
def test_a_device_no_table_is_known_for_is_named(tmp_path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "import torch, lq_graph\n"
        "torch.npu.get_device_name = lambda *_: 'Ascend910A'\n"  # cann_host has no such chip
        "print(lq_graph.get_product().key)\n"
    )
    done = run("Ascend910B2", str(script))
    assert done.stdout.strip().endswith("A2")
    assert (
        "lq_graph knows no support table for Ascend910A; it reads that of Atlas A2" in done.stderr
    )
