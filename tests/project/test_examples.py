"""The examples run to their end, and say what they should."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import cann_host
from support.processes import output_of, python

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHER = ["-m", "cann_host"] if cann_host.is_active() else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("eager.py", "npu  equal to cpu", marks=pytest.mark.slow),
        ("graph_mode.py", "0 of 4096 differ"),
        pytest.param("checkpoint.py", "2 of them matmuls", marks=pytest.mark.slow),
    ],
)
def test_example(name: str, shown: str, tmp_path: Path) -> None:
    assert shown in output_of(python(*LAUNCHER, EXAMPLES / name, cwd=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("checkpoint.py nowhere", "checkpoint.py: there is no folder nowhere"),
        ("checkpoint.py .", "checkpoint.py: "),
        ("tensor_parallel.py", "tensor_parallel.py is started by torchrun:"),
    ],
)
def test_a_mistake_is_a_sentence(command: str, said: str, tmp_path: Path) -> None:
    example, *rest = command.split()
    done = python(*LAUNCHER, EXAMPLES / example, *rest, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


ON_CANN_HOST = ["--no-python", sys.executable, "-m", "cann_host", "--devices", "2"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "where"),
    [
        ([], "2 processes on cpu, gloo"),
        pytest.param(
            ON_CANN_HOST,
            "2 processes on npu, hccl",
            marks=pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
        ),
    ],
    ids=["cpu", "npu"],
)
def test_tensor_parallel(launcher: list[str], where: str, tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *launcher]
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    said = output_of(python(*command, EXAMPLES / "tensor_parallel.py", cwd=tmp_path, **environment))
    assert where in said
    assert "int32, then the scale                     530,440               0 of 8,192" in said
    assert "rank 0 read 551,936, 0 of 8,192 differ" in said
