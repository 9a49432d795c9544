"""cann_host as a runtime: devices, memory, streams, captured graphs, workers, the profiler, the end
of the process. Programs (tests/scripts) run in processes of their own, on the real torch_npu."""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cann_host
from cann_host import _native
from support.compiler import COMPILER, needs_compiler
from support.processes import SCRIPTS, output_of, python, run, script, start, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


# ---- options ----

BAD_OPTIONS = [
    (("--soc", "chip"), "soc is 'chip'; a chip is Ascend910B1 to B4"),
    (("--soc", "Ascend910B9"), "soc is 'Ascend910B9'; a chip is"),  # torch_npu has no such chip
    (("--soc", "Ascend910A"), "soc is 'Ascend910A'; a chip is"),  # no rules for it here
    (("--cann-version", "new"), "cann_version is 'new'; a CANN version is like 9.1.0 or 8.2.RC1"),
    (("--devices", "0"), "devices is '0'; it must be a number from 1 to 64"),
    (("--devices", "65"), "devices is '65'; it must be a number from 1 to 64"),
    (("--memory", "much"), "memory is 'much'; a size is like 8GiB, 512MiB or 1073741824"),
    (("--memory", "0"), "memory is '0'; a size is like"),
    (("--streams", "fast"), "streams is 'fast'; it must be now or late"),
    (("--overruns", "stop"), "overruns is 'stop'; it must be warn or refuse"),
    (("--fail", "aclrtMalloc"), "fail has 'aclrtMalloc'; a fault is SYMBOL:CODE or SYMBOL:CODE@N"),
    (("--fail", "aclrtMalloc:0"), "fail has 'aclrtMalloc:0'; a fault is"),
    (("--fail", "aclrtMalloc:1@0"), "fail has 'aclrtMalloc:1@0'; a fault is"),
    (("--fail", "aclrtMalloc:EZ9999"), "aclrtMalloc returns a number, such as 161002"),
]


@pytest.mark.parametrize(("options", "text"), BAD_OPTIONS, ids=lambda v: " ".join(v)[:30])
def test_a_wrong_option_is_one_sentence(options: tuple[str, ...], text: str) -> None:
    done = start("chips.py cann_version", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cann_host: ")
    assert text in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_wrong_variable_is_called_by_its_name() -> None:
    done = start("chips.py cann_version", CANN_HOST_DEVICES="two")
    assert "CANN_HOST_DEVICES is 'two'; it must be a number from 1 to 64" in done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("8GiB", 8 << 30), ("512MiB", 512 << 20), ("1.5G", 3 << 29), ("64 kb", 64 << 10), ("77", 77)],
)
def test_sizes(given: str, wanted: int) -> None:
    from cann_host.options import Options

    assert Options.of(memory=given).memory == wanted


@pytest.mark.slow
@pytest.mark.parametrize("version", ["8.1.RC1", "8.2.RC1", "8.5.0", "9.0.0.alpha1", "9.1.0"])
def test_cann_version(version: str) -> None:
    newer = version >= "8.5"
    said = run("chips.py cann_version", "--cann-version", version)
    assert said == f"{version} {version} {newer}\n"


SOCS = (
    "Ascend910B1",
    "Ascend910B4-1",
    "Ascend910_9363",
    "Ascend910_9391",
    "Ascend310P3",
    "Ascend310P7",
    "Ascend950PR_9579",
)


@pytest.mark.slow
@pytest.mark.parametrize("soc", SOCS)
def test_socs(soc: str) -> None:
    assert run("chips.py format_cast", "--soc", soc) == f"{soc} FRACTAL_NZ True\n"


# ---- devices and memory ----


def test_several_devices() -> None:
    assert run("devices.py several", "--devices", "3").splitlines() == [
        "3",
        "npu:1 npu:1 npu:0 True",
        "npu:1 npu:1",
        "npu:2 npu:2",
        "[True, True, False]",
        "no npu:3",
    ]


def test_a_memory_limit_is_a_real_out_of_memory() -> None:
    said = run("devices.py memory_limit", "--memory", "4GiB", "--devices", "2")
    assert said.splitlines() == ["True", "True True True", "True True", "True", "True"]


def test_pinned_memory() -> None:
    assert run("devices.py pinned_memory") == "True False True\n"


