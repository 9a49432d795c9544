"""The compiled CPU kernels with each instruction set that this processor has, or that a test can
emulate: native_bounds.cpp compares them bit by bit with plain loops, on buffers between unreadable
pages."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import lq_graph
from lq_graph.kernels import library
from support.native import needs_kernel

pytestmark = [pytest.mark.native, pytest.mark.slow, needs_kernel]

HERE = Path(__file__).parent
SOURCES = Path(lq_graph.__file__).parent / "kernels" / "csrc"
# as CMakeLists.txt
FLAGS = ["-std=c++17", "-fopenmp", "-ffp-contract=off", "-fwrapv", "-w", "-I", str(SOURCES)]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEED = 1

LOADED = library.loaded()
NAMES = library.instruction_sets()
# amx_emulator.cpp executes AMX's instructions; the others must be there.
EMULATED = [
    name for name in ("amx",) if LOADED and name in LOADED.sets and "avx512vnni" in LOADED.can
]


def compile_cpp(*arguments: object) -> Path:
    """Run the C++ compiler; the last argument is the file it makes."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *map(str, arguments[:-1]), "-o"]
    done = subprocess.run([*command, str(arguments[-1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(str(arguments[-1]))


def run(program: Path, name: str, step: int, count: int) -> str:
    """Every `step`-th size of the table, and `count` random calls."""
    command = [str(program), name, str(step), str(count), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.match(rf"{name}: (\d+) calls of the table, (\d+) random ones", done.stdout)
    assert counts is not None and int(counts[1]) > 1000 and int(counts[2]) >= count
    return done.stdout


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native_bounds.cpp, compiled."""
    try:
        subprocess.run([os.environ.get("CXX", "g++"), "--version"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no compiler")
    folder = tmp_path_factory.mktemp("bounds")
    return compile_cpp("-O3", "-c", HERE / "native_bounds.cpp", folder / "native_bounds.o")


@pytest.fixture(scope="module")
def with_the_library(golden: Path) -> Path:
    file = library.path()
    assert file is not None
    folder = f"-Wl,-rpath,{Path(file).parent}"
    return compile_cpp(golden, file, folder, golden.with_name("with_the_library"))


@pytest.fixture(scope="module")
def sanitized(golden: Path) -> Path:
    """The sources, with AddressSanitizer, which sees the kernels' own buffers, and
    UndefinedBehaviorSanitizer."""
    probe = golden.with_name("probe.cpp")
    probe.write_text("int main() {}")
    try:
        compile_cpp(*SANITIZERS, probe, golden.with_name("probe"))
    except AssertionError:
        pytest.skip("no compiler with sanitizers")
    names = dict.fromkeys([*NAMES, *EMULATED])
    defined = [f"-DLQ_HAS_{name}" for name in names]
    files = [SOURCES / "dispatch.cpp", *(SOURCES / "targets" / f"{name}.cpp" for name in names)]
    if EMULATED:
        defined.append("-DLQ_EMULATED_AMX")
        files.append(HERE / "amx_emulator.cpp")
    return compile_cpp("-O1", *SANITIZERS, *defined, golden, *files, golden.with_name("sanitized"))


@pytest.mark.parametrize("name", NAMES)
def test_exact_and_within_the_buffers(name: str, with_the_library: Path) -> None:
    run(with_the_library, name, 5, 1000)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EMULATED])
def test_sanitized(name: str, sanitized: Path) -> None:
    run(sanitized, name, 50, 250)


@pytest.mark.parametrize("name", EMULATED)
def test_emulated(name: str, sanitized: Path) -> None:
    """Without the instructions in the processor: each of them is a trap, so few calls."""
    executed = run(sanitized, name, 500, 50).splitlines()[-1].removeprefix("AMX: ").split()[0]
    assert int(executed) > 100_000
