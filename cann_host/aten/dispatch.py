"""What differs between versions of torch's dispatcher: to register a kernel, and to call the one
that it replaces. Nothing else here depends on the version of torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from cann_host.options import CannHostError

__all__ = ["Replacements", "stock_kernel"]

_COPIES = "cann_host_vendor"  # namespace of the copies of torch_npu's kernels


class Replacements:
    """Kernels in the place of torch_npu's for operators of aten, as long as this object lives."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        # Before torch 2.9 Python cannot fetch a kernel. Each is then copied to an operator of its
        # own; the original stays replaced, so that other threads never see it.
        self._copies = (
            None if _can_fetch() else _Copies(library, torch.library.Library(_COPIES, "DEF"))
        )

    def replace(
        self, name: str, kernel: Callable[..., Any], key: str, *, with_keyset: bool = False
    ) -> None:
        """Register a kernel.

        Args:
            name: of the operator, with its overload.
            kernel: called with the operator's arguments.
            key: the dispatch key.
            with_keyset: pass the key set of the call before the arguments.
        """
        # Library.impl would refuse a second kernel; torch 2.8 brought its allow_override. This is
        # the call that it makes.
        self._library.m.impl(name, key, kernel, with_keyset)  # type: ignore[union-attr]

    def vendor_kernel(self, op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
        """The kernel of a key before it is replaced: torch_npu's, else torch's own for all Autograd
        keys. It takes the key set of the call first."""
        if self._copies is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), key
        ):
            return _through_table(op, "Autograd")
        return _fetch(op, key) if self._copies is None else self._copies.of(op, key)


def stock_kernel(op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
    """The kernel of a key that is not replaced. It takes the key set of the call first."""
    return _fetch(op, key) if _can_fetch() else _through_table(op, key)


def _can_fetch() -> bool:
    return hasattr(torch.library, "get_kernel")


def _fetch(op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
    kernel: Callable[..., Any] = torch.library.get_kernel(op, key).call_boxed
    return kernel


def _through_table(op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
    """Calls what the operator has for a key at the time of the call."""
    number = getattr(torch._C.DispatchKey, key)

    def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        del keyset  # torch computes it from the arguments
        return op._op_dk(number, *args, **kwargs)

    return call


class _Copies:
    """Operators with copies of torch_npu's kernels."""

    def __init__(self, library: ctypes.CDLL, operators: torch.library.Library) -> None:
        self._copy = library.cann_host_copy_kernel
        self._operators = operators
        self._made: set[str] = set()

    def of(self, op: torch._ops.OpOverload, key: str) -> Callable[..., Any]:
        base, overload = op._schema.name, op._schema.overload_name
        copy = base.removeprefix("aten::")
        if str(op) not in self._made:
            self._operators.define(str(op._schema).removeprefix("aten::"))
            self._made.add(str(op))
        code = self._copy(
            base.encode(),
            overload.encode(),
            f"{_COPIES}::{copy}".encode(),
            int(getattr(torch._C.DispatchKey, key)),
        )
        if code:
            raise CannHostError(
                f"torch {torch.__version__} has another dispatcher than cann_host knows: it cannot "
                f"keep torch_npu's kernel of {op}, error {code}. What to do: use torch 2.7 or "
                "later."
            )
        packet = getattr(getattr(torch.ops, _COPIES), copy)
        return _through_table(getattr(packet, overload or "default"), key)