@pytest.mark.slow
def test_a_seed_decides_what_is_drawn() -> None:
    assert run("devices.py seeds") == "True True True\n"


# ---- streams, events, captured graphs ----

WAITS = [
    # streams, whether the program waits, what it reads before and after it synchronizes
    ("now", False, "65536 65536"),
    ("now", True, "65536 65536"),
    ("late", False, "0 0"),  # the mistake shows
    ("late", True, "0 65536"),
]


@pytest.mark.parametrize(("streams", "waits", "reads"), WAITS)
def test_late_streams_show_a_wait_that_was_forgotten(streams, waits, reads) -> None:
    assert run(f"streams.py forgotten_wait {waits}", "--streams", streams) == reads + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
def test_events(streams: str) -> None:
    assert run("streams.py events", "--streams", streams).splitlines() == [
        "True",
        f"True True {256.0**3} True",
        "done",
    ]


@pytest.mark.slow
def test_a_failure_of_late_work_is_told_to_the_one_who_waits() -> None:
    said = run("streams.py failure", "--streams", "late")
    assert said.splitlines() == ["launched", "told", "[1.0, 1.0, 1.0, 1.0]"]


@pytest.mark.parametrize("streams", ["now", "late"])
def test_captured_graph_over_two_streams(streams: str) -> None:
    said = run("captures.py two_streams", "--streams", streams)
    assert said.splitlines() == ["1.0 2.0", "5.0 5.0", "6.0 6.0", "refused", "24"]


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
def test_ordinary_operators_are_captured(streams: str) -> None:
    assert run("captures.py ordinary_operators", "--streams", streams) == "True True\n"


NOT_CAPTURED = {
    "torch.nonzero(x)": "aten.nonzero.default is not captured: the shape of its result depends on",
    "torch.randn_like(x)": "draws random numbers, which is not captured",
    "torch.add(x, 1, out=small)": "would resize out in a captured graph",
    "blocks.abs()": "of an internal format is not captured here",
    "one.item()": "the stream is being captured; nothing can wait for it",
}


def test_what_is_not_captured_says_why() -> None:
    said = run("captures.py not_captured " + shlex.join(NOT_CAPTURED)).splitlines()
    for line, text in zip(said, NOT_CAPTURED.values(), strict=True):
        assert text in line


GONE = {
    # what the graph does with memory that is given back before its replay: what is told
    "y.copy_(big)": "aclnnInplaceCopy: 67108864 bytes at",
    "y.add_(big)": "aten.add_.Tensor: a tensor that the graph uses is no longer allocated",
    "big.zero_()": "no longer allocated",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("streams", ["now", "late"])
def test_a_replay_on_memory_that_is_gone_is_an_error(what: str, streams: str) -> None:
    command = f"captures.py memory_that_is_gone '{what}'"
    said = run(command, "--streams", streams).splitlines()
    assert (said[0], said[-1]) == ("replayed", "True")
    assert GONE[what] in said[1]


def test_threads() -> None:
    for streams in ("now", "late"):
        assert run("streams.py threads", "--streams", streams) == "True\n"


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """benchmarks/soak.py, shorter, and that it would tell."""
    soak = Path(__file__).parents[2] / "benchmarks" / "soak.py"
    command = ["-m", "cann_host", str(soak), "--calls", "4000", "--runs", "400"]
    for bound, status, word in (("1", 0, "flat"), ("-1000", 1, "NOT FLAT")):
        done = python(*command, "--bound", bound)
        assert done.returncode == status, told(done)
        assert done.stdout.splitlines()[-1].startswith(word)
        command[-3:] = ["10", "--runs", "10"]


# ---- training, workers, profiler ----


def test_a_training_step_on_fallback_operators() -> None:
    assert run("training.py one_step") == "equal\n"


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_data_loader_workers(context: str) -> None:
    assert run(f"training.py workers {context}") == "[2, 10, 18, 26]\n"


@pytest.mark.slow
def test_a_spawned_process_has_the_same_options() -> None:
    said = run("devices.py spawned", "--soc", "Ascend910B4", "--devices", "2")
    assert said.splitlines() == ["('Ascend910B4', 2, [1.0, 1.0])", "0"]


@pytest.mark.slow
def test_torch_profiler() -> None:
    assert "True\n" in run("training.py profiler")


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
def test_a_child_forked_while_work_is_done_is_told_what_it_lacks() -> None:
    """Another thread does a stream's late work; in the child it stays undone."""
    found = run("forks.py unfinished", "--streams", "late").splitlines()
    assert "told" in found[0]
    assert found[-1] == "8.0"


# ---- torch_npu's task queue ----


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["1", "2"])
def test_launches_in_the_task_queue_need_no_interpreter_lock(queue: str) -> None:
    """torch_npu waits for its queue with the lock held, in torch.load onto the device say."""
    said = run("task_queue.py no_interpreter_lock", TASK_QUEUE_ENABLE=queue)
    assert said == "True True True\n"


