"""The vendor's own public tests on cann_host, from checkouts of your own.

    python benchmarks/vendor_tests.py --op-plugin DIR --pytorch DIR --torchair DIR

Each test file runs in a process of its own, in an empty folder, with a time limit. What is printed is
what passed, failed and was skipped, how many failures say that the stand-in does not have something
("not here"), and the first line of every reason. The exit status is 1 if the interpreter crashed or a
file ran out of time; with --strict also if a test failed.

The tests want `pip install expecttest pyyaml`; pytest is there with lq-graph[test].
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What is about quantized matmuls, their parameters, formats and graphs.
FILES = {
    "op-plugin": (
        "test/**/test_npu_quant_matmul.py",
        "test/**/test_npu_trans_quant_param.py",
        "test/**/test_npu_quantize.py",
        "test/**/test_npu_dynamic_quant.py",
        "test/**/test_npu_rms_norm.py",
        "test/**/test_format_cast.py",
        "test/**/test_native_format_print.py",
        "test/v2r13_ops/test_quantize_per_*.py",
    ),
    "pytorch": (
        "test/contrib/test_linear_quant.py",
        "test/contrib/test_linear_a8w8_quant.py",
        "test/custom_ops/test_npu_format_cast.py",
        "test/npu/test_npu_format.py",
    ),
    "torchair": (
        "tests/smoke/converter_test.py",
        "tests/smoke/ge_test.py",
        "tests/smoke/aclgraph_test.py",
        "tests/smoke/cache_compile_test.py",
        "tests/smoke/ge_optimize_and_convert_test.py",
    ),
}
# How a failure says that something is not here.
NOT_HERE = re.compile(r"cann_host|not in libopapi|Failed to find function|No AscendIR|is not found")


@dataclass
class Outcome:
    """What one file came to."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    not_here: int = 0
    seconds: float = 0.0
    crash: str = ""  # why the file has no results
    reasons: Counter[str] = field(default_factory=Counter)


def run(file: Path, soc: str, limit: float) -> Outcome:
    """Run one test file."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "cann_host", "--soc", soc, "-m", "pytest", "-q"]
        command += [f"--rootdir={file.parent}", "-p", "no:cacheprovider", f"--junitxml={results}"]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, str(file)], cwd=folder, capture_output=True, text=True, timeout=limit
            )
            code, output = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired:
            code, output = None, ""
        outcome.seconds = time.monotonic() - start
        if code is None:
            outcome.crash = f"no end within {limit:g} s"
        elif code < 0:
            outcome.crash = f"crashed: {signal.Signals(-code).name}"
        elif not results.exists():
            last = [line for line in output.splitlines() if line.strip()]
            outcome.crash = f"did not run: {last[-1][:90] if last else f'exit {code}'}"
        else:
            _count(results, outcome)
    return outcome


def _count(results: Path, outcome: Outcome) -> None:
    for case in ElementTree.parse(results).iter("testcase"):
        wrong = next((e for e in case if e.tag in ("failure", "error")), None)
        if wrong is not None:
            outcome.failed += 1
            text = (wrong.get("message") or "") + (wrong.text or "")
            outcome.not_here += bool(NOT_HERE.search(text))
            outcome.reasons[_reason(text)] += 1
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1


def _reason(text: str) -> str:
    """The line that says most: what is not here, else the first."""
    lines = [line.removeprefix("E ").strip() for line in text.splitlines() if line.strip()]
    lines = [re.sub(r"0x[0-9a-f]+", "0x..", line) for line in lines]
    found = next((line for line in lines if NOT_HERE.search(line)), None)
    return (found or next(iter(lines), "no reason"))[:110]


def _files(checkout: Path, name: str, only: str | None) -> Iterator[Path]:
    patterns = (only,) if only else FILES[name]
    seen: set[Path] = set()
    for pattern in patterns:
        seen |= {path for path in checkout.glob(pattern) if path.is_file()}
    # of tests for many torch versions, each of the same name once: the newest comes last
    yield from sorted({path.name: path for path in sorted(seen)}.values())


def _revision(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "no git"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"checkout of {name}")
    parser.add_argument("--file", help="a glob inside the checkout, in place of the list")
    parser.add_argument("--soc", default="Ascend910B2", help="the chip to report")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one file")
    parser.add_argument("--strict", action="store_true", help="a failed test fails the run")
    args = parser.parse_args()
    given = {name: getattr(args, name.replace("-", "_")) for name in FILES}
    if not any(given.values()):
        parser.error("give the folder of a checkout, such as --op-plugin DIR")

    head = f"{'passed':>7} {'failed':>7} {'not here':>9} {'skipped':>8} {'seconds':>8}"
    total, reasons, crashed = Counter[str](), Counter[str](), 0
    print(f"cann_host as {args.soc}")
    for name, checkout in given.items():
        if checkout is None:
            continue
        print(f"\n{name} {_revision(checkout)}\n  {'file':36} {head}")
        for file in _files(checkout, name, args.file):
            outcome = run(file, args.soc, args.timeout)
            numbers = (outcome.passed, outcome.failed, outcome.not_here, outcome.skipped)
            cells = "{:>7} {:>7} {:>9} {:>8}".format(*numbers)
            print(f"  {file.name:36} {cells} {outcome.seconds:>8.0f} {outcome.crash}", flush=True)
            total.update(
                dict(zip(("passed", "failed", "not here", "skipped"), numbers, strict=True))
            )
            reasons.update(outcome.reasons)
            crashed += bool(outcome.crash)
    print("\n" + ", ".join(f"{count} {what}" for what, count in total.items()))
    print(f"{crashed} files without results")
    if reasons:
        print("\nwhy tests failed")
    for reason, count in reasons.most_common():
        print(f"  {count:4}  {reason}")
    return int(crashed > 0 or (args.strict and total["failed"] > 0))


if __name__ == "__main__":
    sys.exit(main())
