"""`python -m cann_host`, in separate processes."""

from __future__ import annotations

import re

import pytest
import torch

import cann_host
from support.processes import SCRIPTS, python, script, start

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


# ---- the launcher, in processes of its own ----


@pytest.mark.slow
def test_launcher_runs_a_script() -> None:
    done = start("launched.py --flag x", CANN_HOST_SOC="Ascend910B4")
    assert done.returncode == 7
    assert done.stdout == "['--flag', 'x'] __main__ 42 Ascend910B4\n[2.0, 2.0, 2.0]\n"
    said = [line for line in done.stderr.splitlines() if line.startswith("cann_host: no NPU")]
    assert len(said) == 1
    assert "CANN 9.1.0 (Ascend910B4) computes on the CPU" in said[0]


@pytest.mark.slow
def test_launcher_runs_a_module_and_shows_its_exception() -> None:
    done = python("-m", "cann_host", "-m", "boom", "y", PYTHONPATH=str(SCRIPTS))
    assert done.returncode == 1
    assert done.stdout.startswith("['y']\n")  # torch_npu adds a line of its own
    assert done.stderr.rstrip().endswith("ValueError: from the script")


def test_launcher_without_a_script_prints_the_options() -> None:
    done = python("-m", "cann_host", "--soc", "Ascend310P3", "--devices", "2")
    said = {"soc: Ascend310P3", "devices: 2", "active: False (a program must be named)"}
    assert said <= set(done.stdout.splitlines())


def test_launcher_without_a_script_prints_the_stand_in() -> None:
    done = python("-m", "cann_host")
    assert done.returncode == 0
    assert "usage: python -m cann_host [options] script.py" in done.stdout
    assert "soc: Ascend910B2" in done.stdout


NOT_ACTIVE = {
    # function of activation.py: why not
    "torch_first": "torch is already imported: call cann_host.activate",
    "no_libraries": "has no native libraries here: lq-graph is not installed, or was installed",
    "no_torch_npu": "torch_npu is not installed. "
    'What to do: pip install "torch_npu>=2.7.1,<2.15" "packaging" "protobuf"; ',
    "another_platform": "runs on Linux only, and this is darwin",
    "a_cann_is_loaded": "a CANN is already loaded in this process .*libascendcl.so",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_ACTIVE)
def test_activation_says_in_one_sentence_why_not(name: str) -> None:
    done = python(*script(f"activation.py {name}"))
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("cann_host.CannHostError: ")
    assert re.search(NOT_ACTIVE[name], last), last


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_exit_with_launches_in_flight(queue: str) -> None:
    """torch_npu's task queue runs our Python on its own thread; leaving must not hang or crash."""
    done = start("task_queue.py exit", TASK_QUEUE_ENABLE=queue)
    assert (done.returncode, done.stdout) == (0, f"{64 * 64 * 64}\n"), done.stderr


MIXED = {
    "add": lambda npu, cpu: npu + cpu,
    "matmul": lambda npu, cpu: npu @ cpu,
    "in place": lambda npu, cpu: npu.add_(cpu),
    "linear": lambda npu, cpu: torch.nn.functional.linear(npu, cpu),
    "embedding": lambda npu, cpu: torch.nn.functional.embedding(cpu.long(), npu),
    "a list": lambda npu, cpu: torch.cat([npu, cpu]),
    "where": lambda npu, cpu: torch.where(npu > 0, npu, cpu),
    "by name": lambda npu, cpu: torch.nn.functional.layer_norm(npu, (3,), bias=cpu[0]),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_tensor_left_on_the_cpu_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"on the same device.* of aten\.\S+ is on the CPU"):
        MIXED[name](torch.ones(3, 3).npu(), torch.ones(3, 3))


def test_cpu_tensors_that_torch_npu_accepts() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    for take in (
        lambda t: t + torch.tensor(2.0),
        lambda t: t.masked_fill(torch.tensor(True), 1.0),
        lambda t: t[torch.tensor([1, 0])],
        lambda t: t[torch.tensor([True, False])],
        lambda t: t.index_put((torch.tensor([0]),), torch.tensor(9.0)),
        lambda t: t.clone().copy_(x.mul(2)),
    ):
        assert torch.equal(take(x.npu()).cpu(), take(x))
