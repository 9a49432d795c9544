"""Captured graphs whose tasks are replaced, and work that waits for a value. From the first such
wait on, work is late, so every test runs in a process of its own."""

from __future__ import annotations

import pytest

import cann_host
from support.processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
]


@pytest.mark.parametrize("queue", ["0", "1"])
def test_tasks_are_replaced_between_replays(queue: str) -> None:
    programs = "each_replay_has_its_own replays_in_a_row never_written"
    assert run(f"updates.py {programs}", TASK_QUEUE_ENABLE=queue) == "True\n" * 6


def test_what_cannot_be_is_refused() -> None:
    said = run("updates.py refused conditions").splitlines()
    assert said[:5] == [" ".join(["100000"] * 8), "True", "True", "True", "True"]
    assert said[5:] == [
        # found and waited for: 5 and 5, 6 and 5, 2 and 5, -1 and 0
        "1 1 0 0",  # found - value >= 0
        "1 0 0 0",  # found == value
        "1 1 0 0",  # found & value
        "1 1 1 0",  # ~(found | value)
    ]
