"""Runs Python in a separate process: programs of tests/scripts, commands, examples."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"
# seconds; a hang is a failure. .ci/aarch64 allows more: in an emulator everything takes longer
LIMIT = float(os.environ.get("LQ_GRAPH_TEST_LIMIT", "300"))

Done = subprocess.CompletedProcess[str]


def python(
    *arguments: str | Path,
    without: tuple[str, ...] = (),
    cwd: Path | None = None,
    limit: float = LIMIT,
    **variables: str,
) -> Done:
    """Run Python: `python("-m", "lq_graph", "check")`.

    Args:
        arguments: of Python.
        without: first letters of the environment's variables that it does not get.
        cwd: its working directory.
        limit: seconds it may take.
        variables: of its environment, beside those of this process.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=limit,
        cwd=cwd,
        env={**kept, **variables},
        check=False,
    )


def script(command: str) -> list[str]:
    """Arguments of Python for a program of tests/scripts: "devices.py several"."""
    name, *arguments = shlex.split(command)
    return [str(SCRIPTS / name), *arguments]


def start(command: str, *options: str, **variables: str) -> Done:
    """Run a program of tests/scripts on cann_host.

    Args:
        command: the program and its arguments, as in a shell: "streams.py events".
        options: of cann_host: "--streams", "late".
        variables: of its environment.
    """
    arguments = ["-m", "cann_host", *options, *script(command)]
    return python(*arguments, without=(), cwd=None, limit=LIMIT, **variables)


def output_of(done: Done) -> str:
    """The output of a process that must have ended without an error."""
    assert done.returncode == 0, told(done)
    return done.stdout


def run(command: str, *options: str, **variables: str) -> str:
    """The output of a program of tests/scripts on cann_host; it ends without an error."""
    return output_of(start(command, *options, **variables))


def told(done: Done) -> str:
    """The exit status and all output of a process, for messages."""
    command = shlex.join(map(str, done.args))
    return f"{command}\nexit status {done.returncode}\n{done.stdout}\n{done.stderr}"
