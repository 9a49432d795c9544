"""tests/fuzz: its corpus, and new inputs for some seconds, under the sanitizers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cann_host
from support.processes import output_of, python, told

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.slow,
    pytest.mark.native,
]

FUZZ = Path(__file__).parents[1] / "fuzz"


def test_malformed_inputs_are_refused_or_computed(tmp_path: Path, tally) -> None:
    options = ["--seconds", "8", "--seed", "0", "--crashes", str(tmp_path)]
    done = python(FUZZ / "run.py", *options, CANN_HOST_FAIL="")
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, told(done)
    found = re.findall(r"^(\w+) +([\d,]+) inputs +([\d,]+) accepted", done.stdout, re.M)
    counts = {kind: [int(n.replace(",", "")) for n in numbers] for kind, *numbers in found}
    files = [path for path in (FUZZ / "corpus").iterdir() if path.suffix in (".pb", ".json")]
    assert counts["corpus"][0] == len(files) >= 20
    for inputs, accepted in counts.values():
        assert accepted > inputs // 10  # they get past the first check
        tally("malformed graphs and calls under the sanitizers", inputs)


def test_valid_calls_of_every_operator_are_accepted() -> None:
    said = output_of(python(FUZZ / "accepted.py", "--calls", "20"))
    assert said.splitlines()[-1].endswith(" 0 never accepted"), said


def test_the_same_seed_makes_the_same_inputs() -> None:
    said = output_of(python(FUZZ / "same_seed.py"))
    assert said.splitlines() == ["True True", "True True"]


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
    preload = " ".join(sanitized.runtime())
    done = python(FUZZ / "beyond.py", folder, str(beyond), LD_PRELOAD=preload, **ENVIRONMENT)
    assert (done.returncode != 0) == bool(beyond), done.stderr
    assert ("AddressSanitizer: SEGV" in done.stderr) == bool(beyond)
