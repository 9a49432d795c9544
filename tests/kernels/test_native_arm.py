"""The compiled CPU kernel for aarch64, in an emulator: native_bounds.cpp compares each instruction
set bit by bit with plain loops, on buffers that lie between unreadable pages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import lq_graph
from support.processes import LIMIT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SOURCES = Path(lq_graph.__file__).parent / "kernels" / "csrc"
# as CMakeLists.txt
FLAGS = ["-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-fwrapv", "-Wno-psabi"]
NAMES = ["neon_i8mm", "neon_dot"]
# every STEP-th size of the table, and random calls
STEP, COUNT = 50, 300

pytestmark = [
    pytest.mark.native,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"no {COMPILER}, or no {EMULATOR}",
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("arm") / "native_bounds"
    sources = [
        Path(__file__).with_name("native_bounds.cpp"),
        SOURCES / "dispatch.cpp",
        *(SOURCES / "targets" / f"{name}.cpp" for name in NAMES),
    ]
    defined = [f"-DLQ_HAS_{name}" for name in NAMES]
    command = [COMPILER, *FLAGS, *defined, f"-I{SOURCES}", *map(str, sources)]
    done = subprocess.run(
        [*command, "-static", "-o", str(result)], capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    return result


def run(program: Path, processor: str, name: str) -> subprocess.CompletedProcess[str]:
    command = [EMULATOR, "-cpu", processor, str(program), name, str(STEP), str(COUNT)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)


@pytest.mark.parametrize(("processor", "name"), [("max", "neon_i8mm"), ("neoverse-n1", "neon_dot")])
def test_exact_and_within_the_buffers(program: Path, processor: str, name: str) -> None:
    done = run(program, processor, name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{name}: ") and f"{COUNT} random ones" in done.stdout


@pytest.mark.parametrize(
    ("processor", "name"),
    [("neoverse-n1", "neon_i8mm"), ("cortex-a72", "neon_i8mm"), ("cortex-a72", "neon_dot")],
)
def test_a_processor_without_it(program: Path, processor: str, name: str) -> None:
    done = run(program, processor, name)
    assert done.returncode == 1
    assert done.stdout == f"this processor does not have it: {name}\n"
