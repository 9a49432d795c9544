"""Sends malformed graphs and operator calls to cann_host under AddressSanitizer and
UndefinedBehaviorSanitizer:

    python tests/fuzz/run.py --seconds 120 --seed 1

Each input must be computed, or refused with a text. An input that ends the process, hangs, reads
outside an allocation or is refused without a text is a failure, and is saved in --crashes. The
inputs of corpus/ come first, without changes: graphs of real models (*.pb), calls (*.json), and
every input that was a failure before. `--replay FILE...` runs only these files.

The native libraries are built with the sanitizers; the real Python half of cann_host, torch,
torch_npu and torchair run in the same process, uninstrumented, on device memory between pages that
may not be touched. The same seed makes the same inputs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import sanitized
from worker import HEAD, MOST_BYTES

HERE = Path(__file__).parent
SUFFIX = {"graphs": "pb", "calls": "json"}
SKIPPED = 77  # exit status where the compiler has no sanitizers
HANGS_AFTER = 30.0  # seconds with one input
STARTS_AFTER = 180.0  # seconds until the first one, on a busy machine
ENVIRONMENT = {
    # torch and Python keep memory to the end; what is too large is an error, as on a full machine
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONFAULTHANDLER": "",
}


@dataclass
class Tally:
    """The results of the inputs of one kind."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: int = 0


class Fuzz:
    """One run: its folders for the build and for failures."""

    def __init__(self, folder: Path, crashes: Path, seed: int) -> None:
        self.folder, self.crashes, self.seed = folder, crashes, seed
        self.preload = " ".join(sanitized.runtime())

    def work(self, kind: str, tally: Tally, *arguments: str) -> bool:
        """Run a worker process. Returns whether it finished."""
        with tempfile.NamedTemporaryFile() as state, tempfile.TemporaryFile() as errors:
            state.write(bytes(HEAD.size) + bytes(MOST_BYTES))
            state.flush()
            command = [sys.executable, str(HERE / "worker.py"), kind, str(self.folder), state.name]
            environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": self.preload}
            process = subprocess.Popen([*command, *arguments], stderr=errors, env=environment)
            status = self._wait(process, state.name)
            content = Path(state.name).read_bytes()
            number, accepted, refused, length, seconds = HEAD.unpack_from(content)
            tally.seconds += seconds
            tally.inputs += accepted + refused
            tally.accepted += accepted
            tally.refused += refused
            if status == 0:
                return True
            if not length:
                errors.seek(0)
                raise SystemExit(f"the worker did not start:\n{errors.read().decode()}")
            tally.inputs += 1
            tally.failures += 1
            data = content[HEAD.size : HEAD.size + length]
            self.crashes.mkdir(parents=True, exist_ok=True)
            kept = self.crashes / f"{kind}-{self.seed}-{number}.{SUFFIX[kind]}"
            kept.write_bytes(data)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            kept.with_suffix(".txt").write_text(text)
            print(f"FAILURE: exit status {status}, input kept as {kept}\n{_gist(text)}", flush=True)
            self.next = number + 1
            return False

    def _wait(self, process: subprocess.Popen[bytes], state: str) -> int | str:
        seen, since = b"", time.time()
        while True:
            try:
                return process.wait(1.0)
            except subprocess.TimeoutExpired:
                now = Path(state).read_bytes()[: HEAD.size]
                if now != seen:
                    seen, since = now, time.time()
                limit = HANGS_AFTER if any(now) else STARTS_AFTER
                if now == seen and time.time() - since > limit:
                    process.kill()
                    process.wait()
                    return f"none after {limit:.0f} s"

    def replay(self, files: list[Path], *arguments: str) -> Tally:
        total = Tally()
        for kind, suffix in SUFFIX.items():
            left = [str(path) for path in files if path.suffix == f".{suffix}"]
            while left:
                if self.work(kind, total, *arguments, "--replay", *left):
                    break
                left = left[self.next :]
        return total

    def burst(self, kind: str, seconds: float) -> Tally:
        total = Tally()
        self.next = 0
        while total.seconds < seconds:
            left = seconds - total.seconds
            arguments = ["--seed", self.seed, "--first", self.next, "--seconds", left]
            if self.work(kind, total, *map(str, arguments)):
                break
        return total


def _gist(text: str) -> str:
    """The lines that say what happened."""
    lines = text.splitlines()
    marks = ("ERROR: ", "runtime error", "fuzz:", "Fatal")
    first = next((i for i, line in enumerate(lines) if any(m in line for m in marks)), -12)
    return "\n".join(lines[first:][:14])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of new inputs, in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, nargs="*", help="files to run, and nothing else")
    parser.add_argument("--build", type=Path, default=sanitized.ROOT / "build" / "fuzz")
    parser.add_argument("--crashes", type=Path, default=sanitized.ROOT / "build" / "crashes")
    options = parser.parse_args()
    try:
        sanitized.build(options.build)
    except sanitized.NoSanitizersError as error:
        print(f"not run: {error}")
        return SKIPPED
    fuzz = Fuzz(options.build, options.crashes, options.seed)
    tallies = {
        "corpus": fuzz.replay(options.replay, "--tell")
        if options.replay
        else fuzz.replay(sorted((HERE / "corpus").iterdir())),
    }
    if options.replay is None:
        for kind in SUFFIX:
            tallies[kind] = fuzz.burst(kind, options.seconds / len(SUFFIX))
    for name, tally in tallies.items():
        rate = tally.inputs / max(tally.seconds, 1e-9)
        print(
            f"{name:7} {tally.inputs:8,} inputs  {tally.accepted:8,} accepted  "
            f"{tally.refused:8,} refused  {tally.failures:3} failures  {rate:7,.0f}/s"
        )
    failures = sum(tally.failures for tally in tallies.values())
    print(f"seed {options.seed}: {'no failure' if not failures else f'{failures} failures'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
