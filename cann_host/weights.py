"""Weights that were converted for a kernel, from FRACTAL_NZ for example: each is converted once for
each version of its bytes.

A device reads a weight in its own layout; the CPU kernels may need another. The conversion of a
large weight takes longer than its matmul, so it is kept until the bytes are written or freed. The
library sees every write to device memory (csrc/tracked.cpp): copies, operators, collectives,
results of graphs. What Python writes, it tells with `wrote`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import NamedTuple

from torch import Tensor

from cann_host import runtime
from cann_host.bindings import TRACKS

__all__ = ["MOST_BYTES", "converted", "wrote"]

# Kept conversions take at most this; further weights are converted at each call.
MOST_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


class _Kept(NamedTuple):
    value: Tensor
    number: int  # of the tracked memory


_kept: dict[Hashable, _Kept] = {}
_lock = threading.Lock()


def converted(kind: Hashable, address: int, size: int, convert: Callable[[], Tensor]) -> Tensor:
    """A conversion of device memory, which nobody may change.

    Args:
        kind: what `convert` does, and the dtype and shape it does it with.
        address, size: the bytes that it reads, of device memory.
        convert: returns a tensor in other memory.
    """
    library = runtime.current().library
    key = (kind, address, size)
    found = _kept.get(key)
    if found is not None and library.cann_host_is_tracked(found.number):
        return found.value
    # tracked before it is read: a write by another thread meanwhile makes the result old
    number = library.cann_host_track(address, size)
    value = convert()
    with _lock:
        _drop_old(key)
        held = sum(kept.value.nbytes for kept in _kept.values())
        if number and held + value.nbytes <= MOST_BYTES:
            _kept[key] = _Kept(value, number)
            return value
    library.cann_host_untrack(number)
    return value


def _drop_old(key: Hashable) -> None:
    """Drop what is kept for the key, and the conversions of memory that was written or freed."""
    library = runtime.current().library
    replaced = _kept.pop(key, None)
    if replaced is not None:
        library.cann_host_untrack(replaced.number)
    for one, kept in list(_kept.items()):
        if not library.cann_host_is_tracked(kept.number):
            del _kept[one]


def wrote(address: int, size: int) -> None:
    """Tell that Python has written device memory. To be called after the write."""
    library = runtime.current().library
    if library.cann_host_state() & TRACKS:
        library.cann_host_wrote(address, size)
