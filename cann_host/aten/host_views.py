"""Npu tensors as CPU tensors over the same memory. Device memory is the host's here, so an ordinary
operator needs no copies of its inputs."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from cann_host import weights
from cann_host.aclnn import ACL_DTYPES, BASE_FORMATS
from cann_host.bindings import FREED
from cann_host.memory import flat_over, has_overlap

__all__ = ["HostViews", "can_write", "check_overlap", "is_expanded", "note_written"]

_DTYPES = frozenset(ACL_DTYPES.values())
_MOST_VIEWS = 1 << 14
_OVERLAP, _TOO_HARD = 1, 2  # c10's MemOverlap


class HostViews:
    """Makes views of npu tensors, and waits for the work that they depend on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        import torch_npu

        self._state = library.cann_host_state
        self._bytes_at = library.cann_host_bytes_at
        self._raw_stream = torch_npu._C._npu_getCurrentRawStream
        self._format_of = torch.ops.npu.get_npu_format.default._op
        self._views: dict[tuple[object, ...], Tensor] = {}
        self._started: set[int] = set()
        self._freed = 0  # how often memory was, for which the views are known

    def state(self, device: torch.device) -> int:
        """The library's state, after torch_npu has launched what waits in its task queue for the
        current stream of the device."""
        if device.index not in self._started:  # it has no streams yet
            with torch.npu.device(device):  # type: ignore[attr-defined]
                torch.empty(1, device=device)
            self._started.add(device.index)
        self._raw_stream(device.index)
        state: int = self._state()
        if state >> FREED != self._freed:
            self._views.clear()
            self._freed = state >> FREED
        return state

    @staticmethod
    def wait(devices: Iterable[torch.device]) -> None:
        """Wait for the current streams of devices, as a copy to the CPU does.

        Raises:
            RuntimeError: a launch has failed.
        """
        for device in devices:
            torch.npu.current_stream(device).synchronize()  # type: ignore[attr-defined]

    def of(self, tensor: Tensor, *, is_new: bool = False) -> Tensor | None:
        """A CPU tensor over the same memory; None if a copy is needed: for an internal format, a
        subclass, a layout that is not strided, no memory.

        Args:
            tensor: on the npu.
            is_new: return a view that no other call gets, whose metadata may change.
        """
        if tensor.is_conj():
            view = self.of(tensor.conj(), is_new=is_new)
            return None if view is None else view.conj()
        if tensor.is_neg():
            view = self.of(torch._neg_view(tensor), is_new=is_new)
            return None if view is None else torch._neg_view(view)
        kind, dtype = type(tensor), tensor.dtype
        if (
            (kind is not Tensor and kind is not Parameter)
            or dtype not in _DTYPES
            or tensor.layout is not torch.strided
            or self._format_of(tensor) not in BASE_FORMATS
        ):
            return None
        storage = tensor.untyped_storage()
        key = (
            storage.data_ptr(),
            storage.nbytes(),
            dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
        )
        if is_new:
            return self._make(*key)
        view = self._views.get(key)
        if view is None and (view := self._make(*key)) is not None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            self._views[key] = view
        return view

    def check_written(self, tensor: Tensor, op: object) -> None:
        """Refuse to write to a view of an internal format that is not contiguous: torch_npu's copy_
        would fill the whole storage in the order of the view.

        Raises:
            RuntimeError: it is one.
        """
        if (
            type(tensor) in (Tensor, Parameter)
            and tensor.layout is torch.strided
            and not tensor.is_contiguous()
            and self._format_of(tensor) not in BASE_FORMATS
        ):
            raise RuntimeError(
                f"cann_host: {op} writes to a view of shape {tuple(tensor.shape)} and strides "
                f"{tensor.stride()} of an internal format. What to do: write to the whole tensor, "
                "or cast it to ND before."
            )

    def _make(
        self,
        address: int,
        size: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int,
    ) -> Tensor | None:
        count = size // dtype.itemsize
        if count == 0 or self._bytes_at(address) < size:
            return None
        try:
            return flat_over(address, dtype, count).as_strided(shape, strides, offset)
        except RuntimeError:  # its storage has shrunk; the copy says so
            return None


def is_expanded(tensor: Tensor) -> bool:
    """Whether elements certainly share memory, by torch's rule: a dim has a stride of 0."""
    return torch._debug_has_internal_overlap(tensor) == _OVERLAP


def _has_overlap(tensor: Tensor) -> bool:
    """Whether elements share memory."""
    known = torch._debug_has_internal_overlap(tensor)
    if known != _TOO_HARD:
        return known == _OVERLAP
    return has_overlap(tuple(tensor.shape), tensor.stride())


def check_overlap(written: Sequence[Tensor], used: Iterable[Tensor]) -> None:
    """Refuse to write to a part of what is read, as torch's own kernels do and torch_npu's for many
    operators, and to write to memory twice: the order of reads and writes would matter. Like
    torch, it does not look at tensors with gaps.

    Args:
        written: the tensors that an operator writes to.
        used: all its tensors.

    Raises:
        RuntimeError: two of them overlap.
    """
    targets = [(target, *_range(target)) for target in written if _is_dense(target)]
    for i, (target, begin, end) in enumerate(targets):
        for _, its_begin, its_end in targets[:i]:
            if its_begin < end and begin < its_end:
                raise RuntimeError(_refer_to_one("two of the written-to tensors"))
        for tensor in used:
            if tensor is target or not _is_dense(tensor):
                continue
            its_begin, its_end = _range(tensor)
            is_same = (its_begin, its_end, tensor.stride()) == (begin, end, target.stride())
            if its_begin < end and begin < its_end and not is_same:
                raise RuntimeError(_refer_to_one("the input tensor and the written-to tensor"))


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _refer_to_one(what: str) -> str:  # torch's own text
    return (
        f"unsupported operation: some elements of {what} refer to a single memory location. Please "
        "clone() the tensor before performing the operation."
    )


def _range(tensor: Tensor) -> tuple[int, int]:
    """Where the memory of a tensor without gaps begins and ends."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.nbytes


def can_write(written: Sequence[Tensor], used: Sequence[Tensor]) -> bool:
    """Whether an operator may write straight into tensors: each has elements, each element its own
    memory, and the storage is no other argument's. Otherwise the order of reads and writes would
    matter."""
    targets = set(map(id, written))
    ranges = []
    for tensor in used:
        is_target = id(tensor) in targets
        if is_target and (tensor.numel() == 0 or _has_overlap(tensor)):
            return False
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        ranges.append((address, address + storage.nbytes(), is_target))
    ranges.sort()
    end = end_of_target = 0
    for begin, its_end, is_target in ranges:
        if begin < (end if is_target else end_of_target):
            return False
        end = max(end, its_end)
        if is_target:
            end_of_target = max(end_of_target, its_end)
    return True


def note_written(tensor: Tensor) -> None:
    """Tell that an npu tensor was written through a view."""
    storage = tensor.untyped_storage()
    weights.wrote(storage.data_ptr(), storage.nbytes())