QUEUE_FAILS = {
    # what fails: what the program is told at first
    "aclnnInplaceCopy:507015@3": "operator name is aclnnInplaceCopy",
    "aclnnInplaceCopyGetWorkspaceSize:161002@3": "",  # 1: at the call, 2: later
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", QUEUE_FAILS)
@pytest.mark.parametrize("queue", ["1", "2"])
def test_a_failure_in_the_task_queue_is_told_and_nothing_is_read_after_it(
    queue: str, fault: str
) -> None:
    """torch_npu drops what is launched after the failure it told."""
    said = run(f"task_queue.py failure {fault}", TASK_QUEUE_ENABLE=queue).splitlines()
    assert said[0].startswith("True True 30 ")
    if text := QUEUE_FAILS[fault]:
        assert text in said[0]
    at_the_call = queue == "1" and "GetWorkspaceSize" in fault
    assert said[1] == str(not at_the_call)


@pytest.mark.slow
def test_what_an_operator_refuses_in_the_task_queue_is_told_to_who_waits() -> None:
    for queue in ("1", "2"):
        assert run("task_queue.py refusal", TASK_QUEUE_ENABLE=queue) == "True\n8.0\n" * 2


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
def test_a_torch_npu_that_does_not_load_is_the_last_word(tmp_path) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = start("ends.py", PYTHONPATH=str(tmp_path), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "broken on purpose" in done.stderr.splitlines()[-1]
    assert "atexit" not in done.stderr


# ---- what it leaves alone ----


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


# ---- hostile calls ----


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    folder = _native.library_directory()
    assert folder is not None
    torch.zeros(1, device="npu")  # a device is chosen
    return _native.load(folder)


def last_error(library: ctypes.CDLL) -> str:
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library.aclGetRecentErrMsg().decode()


FAILING = [symbol for _, symbol, kind in cann_host.entries() if kind == "fails"]


@pytest.mark.parametrize("symbol", FAILING)
def test_what_is_not_implemented_fails_by_its_name(symbol: str, library) -> None:
    function = getattr(library, symbol)
    function.restype = ctypes.c_int64
    code = function() & 0xFFFFFFFF
    assert f"cann_host: {symbol} is not implemented" in last_error(library)
    returns_no_code = symbol.startswith(("acltdtCreate", "acltdtGet")) or "IsEnabled" in symbol
    assert code == 200006 or returns_no_code


def test_every_symbol_is_listed(library) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True
    )
    theirs = re.compile(r"(acl|Hccl|mspti|Msprof|rt[A-Z])\w*")
    exported = {line.split()[-1] for line in shown.stdout.splitlines()}
    symbols = {name for name in exported if theirs.fullmatch(name)}
    listed = {symbol for _, symbol, _ in cann_host.entries() if not symbol.startswith("ge.")}
    assert symbols == {name for name in listed if theirs.fullmatch(name)}


HANDLES = {
    "aclrtSynchronizeStream": "is no stream",
    "aclrtDestroyStream": "is no stream",
    "aclrtSynchronizeEvent": "is no event",
    "aclrtDestroyEvent": "is no event",
    "aclrtFree": "was not allocated here",
    "aclrtFreeHost": "was not allocated here",
    "aclmdlRIDestroy": "is no captured graph",
    "aclDestroyTensor": "was not made here",
    "aclDestroyIntArray": "was not made here",
    "aclDestroyScalar": "was not made here",
    "aclDestroyDataBuffer": "is nothing that was created here",
    "aclrtSetCurrentContext": "unknown context",
}


@pytest.mark.parametrize("symbol", HANDLES)
@pytest.mark.parametrize("handle", [1, 0x5A5A5A5A5A5A])
def test_a_handle_that_was_never_given(symbol: str, handle: int, library) -> None:
    assert getattr(library, symbol)(ctypes.c_void_p(handle)) != 0
    assert HANDLES[symbol] in last_error(library)


@pytest.mark.slow
def test_null_arguments_end_no_process() -> None:
    assert run("null_arguments.py all_null") == "True\n"


COPIES = {
    # direction of aclrtMemcpyKind: what overruns
    "to the device": 1,
    "to the host": 2,
    "in the device": 3,
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_stays_inside_what_was_allocated(kind: str, library) -> None:
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    host = ctypes.create_string_buffer(256)
    here = ctypes.c_void_p(ctypes.addressof(host))
    dst = here if kind == "to the host" else block
    src = here if kind == "to the device" else block

    def copy(count: int) -> int:
        size = ctypes.c_size_t(count)
        return library.aclrtMemcpy(dst, size, src, size, COPIES[kind])

    assert copy(64) == 0
    assert copy(65) == 100000
    assert "not all in memory that was allocated here" in last_error(library)
    assert library.aclrtMemset(block, ctypes.c_size_t(65), 0, ctypes.c_size_t(65)) == 100000
    assert library.aclrtFree(block) == 0


DESCRIPTORS = [
    # dims, strides, offset, storage, dtype, format: in 64 bytes
    ("fits", (4, 4), (4, 1), 0, (16,), 0, 2, True),
    ("one row too many", (5, 4), (4, 1), 0, (20,), 0, 2, False),
    ("offset", (4, 4), (4, 1), 1, (16,), 0, 2, False),
    ("negative offset", (1,), (1,), -1, (16,), 0, 2, False),
    ("negative dim", (-4, 4), (4, 1), 0, (16,), 0, 2, False),
    ("negative stride", (4, 4), (-4, 1), 0, (16,), 0, 2, False),
    ("overflowing dim", (1 << 62, 4), (4, 1), 0, (16,), 0, 2, False),
    ("overflowing stride", (3, 4), (1 << 62, 1), 0, (16,), 0, 2, False),
    ("wide dtype", (4, 4), (4, 1), 0, (16,), 9, 2, False),
    ("unknown dtype", (4, 4), (4, 1), 0, (16,), 99, 2, False),
    ("storage of blocks", (4, 4), (4, 1), 0, (1, 1, 16, 8), 0, 29, False),
]


@pytest.mark.parametrize("case", DESCRIPTORS, ids=lambda case: case[0])
def test_a_descriptor_stays_inside_what_was_allocated(case: tuple, library) -> None:
    _, dims, strides, offset, storage, dtype, acl_format, fits = case
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    library.aclCreateTensor.restype = ctypes.c_void_p
    numbers = [(ctypes.c_int64 * len(values))(*values) for values in (dims, strides, storage)]
    tensor = library.aclCreateTensor(
        numbers[0],
        ctypes.c_uint64(len(dims)),
        dtype,
        numbers[1],
        ctypes.c_int64(offset),
        acl_format,
        numbers[2],
        ctypes.c_uint64(len(storage)),
        block,
    )
    size, executor = ctypes.c_uint64(), ctypes.c_void_p()
    code = library.aclnnInplaceZeroGetWorkspaceSize(
        ctypes.c_void_p(tensor), ctypes.byref(size), ctypes.byref(executor)
    )
    assert code == (0 if fits else 161002), last_error(library)
    if fits:
        assert library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, None) == 0
    library.aclDestroyTensor(ctypes.c_void_p(tensor))
    assert library.aclrtFree(block) == 0


def test_an_executor_is_used_once_and_on_memory_that_is_there(library) -> None:
    library.aclCreateTensor.restype = ctypes.c_void_p
    eight = (ctypes.c_int64 * 1)(8)
    one = (ctypes.c_int64 * 1)(1)

    def prepared() -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        block, size, executor = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
        assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
        rank, offset = ctypes.c_uint64(1), ctypes.c_int64(0)
        made = library.aclCreateTensor(eight, rank, 9, one, offset, 2, eight, rank, block)
        tensor = ctypes.c_void_p(made)
        code = library.aclnnInplaceZeroGetWorkspaceSize(
            tensor, ctypes.byref(size), ctypes.byref(executor)
        )
        assert code == 0
        assert library.aclDestroyTensor(tensor) == 0
        assert library.aclDestroyTensor(tensor) == 161002  # twice
        return block, executor

    def launch(executor: ctypes.c_void_p) -> int:
        return library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, None)

    block, executor = prepared()
    assert launch(executor) == 0
    assert launch(executor) == 161001
    assert "without an executor of its own" in last_error(library)
    assert library.aclrtFree(block) == 0
    block, executor = prepared()
    assert library.aclrtFree(block) == 0
    assert launch(executor) == 161002
    assert "no longer allocated" in last_error(library)


