"""What differs between versions of torch's dispatcher: to register a kernel, and to call the one
that it replaces. Elsewhere nothing asks which torch this is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Replacements"]


class Replacements:
    """Kernels that replace others of the namespace aten, as long as this object lives."""

    def __init__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")

    def replace(self, name: str, kernel: Callable[..., Any], key: str) -> None:
        """Register a kernel in the place of another.

        Args:
            name: of the operator, with "aten::".
            kernel: called with the operator's arguments.
            key: the dispatch key.
        """
        _register(self._library, name, kernel, key)

    def wrap(
        self,
        name: str,
        op: torch._ops.OpOverload,
        key: str,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        """Register a kernel that may call the one it replaces.

        Args:
            name: of the operator, with "aten::".
            op: the operator.
            key: the dispatch key.
            wrapped: makes the kernel from the old kernel. Both take the key set of the call first,
                then the operator's arguments.
        """
        if hasattr(torch.library, "get_kernel"):  # torch 2.9
            old = torch.library.get_kernel(op, key).call_boxed
            _register(self._library, name, wrapped(old), key, with_keyset=True)
        else:
            _TakenAway(name, op, key, wrapped)


def stock_kernel(op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
    """The kernel of a key, which takes the key set of the call first."""
    if hasattr(torch.library, "get_kernel"):
        kernel: Callable[..., Any] = torch.library.get_kernel(op, key).call_boxed
        return kernel
    dispatch_key = getattr(torch._C.DispatchKey, key)

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        del keyset  # torch computes the same one
        return op._op_dk(dispatch_key, *args, **kwargs)

    return call


def _register(
    library: Any, name: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False
) -> None:
    # Library.impl refuses a second kernel unless allow_override is given, which torch 2.8 brought;
    # this is the call it makes.
    library.m.impl(name, key, kernel, with_keyset)


class _TakenAway:
    """A kernel that takes itself away while the one it replaced runs."""

    def __init__(
        self,
        name: str,
        op: torch._ops.OpOverload,
        key: str,
        wrapped: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self.name, self.op, self.key = name, op, key
        self.kernel = wrapped(self.old)
        self.lock = threading.RLock()
        self.depth = 0
        self.library: Any = None
        self.put()

    def put(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        _register(self.library, self.name, self.kernel, self.key, with_keyset=True)

    def old(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            self.library._destroy()
            try:
                return self.op.redispatch(keyset, *args, **kwargs)
            finally:
                self.put()
