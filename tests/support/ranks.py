"""Starts the ranks of a job, each in its own process, and reads their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import LIMIT, SCRIPTS


def launch(
    script: str,
    job: str,
    ranks: int,
    folder: Path,
    device: str = "cpu",
    *,
    options: tuple[str, ...] = (),
    dies: int | None = None,
    **variables: str,
) -> list[dict]:
    """Run a job, one process for each rank.

    Args:
        script: one of parallel_ranks.py and hccl_ranks.py, which say what the jobs are.
        job: of the script.
        ranks: how many.
        folder: for what they write.
        device: cpu, or npu for cann_host.
        options: of cann_host.
        dies: the rank that is killed; default the last one of a job called "killed".
        variables: of the environment.

    Returns:
        The results of each rank, {} for a rank that died.
    """
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **variables}
    start = [sys.executable]
    if device == "npu":
        del environment["TORCH_DEVICE_BACKEND_AUTOLOAD"]
        start += ["-m", "cann_host", "--devices", str(ranks), *options]
    if job == "killed":
        dies = ranks - 1
    processes = []
    for rank in range(ranks):
        command = [*start, str(SCRIPTS / script), job, str(folder), str(rank), str(ranks), device]
        with (folder / f"{rank}.txt").open("w") as output:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            )
    try:
        codes = [process.wait(timeout=LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank, code in enumerate(codes):
        path = folder / f"{rank}.json"
        if rank != dies and (code or not path.exists()):
            pytest.fail(f"rank {rank}: {(folder / f'{rank}.txt').read_text()[-3000:]}")
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


def assert_right(found: list[dict], at_least: int) -> None:
    """Assert that no rank found an error, and that there were enough checks."""
    for rank, results in enumerate(found):
        wrong = {name: text for name, text in results.items() if text}
        assert not wrong, f"rank {rank}: {wrong}"
        assert len(results) >= at_least
