"""Signals, forks, the end of a process, and what cann_host does not change."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cann_host
from cann_host import _native
from support.compiler import COMPILER, needs_compiler
from support.processes import SCRIPTS, output_of, python, run, script, start, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


# ---- signals and exceptions in Python that the library calls ----

# where Python is called from C++: what the program has computed afterwards
CALLED = {"operator": 8.0, "graph": 16.0, "replay": 8.0}

INTERRUPTED = ("KeyboardInterrupt", "SystemExit 3", "TimeoutError now")


@pytest.mark.slow
def test_an_interrupt_is_the_programs_and_the_work_is_done() -> None:
    assert run("interrupts.py in_the_middle").splitlines() == [
        f"{name} {error} {total}"
        for name, total in CALLED.items()
        for error in INTERRUPTED
        for _ in range(3)
    ]


@pytest.mark.slow
def test_an_exception_that_is_none_of_errors_comes_out_as_it_is() -> None:
    """Raised in there, not by a signal: the call fails, and the exception follows at once."""
    lines = [line for line in run("interrupts.py exceptions").splitlines() if line != "True"]
    assert lines == [
        "SystemExit(4) RuntimeError",
        "GeneratorExit('x') RuntimeError",
        "KeyboardInterrupt() RuntimeError",
        "8.0",
    ]


@pytest.mark.slow
def test_no_interrupt_is_lost_wherever_it_comes() -> None:
    assert run("interrupts.py anywhere").strip() == "400"


# ---- forks ----


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """turns.cpp, built."""
    built = tmp_path_factory.mktemp("turns") / "turns.so"
    command = [str(COMPILER), "-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(SCRIPTS / "turns.cpp"), "-o", str(built)], check=True)
    return built


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("queue", "streams"), [("0", "now"), ("0", "late"), ("1", "now"), ("2", "now")]
)
def test_a_child_forked_while_threads_are_in_the_library_goes_on(
    queue: str, streams: str, turns: Path
) -> None:
    command = f"forks.py busy {turns} {queue}"
    assert run(command, "--streams", streams, TASK_QUEUE_ENABLE=queue) == "{'524288.0'}\n"


@pytest.mark.slow
def test_a_child_forked_during_late_work_gets_an_error() -> None:
    """Another thread does a stream's late work; in the child it stays undone."""
    found = run("forks.py unfinished", "--streams", "late").splitlines()
    assert "told" in found[0]
    assert found[-1] == "8.0"


# ---- the end of the process ----

ENDS: dict[str, int | None] = {
    # what ends.py does last: its exit code
    "live tensors": 0,
    "tensors gone first": 0,
    "work on a stream": 0,
    "captured graph": 0,
    "captured graph, replayed": 0,
    "captured graph, gone after its tensors": 0,
    "capture left open": 0,
    "compiled graph": 0,
    "compiled graph, gone before": 0,
    "sys.exit": 3,
    "os._exit": 4,
    "exception": 1,
    "KeyboardInterrupt": -2,
    "KeyboardInterrupt while a thread works": -2,
    "sys.exit and exceptions in threads": 0,
    "captured graph of ordinary operators": 0,
    "use at exit": 0,
    "use at exit, made there": 0,
    "daemon thread at work": None,  # PyTorch itself ends the process then, on a CPU too
    "finalizer": 0,
    "empty cache": 0,
    "emptied twice": 0,
}

WITH_WORK_LEFT = (
    "work on a stream",
    "captured graph, replayed",
    "captured graph of ordinary operators",
    "compiled graph",
    "use at exit",
    "daemon thread at work",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "streams"),
    [(what, "now") for what in ENDS] + [(what, "late") for what in WITH_WORK_LEFT],
)
def test_a_clean_end(what: str, streams: str) -> None:
    done, code = start(f"ends.py '{what}'", "--streams", streams), ENDS[what]
    assert code is None or done.returncode == code, told(done)
    assert code is None or not re.search(
        r"Fatal|terminate called|Segmentation|core dumped", done.stderr
    )


@pytest.mark.slow
def test_the_last_line_is_the_error_of_torch_npu(tmp_path) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = start("ends.py", PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr.splitlines()[-1]
    assert "atexit" not in done.stderr


# ---- what it does not change ----


@pytest.mark.slow
def test_nothing_is_written_and_nothing_connects(tmp_path: Path) -> None:
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir(), cwd.mkdir()
    command, places = script("connects_nothing.py"), {"HOME": str(home), "TMPDIR": str(home)}
    assert output_of(python("-m", "cann_host", *command, cwd=cwd, **places)) == "[2.0, 2.0] []\n"
    # the one folder is torch's own
    assert {item.name.partition("_")[0] for item in home.iterdir()} <= {"torchinductor"}
    assert not [item for item in tmp_path.rglob("*") if item.is_file()]


def test_libraries_come_by_absolute_path_and_start_nothing(library) -> None:
    assert Path(library._name).is_absolute()
    assert [Path(library._name)] == _native.loaded_libraries("libcann_host.so")
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    shown = subprocess.run(
        ["nm", "-D", "--undefined-only", library._name], capture_output=True, text=True, check=True
    )
    wanted = {line.split()[-1].partition("@")[0] for line in shown.stdout.splitlines()}
    assert "dlsym" in wanted
    assert not wanted & {"system", "execve", "fork", "getaddrinfo", "gethostbyname"}
    # the sockets are HCCL's, between processes of one machine
    sources = Path(cann_host.__file__).parent.glob("csrc/*.cpp")
    assert [path.name for path in sources if "socket(" in path.read_text()] == ["hccl_group.cpp"]
    assert "AF_INET" not in (Path(cann_host.__file__).parent / "csrc/hccl_group.cpp").read_text()
