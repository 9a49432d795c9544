"""Lets torch_npu be imported beside a CUDA build of torch.

The CUDA half of torch (from 2.10 on) and torch_npu (from 2.10.0.post7 on) register settings with
the same names in c10's allocator configuration (c10/core/AllocatorConfig.h). A name that is
registered twice ends the process at `import torch_npu`. The stand-in removes the names from c10's
set while torch_npu is imported, and puts them back afterwards.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder

__all__ = ["set_aside"]

# c10::CachingAllocator::AcceleratorAllocatorConfig::getMutableKeys(), which returns the set
_CLASS = "N3c1016CachingAllocator26AcceleratorAllocatorConfig"
_GETTER = f"_Z{_CLASS}14getMutableKeysB5cxx11Ev"
# If that function is inline, in torch 2.10 to 2.12: the set inside it, and the byte that says
# whether it was initialized
_SET = f"_ZZ{_CLASS}14getMutableKeysB5cxx11EvE4keys"
_MADE = f"_ZGVZ{_CLASS}14getMutableKeysB5cxx11EvE4keys"


def _find() -> int | None:
    """The address of c10's set of keys; None before torch is loaded, and if torch has none."""
    try:
        c10 = ctypes.CDLL("libc10.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
    if getter := getattr(c10, _GETTER, None):
        getter.restype = ctypes.c_void_p
        address: int = getter()
        return address
    try:
        made = ctypes.c_char.in_dll(c10, _MADE)
        keys = ctypes.c_char.in_dll(c10, _SET)
    except ValueError:
        return None
    return ctypes.addressof(keys) if made.value != b"\0" else None


class _Before(MetaPathFinder):
    """Finds no module. It sets the keys aside before torch_npu is imported, which `import torch`
    does at its end."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.keys: int | None = None

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == "torch_npu" and self.keys is None:
            self.keys = _find()
            if self.keys is not None:
                self._library.cann_host_set_keys_aside(self.keys)


@contextmanager
def set_aside(library: ctypes.CDLL) -> Iterator[list[str]]:
    """Import torch and torch_npu in this block.

    Yields:
        a list that holds, after the block, the keys that both register: with any of them, torch_npu
        cannot be imported with this torch beside a real CANN.
    """
    before, both = _Before(library), list[str]()
    sys.meta_path.insert(0, before)
    try:
        yield both
    finally:
        sys.meta_path.remove(before)
        if before.keys is not None:
            text = library.cann_host_put_keys_back(before.keys).decode()
            both.extend(text.split(", ") if text else [])
