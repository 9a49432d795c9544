"""Asks processes that import torch and torch_npu. They may fail, end by a signal, or hang."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from .environment import AUTOLOAD

__all__ = ["Child", "ask_stand_in"]

# The longest silence. A cold start of torch, from a slow disk or in an emulator, takes some tens of
# seconds, and so does a graph of all rows.
_SECONDS = 180.0


class Child:
    """A process that runs `inside`.

    Attributes:
        error: how it ended, if it did not end well, in one line; "" else. Known after `events`.
    """

    def __init__(self, where: str, *, self_test: bool) -> None:
        """Start it.

        Args:
            where: "cpu", or "npu", which imports torch_npu.
            self_test: whether it runs the self-test.
        """
        self.error = ""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in events()
        self._pipe, end = os.pipe()
        module = ["-m", "lq_graph.doctor.inside", where, str(end)]
        command = [sys.executable, *_flags(), *module]
        self._process = subprocess.Popen(
            command + ["test"] * self_test,
            env={**os.environ, AUTOLOAD: "0"},  # `import torch` alone; `inside` asks for the rest
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            pass_fds=(end,),
            start_new_session=True,
        )
        os.close(end)

    def events(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events, as they come."""
        rest = b""
        try:
            while True:
                if not select.select([self._pipe], [], [], _SECONDS)[0]:
                    self.error = f"it hangs: nothing came from it in {_SECONDS:.0f} s"
                    return
                data = os.read(self._pipe, 1 << 16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    name, fields = json.loads(line)
                    yield name, fields
            self._end()
        finally:
            self.close()

    def _end(self) -> None:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:  # it has said everything, and hangs at its end
            return
        if code:
            self.error = self._last_words()
            if code < 0:
                name = signal.Signals(-code).name
                self.error = f"{self.error or 'it said nothing'} (the process ended by {name})"

    def _last_words(self) -> str:
        """The last lines that it wrote, without those of the stack."""
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        # what C++ prints when it aborts, before a stack
        for line in lines:
            if line.startswith("what():"):
                return line.removeprefix("what():").strip()
        return lines[-1] if lines else ""

    def close(self) -> None:
        """End the process, if it still runs, and its own children."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if not self._said.closed:
            self._said.close()
            os.close(self._pipe)


def _flags() -> list[str]:
    """Those of this Python that decide where packages are found."""
    asked = {
        "-I": sys.flags.isolated,
        "-P": getattr(sys.flags, "safe_path", False),  # Python 3.11
        "-E": sys.flags.ignore_environment,
        "-s": sys.flags.no_user_site,
        "-S": sys.flags.no_site,
    }
    return [flag for flag, is_set in asked.items() if is_set]


def ask_stand_in() -> str:
    """Why cann_host cannot be used here, as it says it; "" if it can."""
    program = "import cann_host; cann_host.entries()"
    try:
        done = subprocess.run(
            [sys.executable, *_flags(), "-c", program],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it did not load within 60 s"
    if not done.returncode:
        return ""
    last = (done.stderr.strip().splitlines() or ["it cannot be loaded"])[-1]
    return last.partition("CannHostError: ")[2] or last