def test_an_impossible_descriptor_is_none(library) -> None:
    library.aclCreateTensor.restype = ctypes.c_void_p
    assert (
        library.aclCreateTensor(
            None,
            ctypes.c_uint64(1 << 40),
            0,
            None,
            ctypes.c_int64(0),
            2,
            None,
            ctypes.c_uint64(0),
            None,
        )
        is None
    )
    assert "aclCreateTensor: 1099511627776 dims" in last_error(library)


SIZES = [
    # function, arguments after the first: code, what is said
    ("aclrtMalloc", [0, 0], 100000, "size 0"),
    ("aclrtMalloc", [(1 << 64) - 1, 0], 207001, "do not fit"),
    ("aclrtMalloc", [1 << 63, 0], 207001, "do not fit"),
    ("aclrtMallocAlign32", [(1 << 64) - 512, 0], 207001, "do not fit"),
    ("aclrtMallocHost", [(1 << 64) - 1], 207001, "the host has no 18446744073709551615 bytes left"),
    ("aclrtMallocHost", [(1 << 64) - 512], 207001, "the host has no"),
]


@pytest.mark.parametrize(("name", "more", "code", "text"), SIZES)
def test_a_size_that_cannot_be(name: str, more: list, code: int, text: str, library) -> None:
    place = ctypes.c_void_p()
    values = [ctypes.c_size_t(more[0]), *more[1:]]
    assert getattr(library, name)(ctypes.byref(place), *values) == code
    assert text in last_error(library)
    assert place.value is None


