"""Captured graphs whose tasks are replaced between replays, and work that waits for a value:
`updates.py FUNCTION ...`."""

from __future__ import annotations

import ctypes
import sys

import torch
import torch_npu  # noqa: F401

SECONDS = [0.5, 2.0, 8.0]


class Scaled:
    """A graph of y = x + scale, z = y * 2; the first operator can be replaced."""

    def __init__(self) -> None:
        self.x = torch.arange(8.0, device="npu")
        self.one = torch.ones(8, device="npu")
        self.y = torch.empty(8, device="npu")
        self.updates = torch.npu.Stream()
        self.replayed = torch.npu.Event()
        self.event = torch.npu.ExternalEvent()
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            self.event.wait(stream)
            self.event.reset(stream)
            torch.npu.graph_task_group_begin(stream)
            self.operator(1.0)
            self.group = torch.npu.graph_task_group_end(stream)
            self.z = self.y * 2

    def operator(self, scale: float) -> None:
        torch.add(self.x, self.one, alpha=scale, out=self.y)

    def replay(self, scale: float) -> None:
        """As torchair does: the update is launched after the replay, which waits for it."""
        self.graph.replay()
        with torch.npu.stream(self.updates):
            self.updates.wait_event(self.replayed)
            torch.npu.graph_task_update_begin(self.updates, self.group)
            self.operator(scale)
            torch.npu.graph_task_update_end(self.updates)
            self.event.record(self.updates)
        self.replayed.record(torch.npu.current_stream())

    def right(self, scale: float) -> bool:
        return torch.equal(self.z.cpu(), (torch.arange(8.0) + scale) * 2)


def each_replay_has_its_own() -> None:
    graph = Scaled()
    for scale in SECONDS:
        graph.replay(scale)
        print(graph.right(scale))


def replays_in_a_row() -> None:
    """Nothing waits in between; each replay adds to a sum."""
    graph = Scaled()
    total = torch.zeros(8, device="npu")
    for scale in SECONDS:
        graph.replay(scale)
        total += graph.z
    print(torch.equal(total.cpu(), 2 * (3 * torch.arange(8.0) + sum(SECONDS))))


def never_written() -> None:
    graph = Scaled()
    graph.graph.replay()
    try:
        torch.npu.synchronize()
    except RuntimeError as error:
        print("nothing has written" in str(error))
    graph.event.record(graph.updates)
    torch.npu.synchronize()
    print(graph.right(1.0))


def refused() -> None:
    """The codes of calls that cannot be."""
    from cann_host import runtime

    library = runtime.current().library
    graph = Scaled()
    stream = ctypes.c_void_p(graph.updates.npu_stream)
    group = ctypes.c_void_p()
    value = ctypes.c_void_p(torch.zeros(4, device="npu").data_ptr())
    off = ctypes.c_void_p((value.value or 0) + 1)
    host = ctypes.create_string_buffer(64)
    wait = library.aclrtValueWait
    print(
        library.aclmdlRICaptureTaskGrpBegin(stream),  # nothing is captured
        library.aclmdlRICaptureTaskGrpEnd(stream, ctypes.byref(group)),
        library.aclmdlRICaptureTaskUpdateBegin(stream, ctypes.c_void_p(12345)),
        library.aclmdlRICaptureTaskUpdateEnd(stream),
        wait(value, ctypes.c_uint64(1), 4, stream),  # no such condition
        wait(off, ctypes.c_uint64(1), 1, stream),
        wait(ctypes.byref(host), ctypes.c_uint64(1), 1, stream),
        library.aclrtValueWrite(None, ctypes.c_uint64(1), 0, stream),
    )
    gone = ctypes.c_void_p()
    assert library.aclrtMalloc(ctypes.byref(gone), ctypes.c_size_t(64), 0) == 0
    assert wait(gone, ctypes.c_uint64(1 << 60), 1, stream) == 0
    assert library.aclrtFree(gone) == 0
    try:
        graph.updates.synchronize()
    except RuntimeError as error:
        print("is no longer allocated" in str(error))
    torch.npu.graph_task_update_begin(graph.updates, graph.group)
    with torch.npu.stream(graph.updates):
        graph.operator(1.0)
        graph.operator(2.0)
    try:
        torch.npu.graph_task_update_end(graph.updates)
    except RuntimeError as error:
        print("launched 2 tasks and the group has 1" in str(error))
    other = torch.npu.NPUGraph()
    try:
        with torch.npu.graph(other):
            torch.npu.graph_task_group_begin(torch.npu.current_stream())
    except RuntimeError as error:
        print("was begun and not ended" in str(error))
    graph.graph.reset()
    try:
        torch.npu.graph_task_update_begin(graph.updates, graph.group)
    except RuntimeError as error:
        print("is not a group of tasks" in str(error))


def conditions() -> None:
    """Whether each wait of aclrtValueWait ends: at or above, equal, and, nor."""
    from cann_host import runtime

    library = runtime.current().library
    memory = torch.zeros(1, dtype=torch.int64, device="npu")
    at = ctypes.c_void_p(memory.data_ptr())
    for condition in range(4):
        ends = []
        for found, value in ((5, 5), (6, 5), (2, 5), (-1, 0)):
            stream = torch.npu.Stream()
            handle = ctypes.c_void_p(stream.npu_stream)
            library.aclrtValueWrite(at, ctypes.c_uint64(found), 0, handle)
            library.aclrtValueWait(at, ctypes.c_uint64(value), condition, handle)
            ends.append(library.aclrtSynchronizeStream(handle) == 0)
            library.aclrtValueWrite(at, ctypes.c_uint64((5, 5, 5, 5)[condition]), 0, None)
            library.aclrtSynchronizeStream(None)
        print(*map(int, ends))


for name in sys.argv[1:]:
    globals()[name]()
