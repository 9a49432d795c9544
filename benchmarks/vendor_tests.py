"""Runs the vendor's own public tests on cann_host, from your own checkouts.

    python benchmarks/vendor_tests.py --op-plugin DIR --pytorch DIR --torchair DIR

Each test file runs in its own process, in an empty folder, with a time limit. It prints how many
tests passed, failed and were skipped, and of each failure the reason and its kind (`CAUSES`). The
exit status is 1 if the interpreter crashed or a file ran out of time; with --strict also if a test
failed.

Many tests of op-plugin are skipped until CANN is newer. The stand-in's CANN is new: --unskip runs
those too, but not the tests for another chip.

The tests need `pip install einops expecttest pyyaml ml_dtypes en_dtypes`; the extra `test` installs
pytest.
"""

from __future__ import annotations

import argparse
import os
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

# The tests of quantized matmuls, their parameters, formats and graphs, and of the operators of a
# decoder: attention, rotary embeddings, cache updates, fused norms and activations.
FILES = {
    "op-plugin": (
        "test/**/test_npu_quant_matmul.py",
        "test/**/test_npu_trans_quant_param.py",
        "test/**/test_npu_quantize.py",
        "test/**/test_npu_dynamic_quant.py",
        "test/**/test_npu_rms_norm.py",
        "test/**/test_quantize_per_*.py",
        "test/**/test_format_cast.py",
        "test/**/test_native_format_print.py",
        "test/**/test_npu_fused_infer_attention_score*.py",
        "test/**/test_prompt_flash_attention.py",
        "test/**/test_incre_flash_attention.py",
        "test/**/test_npu_flash_attention*.py",
        "test/**/test_scaled_dot_product_attention.py",
        "test/**/test_npu_apply_rotary_pos_emb.py",
        "test/**/test_npu_rotary_mul*.py",
        "test/**/test_npu_mrope.py",
        "test/**/test_npu_scatter_nd_update.py",
        "test/**/test_npu_scatter_pa_cache.py",
        "test/**/test_scatter_pa_kv_cache.py",
        "test/**/test_npu_kv_rms_norm_rope_cache.py",
        "test/**/test_npu_add_rms_norm*.py",
        "test/**/test_npu_rms_norm_quant.py",
        "test/**/test_npu_dequant_swiglu_quant.py",
        "test/**/test_npu_swi_glu*.py",
        "test/**/test_npu_swiglu_quant.py",
        "test/**/test_npu_prefetch.py",
    ),
    "pytorch": (
        "test/contrib/test_linear_quant.py",
        "test/contrib/test_linear_a8w8_quant.py",
        "test/custom_ops/test_npu_format_cast.py",
        "test/npu/test_npu_format.py",
        "test/npu/test_cann_version.py",
        "test/npu/test_copy.py",
    ),
    "torchair": (
        "tests/smoke/converter_test.py",
        "tests/smoke/ge_test.py",
        "tests/smoke/aclgraph_test.py",
        "tests/smoke/cache_compile_test.py",
        "tests/smoke/ge_optimize_and_convert_test.py",
    ),
}
# torchair's test of its converters is one test that never fails: it prints the result of each case
# that the converters declare. The cases with such a prefix are run.
CONVERTERS = "converter_test.py"
PREFIXES = (
    "npu.npu_quant_matmul",
    "npu.npu_trans_quant_param",
    "npu.npu_dynamic_quant.default",
    "npu.npu_quantize",
    "npu.npu_rms_norm.default",
    "npu.npu_prompt_flash_attention",
    "npu.npu_incre_flash_attention",
    "npu.npu_rotary_mul",
    "npu.npu_add_rms_norm",
    "npu.npu_swiglu",
    "npu.npu_prefetch",
    "aten.add.",
    "aten.mul.",
    "aten.mm.",
    "aten.bmm.",
    "aten._to_copy",
    "aten.view",
)
# Why a test fails, by its text: the first that matches.
NOT_HERE = "not in cann_host"
CAUSES = (
    ("drawn in a captured graph", r"draws random numbers, which is not captured"),
    (
        "another chip's or an unreleased CANN's",
        r"Current CANN version do not support this api|does not compute .* of Ascend950",
    ),
    (
        NOT_HERE,
        r"cann_host: |cann_host (does not|computes|takes|refuses)|; cann_host does|"
        r"not in libopapi|[Ff]ailed to (find function|load Get)|find optype \w+ failed|"
        r"AclopStartDumpArgs",
    ),
    ("CANN refuses it too", r"\(CANN error \d+"),
    (
        "not in the installed torch_npu, torchair or PyTorch",
        r"has no attribute '(?!numpy)|cannot import name|takes \d+ positional arguments?|"
        r"Can not find stream|Unhandled args for method",
    ),
    (
        "PyTorch's or torch_npu's own check",
        r"expected scalar type|empty_quantized|expects a Float Tensor|only works on Float Tensor|"
        r"should be consistent|should equal to query|transpose are not same|resultValue: NCHW",
    ),
)
OTHERS = "the numbers that the test compares with, or the test"


