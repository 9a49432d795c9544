"""The examples run to their end, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cann_host

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("eager.py", "npu  equal to cpu"),
        ("graph_mode.py", "0 of 4096 differ"),
        ("checkpoint.py", "2 of them matmuls"),
    ],
)
def test_example(name: str, shown: str, tmp_path: Path) -> None:
    launcher = ["-m", "cann_host"] if cann_host.is_active() else []
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
