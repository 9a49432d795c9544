"""The compiled CPU kernel with each instruction set that this processor has: native_bounds.cpp
compares it bit by bit with plain loops, on buffers that lie between unreadable pages."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import lq_graph
from lq_graph.kernels import native
from support.native import INSTRUCTION_SETS, needs_kernel

pytestmark = [pytest.mark.native, pytest.mark.slow, needs_kernel]

HERE = Path(__file__).parent
SOURCES = Path(lq_graph.__file__).parent / "kernels" / "csrc"
# as CMakeLists.txt
FLAGS = ["-std=c++17", "-fopenmp", "-ffp-contract=off", "-fwrapv", "-w", "-I", str(SOURCES)]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RANDOM_CALLS, SEED = 1000, 1

each_instruction_set = pytest.mark.parametrize(
    "name", [name for name, has in INSTRUCTION_SETS if has]
)


def compile_cpp(*arguments: object) -> Path:
    """Run the C++ compiler; the last argument is the file it makes."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *map(str, arguments[:-1]), "-o"]
    done = subprocess.run([*command, str(arguments[-1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(str(arguments[-1]))


def compile_kernels(*options: object) -> Path:
    """The same for the kernels' sources, with all instruction sets that the library has."""
    names = [name for name, _ in INSTRUCTION_SETS]
    targets = [SOURCES / "targets" / f"{name}.cpp" for name in names]
    defined = [f"-DLQ_HAS_{name}" for name in names]
    return compile_cpp(*defined, *options[:-1], SOURCES / "dispatch.cpp", *targets, options[-1])


def run(program: Path, name: str, step: int, count: int) -> None:
    """Every `step`-th size of the table, and `count` random calls."""
    command = [str(program), name, str(step), str(count), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} random ones" in done.stdout and done.stdout.startswith(f"{name}: ")


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
    library = native.library()
    assert library is not None
    folder = f"-Wl,-rpath,{Path(library).parent}"
    return compile_cpp(golden, library, folder, golden.with_name("with_the_library"))


@pytest.fixture(scope="module")
def sanitized(golden: Path) -> Path:
    """With AddressSanitizer, which sees the kernel's own buffers, and with UBSan."""
    probe = golden.with_name("probe.cpp")
    probe.write_text("int main() {}")
    try:
        compile_cpp(*SANITIZERS, probe, golden.with_name("probe"))
    except AssertionError:
        pytest.skip("no compiler with sanitizers")
    return compile_kernels("-O1", *SANITIZERS, golden, golden.with_name("sanitized"))


@each_instruction_set
def test_exact_and_within_the_buffers(name: str, with_the_library: Path) -> None:
    run(with_the_library, name, 5, RANDOM_CALLS)


@each_instruction_set
def test_sanitized(name: str, sanitized: Path) -> None:
    run(sanitized, name, 100, RANDOM_CALLS // 4)
