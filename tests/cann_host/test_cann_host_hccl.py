"""cann_host's HCCL under the real torch_npu: every collective against numpy, in the streams' order,
and the errors of all ranks if one fails. The ranks run hccl_ranks.py."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import cann_host
from cann_host import runtime
from support.compiler import COMPILER, needs_compiler, torch_npu_include
from support.processes import run, script
from support.ranks import assert_right, launch

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.distributed,
]

STREAMS = [(), ("--streams", "late")]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_collective_and_dtype(ranks: int, tmp_path, tally) -> None:
    found = launch("hccl_ranks.py", "values", ranks, tmp_path, "npu")
    assert_right(found, 130)
    tally(f"collectives against numpy, {ranks} ranks", len(found[-1]))


@pytest.mark.slow
def test_graphs(tmp_path, tally) -> None:
    found = launch("hccl_ranks.py", "graphs", 2, tmp_path, "npu")
    assert_right(found, 60)
    tally("collectives in graphs against numpy", len(found[0]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_late_streams_keep_the_order(ranks: int, tmp_path) -> None:
    found = launch("hccl_ranks.py", "order", ranks, tmp_path, "npu", options=STREAMS[1])
    assert_right(found, 4)


@pytest.mark.slow
@pytest.mark.parametrize("options", STREAMS, ids=["now", "late"])
@pytest.mark.parametrize("job", ["other count", "other dtype", "other op", "other kind"])
def test_calls_that_differ_are_an_error_on_all(job: str, options, tmp_path) -> None:
    assert_right(launch("hccl_ranks.py", job, 2, tmp_path, "npu", options=options), 2)


@pytest.mark.slow
@pytest.mark.parametrize("options", STREAMS, ids=["now", "late"])
@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_killed_rank_is_an_error_on_the_others(ranks, victim, options, tmp_path) -> None:
    found = launch(
        "hccl_ranks.py", "gone", ranks, tmp_path, "npu",
        options=options, dies=victim, VICTIM=str(victim),
    )  # fmt: skip
    assert found.pop(victim) == {}
    assert_right(found, 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("job", ["late", "fault"])
def test_no_rank_waits_longer_than_allowed(job: str, ranks: int, tmp_path) -> None:
    assert_right(launch("hccl_ranks.py", job, ranks, tmp_path, "npu", HCCL_EXEC_TIMEOUT="2"), 1)


# ---- one rank, by the C interface ----

OK, PARAMETER, NULL, NOT_SUPPORTED, SYSTEM, CONNECT, REMOTE, OOM = 0, 1, 2, 5, 8, 11, 21, 24
FLOAT32, SUM = 4, 0


@pytest.fixture(scope="module")
def hccl() -> ctypes.CDLL:
    return runtime.current().library


@pytest.fixture
def comm(hccl) -> Iterator[ctypes.c_void_p]:
    root, handle = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    assert hccl.HcclGetRootInfo(root) == OK
    assert hccl.HcclCommInitRootInfo(1, root, 0, ctypes.byref(handle)) == OK
    yield handle
    assert hccl.HcclCommDestroy(handle) == OK
    assert hccl.HcclCommDestroy(handle) == PARAMETER


def said(hccl: ctypes.CDLL) -> str:
    hccl.cann_host_recent_error.restype = ctypes.c_char_p
    return hccl.cann_host_recent_error().decode()


REFUSED = [
    ("null", dict(send=0), NULL, "sendBuf is null"),
    ("host memory", dict(send="host"), PARAMETER, "not all in memory that was allocated here"),
    ("too long", dict(count=1 << 40), PARAMETER, "not all in memory that was allocated here"),
    ("far too long", dict(count=(1 << 64) - 1), PARAMETER, "a count of 18446744073709551615"),
    ("misaligned", dict(shift=2), PARAMETER, "not a multiple of the 4 bytes of float32"),
    ("dtype", dict(dtype=99), NOT_SUPPORTED, "dtype 99 (of an unknown dtype) is not one of"),
    ("uint8", dict(dtype=7), NOT_SUPPORTED, "does not reduce uint8 by sum"),
    ("op", dict(op=9), NOT_SUPPORTED, "does not reduce float32 by an unknown op"),
    ("comm", dict(comm=ctypes.c_void_p(77)), PARAMETER, "is not a communicator"),
    ("null comm", dict(comm=ctypes.c_void_p(None)), NULL, "the communicator is null"),
]


@pytest.mark.parametrize(("given", "code", "text"), [r[1:] for r in REFUSED], ids=lambda v: str(v))
def test_what_is_refused(hccl, comm, given, code: int, text: str) -> None:
    device, host = torch.ones(64).npu(), ctypes.create_string_buffer(256)
    send = given.get("send", device.data_ptr())
    if send == "host":
        send = ctypes.addressof(host)
    result = hccl.HcclAllReduce(
        ctypes.c_void_p(send + given.get("shift", 0) if send else None),
        ctypes.c_void_p(device.data_ptr()),
        ctypes.c_uint64(given.get("count", 8)),
        given.get("dtype", FLOAT32),
        given.get("op", SUM),
        given.get("comm", comm),
        None,
    )
    assert result == code
    assert text in said(hccl)
    assert torch.equal(device.cpu(), torch.ones(64))


@pytest.mark.slow
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend950PR_9579", "Ascend910_9391"])
def test_dtypes_by_chip(soc: str) -> None:
    usual = "int8 int16 int32 fp16 fp32"
    wanted = {
        "Ascend310P3": [usual, *["int8 int32 fp16 fp32"] * 3],
        "Ascend910_9391": [f"{usual} int64 bf16", "int8 int32 fp16 fp32 int64"]
        + [f"{usual} int64 bf16"] * 2,
        "Ascend950PR_9579": [
            f"{usual} int64 uint64 fp64 bf16",
            "int8 int32 fp16 fp32 int64 uint64 fp64",
        ]
        + [f"{usual} int64 uint64 fp64 bf16"] * 2,
    }[soc]
    assert run("hccl_pairs.py dtypes", "--soc", soc).splitlines() == wanted


@pytest.mark.slow
def test_a_rank_that_never_comes(hccl, monkeypatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    root, handle = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    assert hccl.HcclGetRootInfo(root) == OK
    assert hccl.HcclCommInitRootInfo(3, root, 0, ctypes.byref(handle)) == CONNECT
    assert "[EI0006] HcclCommInitRootInfo: ranks 1, 2 did not connect in time" in said(hccl)
    # no other process is left
    assert hccl.HcclCommInitRootInfo(3, root, 1, ctypes.byref(handle)) == CONNECT
    assert "rank 0 cannot be reached" in said(hccl)
    assert hccl.HcclCommInitRootInfo(3, root, 0, ctypes.byref(handle)) == PARAMETER


@pytest.mark.parametrize("variable", ["HCCL_EXEC_TIMEOUT", "HCCL_CONNECT_TIMEOUT"])
@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "99999999999"])
def test_a_timeout_that_is_none(hccl, variable: str, value: str, monkeypatch) -> None:
    monkeypatch.setenv(variable, value)
    root, handle = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    assert hccl.HcclGetRootInfo(root) == OK
    assert hccl.HcclCommInitRootInfo(1, root, 0, ctypes.byref(handle)) == PARAMETER
    assert f"[EI0001] {variable} is '{value}'; it must be a whole number of seconds" in said(hccl)


@pytest.mark.parametrize(("ranks", "rank"), [(0, 0), (2, 2), (65, 0)])
def test_ranks_that_cannot_be(hccl, ranks: int, rank: int) -> None:
    root, handle = ctypes.create_string_buffer(4108), ctypes.c_void_p()
    assert hccl.HcclGetRootInfo(root) == OK
    assert hccl.HcclCommInitRootInfo(ranks, root, rank, ctypes.byref(handle)) == PARAMETER
    assert hccl.HcclCommInitRootInfo(1, None, 0, ctypes.byref(handle)) == NULL
    assert hccl.HcclCommInitRootInfo(1, b"x" * 4108, 0, ctypes.byref(handle)) == PARAMETER


GETTERS = ["HcclGetCommName", "HcclGetRankSize", "HcclGetRankId", "HcclGetCommAsyncError"]


@pytest.mark.parametrize("getter", GETTERS)
def test_a_getter_refuses_null(getter: str, hccl, comm) -> None:
    place = ctypes.create_string_buffer(128)
    assert getattr(hccl, getter)(comm, place) == OK
    assert getattr(hccl, getter)(comm, None) == NULL
    assert f"{getter}: no place for the answer" in said(hccl)
    assert getattr(hccl, getter)(None, place) == NULL
    assert f"{getter}: the communicator is null" in said(hccl)
    assert getattr(hccl, getter)(ctypes.c_void_p(77), place) == PARAMETER


def test_root_infos_that_nobody_uses_take_no_descriptors(hccl) -> None:
    root = ctypes.create_string_buffer(4108)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert hccl.HcclGetRootInfo(root) == OK
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_replay_on_a_destroyed_communicator_is_refused_at_once(hccl) -> None:
    root, comm, stream, graph = (
        ctypes.create_string_buffer(4108),
        *(ctypes.c_void_p() for _ in range(3)),
    )
    assert hccl.HcclGetRootInfo(root) == OK
    assert hccl.HcclCommInitRootInfo(1, root, 0, ctypes.byref(comm)) == OK
    assert hccl.aclrtCreateStream(ctypes.byref(stream)) == OK
    assert hccl.aclmdlRICaptureBegin(stream, 0) == OK
    assert hccl.HcclBarrier(comm, stream) == OK
    assert hccl.aclmdlRICaptureEnd(stream, ctypes.byref(graph)) == OK
    assert hccl.aclmdlRIExecuteAsync(graph, stream) == OK
    assert hccl.HcclCommDestroy(comm) == OK
    assert hccl.aclmdlRIExecuteAsync(graph, stream) == PARAMETER
    assert "has failed before: it was destroyed" in said(hccl)
    assert hccl.aclmdlRIDestroy(graph) == OK
    assert hccl.aclrtDestroyStream(stream) == OK


# ---- two ranks, on threads ----


class Rank(threading.Thread):
    """One rank that connects: its code, and the seconds it took."""

    def __init__(self, hccl, root, rank: int) -> None:
        super().__init__()
        self.hccl, self.root, self.rank = hccl, root, rank
        self.comm, self.code, self.took = ctypes.c_void_p(), -1, 0.0
        self.start()

    def run(self) -> None:
        begin = time.monotonic()
        self.code = self.hccl.HcclCommInitRootInfo(2, self.root, self.rank, ctypes.byref(self.comm))
        self.took = time.monotonic() - begin


def strangers(root, number: int) -> list[socket.socket]:
    """They connect and say nothing, or not all that a rank says."""
    address = b"\0" + root.raw[16:48].rstrip(b"\0")
    made = []
    end = time.monotonic() + 20
    while len(made) < number and time.monotonic() < end:
        one = socket.socket(socket.AF_UNIX)
        one.setblocking(False)
        try:
            one.connect(address)
            one.send(bytes(len(made) % 3))
            made.append(one)
        except (BlockingIOError, ConnectionRefusedError):
            one.close()
            time.sleep(0.001)
    return made


def test_a_rank_waits_for_one_that_does_not_listen_yet(hccl) -> None:
    root = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root) == OK
    second = Rank(hccl, root, 1)
    second.join(0.2)
    first = Rank(hccl, root, 0)
    for rank in (first, second):
        rank.join()
        assert rank.code == OK
        assert hccl.HcclCommDestroy(rank.comm) == OK


def test_half_open_connections_keep_no_rank_out(hccl) -> None:
    root = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root) == OK
    first = Rank(hccl, root, 0)
    held = strangers(root, 200)  # more than are listened to at a time
    assert len(held) == 200
    second = Rank(hccl, root, 1)
    for rank in (first, second):
        rank.join()
        assert rank.code == OK
        assert hccl.HcclCommDestroy(rank.comm) == OK
    assert second.took < 4
    for one in held:
        one.close()


@pytest.mark.slow
def test_half_open_connections_keep_no_rank_beyond_its_time(hccl, monkeypatch) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    root = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root) == OK
    first = Rank(hccl, root, 0)
    held = strangers(root, 20)
    first.join()
    assert first.code == CONNECT
    assert first.took < 3
    for one in held:
        one.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="makes another user's process")
def test_another_users_connections_keep_no_rank_out(hccl) -> None:
    root = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root) == OK
    address = root.raw[16:48].rstrip(bytes(1)).decode()
    other = subprocess.Popen(
        [sys.executable, *script(f"crowd.py {shlex.quote(address)}")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"there\n"
    ranks = [Rank(hccl, root, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.join()
        assert rank.code == OK
        assert rank.took < 5
        assert hccl.HcclCommDestroy(rank.comm) == OK
    other.kill()
    other.communicate()


# ---- processes that lack something, or fork ----


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_dead_rank_is_noticed_while_its_child_lives(dies: int) -> None:
    found = sorted(run(f"hccl_pairs.py dead_rank {dies}").splitlines())
    assert len(found) == 2
    assert found[0].startswith(f"{PARAMETER} HcclBarrier: this process was forked after")
    assert found[1].startswith(f"{REMOTE} True [EI0002] HcclBarrier: rank {dies} is gone")


@pytest.mark.slow
def test_a_rank_without_descriptors_gets_hccls_code() -> None:
    for line in run("hccl_pairs.py no_descriptors").splitlines():
        assert line.startswith(f"{SYSTEM} True [EI0006] HcclCommInitRootInfo: no socket: Too many")
        assert "RLIMIT_NOFILE" in line


@pytest.mark.slow
def test_a_collective_without_memory_gets_hccls_code() -> None:
    (line,) = run("hccl_pairs.py no_memory").splitlines()
    assert line.startswith(
        f"{OOM} True [EI0007] HcclAllReduce(67108864 float32, sum): rank 0 has no"
    )


def test_nothing_is_left_in_the_file_system(hccl, comm) -> None:
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()]
    assert not [path for path in sockets if "cann_host" in path and not path.startswith("@")]
    assert shutil.which("ls") and not list(Path("/dev/shm").glob("*cann_host*"))


@needs_compiler
def test_the_config_is_the_headers(tmp_path) -> None:
    """What csrc/hccl.cpp reads lies where torch_npu's header has it."""
    source = (Path(__file__).parents[2] / "cann_host/csrc/hccl.cpp").read_text()
    ours = "struct Config {" + source.split("struct Config {")[1].split("};")[0] + "};"
    pairs = [("name", "hcclCommName"), ("exec_timeout", "hcclExecTimeOut"),
             ("deterministic", "hcclDeterministic"), ("job", "hcclJobID")]  # fmt: skip
    checks = "".join(
        f"static_assert(offsetof(Config, {a}) == offsetof(HcclCommConfig, {b}));" for a, b in pairs
    )
    program = f"""
        #include <cstddef>
        #include <cstdint>
        #include "third_party/hccl/inc/hccl/hccl_types.h"
        {ours}
        {checks}
        static_assert(sizeof(Config) <= sizeof(HcclCommConfig) && HCCL_COMM_CONFIG_RESERVED == 12);
    """
    path = tmp_path / "config.cpp"
    path.write_text(program)
    include = torch_npu_include()
    command = [str(COMPILER), "-std=c++17", f"-I{include}", "-fsyntax-only", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
