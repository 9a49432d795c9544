"""Runs a script on cann_host, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def start(
    folder: Path, script: str, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.run(
        [sys.executable, "-m", "cann_host", *options, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )


def run(folder: Path, script: str, *options: str, **variables: str) -> str:
    done = start(folder, script, *options, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
