"""Runs the suite on the real torch_npu and torchair, on cann_host instead of CANN.

LQ_GRAPH_TEST_NPU=1 runs it on the machine's own NPU and CANN.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest

if os.environ.get("LQ_GRAPH_TEST_NPU") != "1":
    import cann_host

    cann_host.activate()  # before anything imports torch

_counts: Counter[str] = Counter()


@pytest.fixture
def tally() -> Callable[..., None]:
    """Count the cases of a test; the totals are at the end of the output."""

    def count(what: str, times: int = 1) -> None:
        _counts[what] += times

    return count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _counts:
        terminalreporter.section("counted")
        for what, times in sorted(_counts.items()):
            terminalreporter.write_line(f"{times:7,}  {what}")