LENGTHS = [
    # bytes of the destination, bytes to copy, kind: whether 64 bytes to 64 bytes can be that
    (64, 64, 1, True),
    (64, 64, 4, True),  # by default the addresses decide
    ((1 << 64) - 1, (1 << 64) - 1, 1, False),
    (1 << 63, 1 << 63, 1, False),
    (64, (1 << 64) - 1, 1, False),
    (65, 65, 4, False),
    (64, 64, -1, False),
    (64, 64, 8, False),
]


@pytest.mark.parametrize(("room", "count", "kind", "fits"), LENGTHS)
@pytest.mark.parametrize("wait", ["", "Async"])
def test_a_length_that_cannot_be(room, count, kind, fits, wait: str, library) -> None:
    block = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(64), 0) == 0
    host = ctypes.create_string_buffer(64)
    stream = [None] if wait else []
    copy = getattr(library, f"aclrtMemcpy{wait}")
    given = block, ctypes.c_size_t(room), host, ctypes.c_size_t(count), kind
    assert copy(*given, *stream) == (0 if fits else 100000)
    if kind == 1:
        fill = getattr(library, f"aclrtMemset{wait}")
        code = fill(block, ctypes.c_size_t(room), 0, ctypes.c_size_t(count), *stream)
        assert code == (0 if fits else 100000)
    assert library.aclrtFree(block) == 0


# ---- memory that a captured graph refers to ----


def launch_copy(library, block, stream) -> int:
    size = ctypes.c_size_t(64)
    return library.aclrtMemcpyAsync(block, size, block, size, 3, stream)


def launch_set(library, block, stream) -> int:
    return library.aclrtMemsetAsync(block, ctypes.c_size_t(64), 1, ctypes.c_size_t(64), stream)


