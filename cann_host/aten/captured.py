"""Ordinary aten operators in captured graphs (aclgraph): at each replay PyTorch computes them on
the memory their tensors had when the graph was captured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from cann_host import watched
from cann_host._callbacks import give
from cann_host.aclnn import BASE_FORMATS, INNER
from cann_host.memory import over_memory

__all__ = ["install", "is_capturing", "on_memory", "on_meta", "record", "tensors", "uninstall"]

_library: ctypes.CDLL | None = None  # once installed
_is_capturing: Callable[[], int]
_numbers = count()
_works: dict[int, Callable[[], None]] = {}  # what the graphs that there are hold


def is_capturing(device: Callable[[], torch.device]) -> bool:
    """Whether work launched now is captured: whether the current stream of the device is."""
    assert _library is not None
    return bool(_is_capturing()) and bool(_library.cann_host_captures(_stream(device())))


def _stream(device: torch.device) -> int:
    return int(torch.npu.current_stream(device).npu_stream)  # type: ignore[attr-defined]


def tensors(value: Any) -> Iterator[Tensor]:
    """The npu tensors among arguments."""
    if isinstance(value, Tensor) and value.device.type == "npu":
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def on_meta(value: Any) -> Any:
    """Arguments without their data. Tensors of the CPU, which are scalars, stay as they are."""
    if isinstance(value, Tensor) and value.device.type == "npu":
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return _map(on_meta, "meta", value)


def on_memory(value: Any) -> Any:
    """Arguments as CPU tensors over the same memory."""
    if isinstance(value, Tensor) and value.device.type == "npu":
        address, offset = value.untyped_storage().data_ptr(), int(value.storage_offset())
        return over_memory(address, value.dtype, tuple(value.shape), value.stride(), offset)
    return _map(on_memory, "cpu", value)


def _map(change: Callable[[Any], Any], device: str, value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device(device) if value.type == "npu" else value
    if isinstance(value, (list, tuple)):
        return [change(item) for item in value]
    return value


def record(device: torch.device, what: str, used: list[Tensor], work: Callable[[], None]) -> None:
    """Add work to the graph that the current stream captures.

    Args:
        device: whose stream.
        what: the operator's name, for errors.
        used: every npu tensor whose memory it reads or writes.
        work: what each replay calls.
    """
    assert _library is not None
    import torch_npu

    for tensor in used:
        if torch_npu.get_npu_format(tensor) not in BASE_FORMATS:
            raise RuntimeError(f"cann_host: {what} of an internal format is not captured here.")
    block_of = _library.cann_host_block_of
    storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in used}
    memory = [(address, size, block_of(address, size)) for address, size in storages if size]
    watched.note(address for address, *_ in memory)

    def checked() -> None:
        # the graph's own pool stays, but what was allocated before it may have gone
        for address, size, block in memory:
            if block_of(address, size) != block:
                raise RuntimeError(f"{what}: a tensor that the graph uses is no longer allocated")
        work()

    _drop_ended()
    number = next(_numbers)
    _works[number] = checked
    if code := _library.cann_host_record(_stream(device), number):
        raise RuntimeError(f"cann_host: {what} was not captured, error {code}")


def _drop_ended() -> None:
    assert _library is not None
    while (number := _library.cann_host_next_ended()) >= 0:
        _works.pop(number, None)


def _replay(number: int) -> int:
    try:
        with torch._C.DisableTorchFunction():
            _works[number]()
    except Exception as error:
        text = f"cann_host: replay failed: {type(error).__name__}: {error}"
        assert _library is not None
        _library.cann_host_set_error(text.encode())
        return INNER
    return 0


def install(library: ctypes.CDLL) -> None:
    """Let the library ask for replays."""
    global _library, _is_capturing
    _library = library
    _is_capturing = library.cann_host_is_capturing
    library.cann_host_captures.argtypes = (ctypes.c_void_p,)
    library.cann_host_record.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.cann_host_next_ended.restype = ctypes.c_int64
    library.cann_host_block_of.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
    library.cann_host_block_of.restype = ctypes.c_uint64
    give(library.cann_host_set_replay, _replay)
    watched.install()


def uninstall() -> None:
    """A replay then fails instead of entering a dying interpreter."""
    if _library is not None:
        give(_library.cann_host_set_replay, None)
