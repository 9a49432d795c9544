"""Reserved addresses and the memory that is mapped to them: what torch_npu's
`PYTORCH_NPU_ALLOC_CONF=expandable_segments:True` uses."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

import cann_host
from cann_host import runtime
from support.processes import run

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
CHUNK = 2 << 20  # bytes


class Properties(ctypes.Structure):
    """aclrtPhysicalMemProp."""

    _fields_ = [
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("attribute", ctypes.c_int),
        ("device", ctypes.c_uint),
        ("where", ctypes.c_int),
        ("reserved", ctypes.c_uint64),
    ]


class Segment:
    """Addresses for three chunks."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.at = ctypes.c_void_p()
        self.mapped: dict[int, ctypes.c_void_p] = {}
        code = library.aclrtReserveMemAddress(
            ctypes.byref(self.at), ctypes.c_size_t(3 * CHUNK), ctypes.c_size_t(0), None, 1
        )
        assert code == 0

    def address(self, chunk: float) -> ctypes.c_void_p:
        assert self.at.value is not None
        return ctypes.c_void_p(self.at.value + int(chunk * CHUNK))

    def physical(self, size: int = CHUNK, where: int = 1, device: int = 0) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        properties = Properties(0, 0, 0, device, where, 0)
        code = self.library.aclrtMallocPhysical(
            ctypes.byref(handle), ctypes.c_size_t(size), ctypes.byref(properties), 0
        )
        assert code == (0 if handle.value else 100000)
        return handle

    def map(self, chunk: float, handle: ctypes.c_void_p, size: int = CHUNK, offset: int = 0) -> int:
        sizes = ctypes.c_size_t(size), ctypes.c_size_t(offset)
        code: int = self.library.aclrtMapMem(self.address(chunk), *sizes, handle, 0)
        if code == 0:
            self.mapped[int(chunk)] = handle
        return code

    def unmap(self, chunk: int) -> ctypes.c_void_p:
        assert self.library.aclrtUnmapMem(self.address(chunk)) == 0
        return self.mapped.pop(chunk)

    def bytes_at(self, chunk: float) -> int:
        return int(self.library.cann_host_bytes_at(self.address(chunk)))

    def close(self) -> None:
        for chunk in list(self.mapped):
            assert self.library.aclrtFreePhysical(self.unmap(chunk)) == 0
        assert self.library.aclrtReleaseMemAddress(self.at) == 0


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment(runtime.current().library)
    yield made
    made.close()


def free_bytes(library: ctypes.CDLL) -> int:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert library.aclrtGetMemInfo(1, ctypes.byref(free), ctypes.byref(total)) == 0
    return free.value


def test_neighbours_are_one_piece(segment: Segment) -> None:
    assert segment.bytes_at(0) == 0
    for chunk in (0, 2):
        assert segment.map(chunk, segment.physical()) == 0
    assert (segment.bytes_at(0), segment.bytes_at(1), segment.bytes_at(2.5)) == (
        CHUNK,
        0,
        CHUNK // 2,
    )
    assert segment.map(1, segment.physical()) == 0
    assert segment.bytes_at(0.5) == 2.5 * CHUNK
    ctypes.memset(segment.address(0.5), 7, 2 * CHUNK)


def test_contents_move_with_the_memory(segment: Segment) -> None:
    assert segment.map(0, segment.physical()) == 0
    ctypes.memset(segment.address(0), 7, CHUNK)
    handle = segment.unmap(0)
    assert segment.map(2, handle) == 0
    assert ctypes.string_at(segment.address(2), CHUNK) == b"\7" * CHUNK
    assert segment.map(0, segment.physical()) == 0
    assert ctypes.string_at(segment.address(0), CHUNK) == bytes(CHUNK)


def test_memory_is_counted_while_it_is_allocated(segment: Segment) -> None:
    before = free_bytes(segment.library)
    handle = segment.physical()
    assert free_bytes(segment.library) == before - CHUNK
    assert segment.map(0, handle) == 0
    assert segment.unmap(0) is handle
    assert free_bytes(segment.library) == before - CHUNK
    assert segment.library.aclrtFreePhysical(handle) == 0
    assert free_bytes(segment.library) == before
    host = segment.physical(where=0)
    assert free_bytes(segment.library) == before
    assert segment.library.aclrtFreePhysical(host) == 0


def test_work_that_was_captured_finds_out(segment: Segment) -> None:
    """A segment that grows is still the memory that was captured; one mapped anew is not."""

    def block_of(chunks: int) -> int:
        address, size = segment.address(0), ctypes.c_uint64(chunks * CHUNK)
        return int(segment.library.cann_host_block_of(address, size))

    assert segment.map(0, segment.physical()) == 0
    first = block_of(1)
    assert segment.map(1, segment.physical()) == 0
    both = block_of(2)
    assert block_of(1) == first != both
    handle = segment.unmap(1)
    assert (block_of(1), block_of(2)) == (first, 0)
    assert segment.map(1, handle) == 0
    assert block_of(1) == first
    assert block_of(2) not in (0, both)


def test_a_mapping_that_cannot_be_is_refused(segment: Segment) -> None:
    """What cann_host does not take leaves everything as it was."""
    one, two = segment.physical(), segment.physical()
    library = segment.library
    assert segment.map(0, one) == 0
    assert segment.map(1, one) == 100000  # twice
    assert segment.map(0.5, two) == 100000  # onto another
    assert segment.map(2.5, two) == 100000  # beyond the end
    assert segment.map(1, two, CHUNK // 2) == 100000  # a part
    assert segment.map(1, two, CHUNK, 4096) == 100000
    assert segment.map(1.0001, two) == 100000  # not a page
    assert segment.map(1, ctypes.c_void_p(12345)) == 100000
    assert library.aclrtFreePhysical(one) == 100000  # it is mapped
    assert library.aclrtFreePhysical(ctypes.c_void_p(12345)) == 100000
    assert library.aclrtFree(segment.address(0)) == 100000  # not an allocation
    assert library.aclrtReleaseMemAddress(segment.at) == 100000  # in use
    assert library.aclrtUnmapMem(segment.address(1)) == 100000
    assert (segment.bytes_at(0), segment.bytes_at(1)) == (CHUNK, 0)
    assert library.aclrtFreePhysical(two) == 0
    for bad in ({"size": 0}, {"size": 100}, {"where": 7}, {"device": 63}):
        assert segment.physical(**bad).value is None


@pytest.mark.slow
def test_torch_npu_expands_its_segments() -> None:
    variables = {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    said = run("expandable.py", "--memory", "256MiB", **variables)
    assert said == "grown\nout of memory\nsmaller\nchild\nparent\n"
