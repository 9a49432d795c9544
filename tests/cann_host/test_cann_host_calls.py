"""Calls of CANN's functions that no torch_npu makes: handles, sizes, lengths and null pointers."""

from __future__ import annotations

import ctypes
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import cann_host
from support.aclnn_sources import c_types, declared
from support.processes import run, start

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")


def last_error(library: ctypes.CDLL) -> str:
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library.aclGetRecentErrMsg().decode()


FAILING = [symbol for _, symbol, kind in cann_host.entries() if kind == "fails"]


@pytest.mark.parametrize("symbol", FAILING)
def test_a_missing_function_fails_by_its_name(symbol: str, library) -> None:
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
    "aclrtSynchronizeEvent": "is not an event",
    "aclrtDestroyEvent": "is not an event",
    "aclrtFree": "was not allocated here",
    "aclrtFreeHost": "was not allocated here",
    "aclmdlRIDestroy": "is not a captured graph",
    "aclDestroyTensor": "was not made here",
    "aclDestroyIntArray": "was not made here",
    "aclDestroyScalar": "was not made here",
    "aclDestroyDataBuffer": "cann_host did not create",
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
    assert "without its own executor" in last_error(library)
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
def test_a_replay_refuses_memory_that_was_freed(symbol: str, then: str, library) -> None:
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
    csrc = Path(cann_host.__file__).parent / "csrc"
    text = "".join(re.sub(r"//.*", "", path.read_text()) for path in sorted(csrc.glob("*.cpp")))
    found = {}
    listed = {symbol for _, symbol, kind in cann_host.entries() if kind != "fails"}
    for name, inside in re.findall(r"\n[\w :]+[ *]+(\w+)\(([^(){};]*)\) \{", text):
        if name in listed:
            names = [" ".join(one.split()) for one in inside.split(",")]
            found[name] = [one for one in names if one and one != "..."]
    types = c_types()
    sized = {f"{name}GetWorkspaceSize": given for name, given in declared().items()} | {
        f"{name}GetMaxWorkspaceSize": given for name, given in declared("MAX_WORKSPACE").items()
    }
    for symbol, given in sized.items():
        results = "uint64_t* workspace_size", "aclOpExecutor** executor"
        found[symbol] = [*(f"{types[one]} a" for one in given), *results]
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
