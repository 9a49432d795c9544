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
from cann_host.aclnn import BASE_FORMATS, INNER
from cann_host.bindings import FREED, TRACKS, give
from cann_host.memory import over_memory

__all__ = ["CapturedWork", "on_memory", "on_meta", "tensors"]


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
    """Arguments without their data. CPU tensors, which are scalars, are not changed."""
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


class CapturedWork:
    """The work of PyTorch's operators in captured graphs, which the library calls by number."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._numbers = count()
        self.works: dict[int, Callable[[], None]] = {}  # of the graphs that exist
        give(library.cann_host_set_replay, self._replay)

    def is_capturing(self, device: torch.device) -> bool:
        """Whether the current stream of the device captures work that is launched now."""
        return bool(self._library.cann_host_captures(_stream(device)))

    def record(
        self,
        device: torch.device,
        what: str,
        used: list[Tensor],
        written: list[Tensor],
        work: Callable[[], None],
    ) -> None:
        """Add work to the graph that the current stream captures.

        Args:
            device: whose stream.
            what: the operator's name, for errors.
            used: every npu tensor whose memory it reads or writes.
            written: those that it writes.
            work: what each replay calls.

        Raises:
            RuntimeError: a tensor has an internal format, or the library refuses.
        """
        import torch_npu

        for tensor in used:
            if torch_npu.get_npu_format(tensor) not in BASE_FORMATS:
                raise RuntimeError(
                    f"cann_host: {what} of an internal format is not captured here; the weight of "
                    "mm and addmm is, in float16 and bfloat16, whole or transposed. What to do: "
                    "cast the tensor to ND before (torch_npu.npu_format_cast)."
                )
        block_of = self._library.cann_host_block_of
        storages = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in used}
        memory = [(address, size, block_of(address, size)) for address, size in storages if size]
        watched.note(address for address, *_ in memory)
        state, wrote = self._library.cann_host_state, self._library.cann_host_wrote
        targets = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in written}
        checked_at = -1  # how often memory had been freed

        def checked() -> None:
            nonlocal checked_at
            freed = state() >> FREED
            # the graph's own pool stays, but memory that was allocated before it may be freed
            if freed != checked_at:
                for address, size, block in memory:
                    if block_of(address, size) != block:
                        raise RuntimeError(
                            f"{what}: a tensor that the graph uses is no longer allocated"
                        )
                checked_at = freed
            try:
                work()
            finally:
                if state() & TRACKS:
                    for address, size in targets:
                        wrote(address, size)

        self._drop_ended()
        number = next(self._numbers)
        self.works[number] = checked
        if code := self._library.cann_host_record(_stream(device), number):
            raise RuntimeError(f"cann_host: {what} was not captured, error {code}")

    def _drop_ended(self) -> None:
        while (number := self._library.cann_host_next_ended()) >= 0:
            self.works.pop(number, None)

    def _replay(self, number: int) -> int:
        try:
            with torch._C.DisableTorchFunction():
                self.works[number]()
        except Exception as error:
            text = f"cann_host: replay failed: {type(error).__name__}: {error}"
            self._library.cann_host_set_error(text.encode())
            return INNER
        return 0

    def uninstall(self) -> None:
        """A replay then fails instead of calling an interpreter that ends."""
        give(self._library.cann_host_set_replay, None)