@dataclass
class Outcome:
    """The result of one file."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    crash: str = ""  # why the file has no results
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # kind, text

    def fail(self, text: str) -> None:
        found = (kind for kind, pattern in CAUSES if re.search(pattern, text))
        self.reasons[next(found, OTHERS), _reason(text)] += 1


# A plugin of pytest
UNSKIP = "import unittest\nunittest.skip = lambda reason: lambda test: test\n"


def run(file: Path, options: list[str], limit: float, *, unskip: bool = False) -> Outcome:
    """Run one test file."""
    outcome = Outcome()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        program = [sys.executable, "-m", "cann_host", *options]
        if file.name == CONVERTERS:
            for prefix in PREFIXES:
                _count_lines(_start([*program, str(file), prefix], folder, limit, outcome), outcome)
        else:
            pytest = ["-m", "pytest", "-q", f"--rootdir={file.parent}", "-p", "no:cacheprovider"]
            if unskip:
                (Path(folder) / "unskip.py").write_text(UNSKIP)
                pytest += ["-p", "unskip"]
            command = [*program, *pytest, f"--junitxml={results}", str(file)]
            output = _start(command, folder, limit, outcome)
            if results.exists():
                _count(results, outcome)
            elif not outcome.crash:
                last = [line for line in output.splitlines() if line.strip()]
                outcome.crash = f"did not run: {last[-1][:90] if last else 'no output'}"
    outcome.seconds = time.monotonic() - start
    return outcome


def _start(command: list[str], folder: str, limit: float, outcome: Outcome) -> str:
    """The output of a program; if it failed, the outcome gets the reason."""
    with (Path(folder) / "output.txt").open("w+", errors="replace") as output:
        try:
            code = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": folder},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = 0
            outcome.crash = f"no end within {limit:g} s"
        if code < 0:
            outcome.crash = f"crashed: {signal.Signals(-code).name}"
        output.seek(0)
        return output.read()


def _count_lines(output: str, outcome: Outcome) -> None:
    """Count the cases of torchair's test of its converters."""
    outcome.passed += len(re.findall(r"^\[PASS\] ", output, re.MULTILINE))
    failure = re.compile(r"^FAILED \[.*?^Error: (.*?)(?=^-{20}$|^Test result)", re.M | re.S)
    failures = failure.findall(output)
    failed = len(re.findall(r"^\[FAILED\] ", output, re.MULTILINE))
    outcome.failed += failed
    for text in [*failures, *[""] * (failed - len(failures))]:
        outcome.fail(text)


def _count(results: Path, outcome: Outcome) -> None:
    for case in ElementTree.parse(results).iter("testcase"):
        wrong = next((e for e in case if e.tag in ("failure", "error")), None)
        if wrong is not None:
            outcome.failed += 1
            text = f"{wrong.get('message') or ''}\n{wrong.text or ''}"
            outcome.fail(text)
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1


def _reason(text: str) -> str:
    """The most useful line: what is missing, else the first error that does not wrap another."""
    lines = [line.removeprefix("E ").strip() for line in text.splitlines() if line.strip()]
    lines = [re.sub(r"0x[0-9a-f]+", "0x..", line) for line in lines]
    wrapper = re.compile(r"BackendCompilerFailed|collection failure")
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Unsupported)\b", line)]
    found = [line for line in lines if re.match(r"op type \w+, node", line)]
    found += [line for line in lines for _, pattern in CAUSES[:4] if re.search(pattern, line)]
    found += [line for line in errors if not wrapper.search(line)] + lines + ["no reason"]
    # without the folders of this machine
    return re.sub(r"/\S+/", ".../", found[0])[:150]


def _files(checkout: Path, name: str, only: str | None) -> Iterator[Path]:
    patterns = (only,) if only else FILES[name]
    seen: set[Path] = set()
    for pattern in patterns:
        seen |= {path for path in checkout.glob(pattern) if path.is_file()}
    # a test that exists for several torch versions runs once: the last in order of folders
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
    parser.add_argument("--unskip", action="store_true", help="also tests that wait for CANN")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one file")
    parser.add_argument("--strict", action="store_true", help="a failed test fails the run")
    args = parser.parse_args()
    given = {name: getattr(args, name.replace("-", "_")) for name in FILES}
    if not any(given.values()):
        parser.error("give the folder of a checkout, such as --op-plugin DIR")

    head = f"{'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"
    total, reasons, crashed = Counter[str](), Counter[tuple[str, str]](), 0
    print(f"cann_host as {args.soc}")
    for name, checkout in given.items():
        if checkout is None:
            continue
        print(f"\n{name} {_revision(checkout)}\n  {'file':58} {head}")
        for file in _files(checkout, name, args.file):
            options = ["--soc", args.soc, "--devices", "2"]
            outcome = run(file, options, args.timeout, unskip=args.unskip)
            numbers = (outcome.passed, outcome.failed, outcome.skipped)
            cells = "{:>7} {:>7} {:>8}".format(*numbers)
            line = f"  {file.name:58} {cells} {outcome.seconds:>8.0f} {outcome.crash}"
            print(line.rstrip(), flush=True)
            total.update(dict(zip(("passed", "failed", "skipped"), numbers, strict=True)))
            reasons.update(outcome.reasons)
            crashed += bool(outcome.crash)
    print("\n" + ", ".join(f"{count} {what}" for what, count in total.items()))
    print(f"{crashed} files without results")
    kinds = Counter[str]()
    for (kind, _), count in reasons.items():
        kinds[kind] += count
    for kind, whole in kinds.most_common():
        print(f"\n{whole} failed: {kind}")
        for (_, reason), count in Counter(
            {key: count for key, count in reasons.items() if key[0] == kind}
        ).most_common():
            print(f"  {count:4}  {reason}")
    return int(crashed > 0 or (args.strict and total["failed"] > 0))


if __name__ == "__main__":
    sys.exit(main())
