"""Tensor parallelism: 2 and 4 processes compute what one does.

The ranks are processes of their own (parallel_ranks.py), on the CPU with gloo, and on cann_host's
npu with its stand-in for HCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 300  # seconds for a job; a hang is a failure


def launch(job: str, ranks: int, folder: Path, device: str = "cpu", **variables: str) -> list[dict]:
    """Run a job, one process for each rank; what each found, {} for one that died."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables}
    start = [sys.executable]
    if device == "npu":
        del environment["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        start += ["-m", "cann_host", "--devices", str(ranks)]
    processes = []
    for rank in range(ranks):
        command = [*start, str(HERE / "parallel_ranks.py"), job, str(folder), str(rank), str(ranks)]
        with (folder / f"{rank}.txt").open("w") as output:
            processes.append(
                subprocess.Popen([*command, device], env=environment, stdout=output, stderr=output)
            )
    try:
        codes = [process.wait(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank, code in enumerate(codes):
        path = folder / f"{rank}.json"
        if code == 0:
            assert path.exists(), (folder / f"{rank}.txt").read_text()[-3000:]
        elif job != "killed":
            pytest.fail(f"rank {rank}: {(folder / f'{rank}.txt').read_text()[-3000:]}")
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


def assert_right(found: list[dict], at_least: int) -> None:
    for rank, results in enumerate(found):
        wrong = {name: text for name, text in results.items() if text}
        assert not wrong, f"rank {rank}: {wrong}"
        assert len(results) >= at_least


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_row_that_can_be_split_equals_one_device(ranks: int, tmp_path, tally) -> None:
    found = launch("values", ranks, tmp_path)
    assert_right(found, 400)
    tally(f"splits of rows, plans and checkpoints over {ranks} processes", len(found[0]))


def test_compiled(tmp_path) -> None:
    assert_right(launch("compiled", 2, tmp_path), 4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_killed_rank_is_an_error_on_the_others(ranks: int, tmp_path) -> None:
    found = launch("killed", ranks, tmp_path)
    assert found == [{"killed: error": ""}] * (ranks - 1) + [{}]


def test_a_mismatched_shape_is_an_error_on_every_rank(tmp_path) -> None:
    found = launch("mismatched", 2, tmp_path, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert found == [{"mismatched: error": ""}] * 2
