"""Streams, events, captured graphs and torch_npu's task queue, in separate processes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import cann_host
from support.processes import python, run, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


# ---- streams, events, captured graphs ----

WAITS = [
    # streams, whether the program waits, what it reads before and after it synchronizes
    ("now", False, "65536 65536"),
    ("now", True, "65536 65536"),
    ("late", False, "0 0"),  # the mistake shows
    ("late", True, "0 65536"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("streams", "waits", "reads"), WAITS)
def test_late_streams_show_a_wait_that_was_forgotten(streams, waits, reads) -> None:
    assert run(f"streams.py forgotten_wait {waits}", "--streams", streams) == reads + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
def test_events(streams: str) -> None:
    assert run("streams.py events", "--streams", streams).splitlines() == [
        "True",
        f"True True {256.0**3} True",
        "done",
    ]


@pytest.mark.slow
def test_a_wait_raises_the_failure_of_late_work() -> None:
    said = run("streams.py failure", "--streams", "late")
    assert said.splitlines() == ["launched", "told", "[1.0, 1.0, 1.0, 1.0]"]


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
def test_captured_graph_over_two_streams(streams: str) -> None:
    said = run("captures.py two_streams", "--streams", streams)
    assert said.splitlines() == ["1.0 2.0", "5.0 5.0", "6.0 6.0", "refused", "24"]


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
def test_ordinary_operators_are_captured(streams: str) -> None:
    assert run("captures.py ordinary_operators", "--streams", streams) == "True True\n"


NOT_CAPTURED = {
    "torch.nonzero(x)": "aten.nonzero.default is not captured: the shape of its result depends on",
    "torch.randn_like(x)": "draws random numbers, which is not captured",
    "torch.add(x, 1, out=small)": "would resize out in a captured graph",
    "blocks.abs()": "of an internal format is not captured here",
    "one.item()": "the stream is being captured; nothing can wait for it",
}


@pytest.mark.slow
def test_work_that_is_not_captured_gives_the_reason() -> None:
    said = run("captures.py not_captured " + shlex.join(NOT_CAPTURED)).splitlines()
    for line, text in zip(said, NOT_CAPTURED.values(), strict=True):
        assert text in line


GONE = {
    # the graph's work on memory that is freed before its replay: the error
    "y.copy_(big)": "aclnnInplaceCopy: 67108864 bytes at",
    "y.add_(big)": "aten.add_.Tensor: a tensor that the graph uses is no longer allocated",
    "big.zero_()": "no longer allocated",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("streams", ["now", "late"])
def test_a_replay_on_memory_that_is_gone_is_an_error(what: str, streams: str) -> None:
    command = f"captures.py memory_that_is_gone '{what}'"
    said = run(command, "--streams", streams).splitlines()
    assert (said[0], said[-1]) == ("replayed", "True")
    assert GONE[what] in said[1]


@pytest.mark.slow
def test_threads() -> None:
    for streams in ("now", "late"):
        assert run("streams.py threads", "--streams", streams) == "True\n"


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """benchmarks/soak.py, shorter, and that it would tell."""
    soak = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    command = ["-m", "cann_host", str(soak), "--calls", "4000", "--runs", "400"]
    for bound, status, word in (("1", 0, "flat"), ("-1000", 1, "NOT FLAT")):
        done = python(*command, "--bound", bound)
        assert done.returncode == status, told(done)
        assert done.stdout.splitlines()[-1].startswith(word)
        command[-3:] = ["10", "--runs", "10"]


# ---- torch_npu's task queue ----


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["1", "2"])
def test_launches_in_the_task_queue_need_no_interpreter_lock(queue: str) -> None:
    """torch_npu waits for its queue with the lock held, in torch.load onto the device say."""
    said = run("task_queue.py no_interpreter_lock", TASK_QUEUE_ENABLE=queue)
    assert said == "True True True\n"


QUEUE_FAILS = {
    # the call that fails: the first error of the program
    "aclnnInplaceCopy:507015@3": "operator name is aclnnInplaceCopy",
    "aclnnInplaceCopyGetWorkspaceSize:161002@3": "",  # 1: at the call, 2: later
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", QUEUE_FAILS)
@pytest.mark.parametrize("queue", ["1", "2"])
def test_after_a_failure_in_the_task_queue_every_wait_fails(queue: str, fault: str) -> None:
    """torch_npu drops the launches after the failure that it reported."""
    said = run(f"task_queue.py failure {fault}", TASK_QUEUE_ENABLE=queue).splitlines()
    assert said[0].startswith("True True 30 ")
    if text := QUEUE_FAILS[fault]:
        assert text in said[0]
    at_the_call = queue == "1" and "GetWorkspaceSize" in fault
    assert said[1] == str(not at_the_call)


@pytest.mark.slow
def test_a_wait_raises_a_refusal_in_the_task_queue() -> None:
    for queue in ("1", "2"):
        assert run("task_queue.py refusal", TASK_QUEUE_ENABLE=queue) == "True\n8.0\n" * 2
