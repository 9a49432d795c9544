"""tests/fuzz: its corpus, and new inputs for some seconds, under the sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cann_host

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")

FUZZ = Path(__file__).parents[1] / "fuzz"


def test_malformed_inputs_are_refused_or_computed(tmp_path: Path, tally) -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), "--seconds", "8", "--seed", "0"]
        + ["--crashes", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "CANN_HOST_FAIL": ""},
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(\w+) +([\d,]+) inputs +([\d,]+) accepted", done.stdout, re.M)
    counts = {kind: [int(n.replace(",", "")) for n in numbers] for kind, *numbers in found}
    files = [path for path in (FUZZ / "corpus").iterdir() if path.suffix in (".pb", ".json")]
    assert counts["corpus"][0] == len(files) >= 20
    for inputs, accepted in counts.values():
        assert accepted > inputs // 10  # they get past the first check
        tally("malformed graphs and calls under the sanitizers", inputs)


def test_the_same_seed_makes_the_same_inputs() -> None:
    script = """
import random, sys
sys.path.insert(0, sys.argv[1])
import cann_host; cann_host.activate()
import calls, graphs
for kind in (calls, graphs):
    target = kind.Target(cann_host.runtime.current().library)
    made = [[target.make(random.Random(f"1 {i}")) for i in range(20)] for _ in range(2)]
    print(made[0] == made[1], len(set(made[0])) > 10)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(FUZZ)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["True True", "True True"]


@pytest.mark.parametrize("beyond", [0, 1])
def test_one_byte_beyond_an_allocation_ends_the_process(beyond: int, monkeypatch) -> None:
    """In a kernel of torch's, which the sanitizers do not know."""
    monkeypatch.syspath_prepend(str(FUZZ))
    import sanitized
    from run import ENVIRONMENT

    folder = sanitized.ROOT / "build" / "fuzz"
    try:
        sanitized.build(folder)
    except sanitized.NoSanitizersError as error:
        pytest.skip(str(error))
    script = f"""
import sys
sys.path.insert(0, {str(FUZZ)!r})
import cann_host
cann_host.__path__.insert(0, {str(folder / "cann_host")!r})
cann_host.activate()
import calls, torch
from cann_host.memory import over_memory
torch.npu.set_device(0)
block, size = calls.Target(cann_host.runtime.current().library).blocks[2], calls.BLOCKS[2]
over_memory(block, torch.int8, (size + {beyond},)).sum()
"""
    environment = {**os.environ, **ENVIRONMENT, "LD_PRELOAD": " ".join(sanitized.runtime())}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert (done.returncode != 0) == bool(beyond), done.stderr
    assert ("AddressSanitizer: SEGV" in done.stderr) == bool(beyond)