def launch_operator(library, block, stream) -> int:
    library.aclCreateTensor.restype = ctypes.c_void_p
    dims, one = (ctypes.c_int64 * 1)(16), (ctypes.c_int64 * 1)(1)
    rank = ctypes.c_uint64(1)
    made = library.aclCreateTensor(dims, rank, 0, one, ctypes.c_int64(0), 2, dims, rank, block)
    tensor, size, executor = ctypes.c_void_p(made), ctypes.c_uint64(), ctypes.c_void_p()
    code = library.aclnnInplaceZeroGetWorkspaceSize(
        tensor, ctypes.byref(size), ctypes.byref(executor)
    )
    library.aclDestroyTensor(tensor)
    return code or library.aclnnInplaceZero(None, ctypes.c_uint64(0), executor, stream)


def launch_collective(library, block, stream) -> int:
    root, comm = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    library.HcclGetRootInfo(root)
    library.HcclCommInitRootInfo(1, root, 0, ctypes.byref(comm))
    return library.HcclAllReduce(block, block, ctypes.c_uint64(16), 4, 0, comm, stream)


LAUNCHES = {
    "aclrtMemcpyAsync": launch_copy,
    "aclrtMemsetAsync": launch_set,
    "aclnnInplaceZero": launch_operator,
    "HcclAllReduce": launch_collective,
}


@pytest.mark.parametrize("symbol", LAUNCHES)
@pytest.mark.parametrize("then", ["gone", "another's"])
def test_a_replay_refuses_memory_that_is_not_what_it_was(symbol: str, then: str, library) -> None:
    block, stream, graph = (ctypes.c_void_p() for _ in range(3))
    size = ctypes.c_size_t(64)
    assert library.aclrtMalloc(ctypes.byref(block), size, 0) == 0
    assert library.aclrtCreateStream(ctypes.byref(stream)) == 0
    assert library.aclmdlRICaptureBegin(stream, 0) == 0
    assert LAUNCHES[symbol](library, block, stream) == 0
    assert library.aclmdlRICaptureEnd(stream, ctypes.byref(graph)) == 0
    assert library.aclmdlRIExecuteAsync(graph, stream) == 0
    assert library.aclrtFree(block) == 0
    again = []
    while then != "gone" and (not again or again[-1].value != block.value) and len(again) < 99:
        again.append(ctypes.c_void_p())
        assert library.aclrtMalloc(ctypes.byref(again[-1]), size, 0) == 0
    assert library.aclmdlRIExecuteAsync(graph, stream) != 0
    assert f"{symbol}: 64 bytes at" in last_error(library)
    assert "no longer allocated" in last_error(library)
    for one in again:
        assert library.aclrtFree(one) == 0
    assert library.aclmdlRIDestroy(graph) == 0
    assert library.aclrtDestroyStream(stream) == 0


# ---- null pointers ----


def parameters() -> dict[str, list[str]]:
    """The parameters of each of CANN's functions, as the sources declare them."""
    text = "".join(
        re.sub(r"//.*", "", path.read_text())
        for path in sorted((Path(cann_host.__file__).parent / "csrc").glob("*.cpp"))
    )
    found = {}
    listed = {symbol for _, symbol, kind in cann_host.entries() if kind != "fails"}
    for name, inside in re.findall(r"\n[\w :]+[ *]+(\w+)\(([^(){};]*)\) \{", text):
        if name in listed:
            names = [" ".join(one.split()) for one in inside.split(",")]
            found[name] = [one for one in names if one and one != "..."]
    return found


@pytest.mark.slow
def test_a_null_among_good_arguments_ends_no_process() -> None:
    """Each pointer of each function, null while the others point to something."""
    calls = parameters()
    launches = {s for _, s, _ in cann_host.entries() if f"{s}GetWorkspaceSize" in calls}
    for symbol in launches:  # written by a macro
        calls[symbol] = ["void*", "uint64_t", "aclOpExecutor* executor", "void* stream"]
    known = {symbol for _, symbol, kind in cann_host.entries() if kind != "fails"}
    assert {name for name in known if "." not in name} - set(calls) == set()
    done = start(f"null_arguments.py one_null {shlex.quote(json.dumps(calls))}")
    assert done.returncode == 0, done.stdout.splitlines()[-1:]
    assert done.stdout.count("\n") > 300
