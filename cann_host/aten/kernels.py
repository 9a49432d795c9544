"""Ordinary aten operators on npu tensors: PyTorch's own CPU kernels compute them (fallback.py).

torch_npu registers its own kernels for some 900 aten operators; each calls an aclnn kernel that
this stand-in does not have. This module replaces them. Operators that only allocate, copy or make
views work unchanged; an operator that PyTorch itself decomposes is decomposed, so its gradient
comes from PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.aten.captured import CapturedWork
from cann_host.aten.dispatch import Replacements, stock_kernel
from cann_host.aten.fallback import CpuKernel
from cann_host.aten.gradients import GRADIENTS
from cann_host.aten.host_views import HostViews
from cann_host.graph.converters import add_attention
from cann_host.rules import A2, soc_family

__all__ = ["AtenKernels"]

# torch_npu's own work here: allocation, copies, formats, bookkeeping of storages.
KEPT = frozenset(
    {
        "_copy_from",
        "_copy_from_and_resize",
        "_lazy_clone",
        "_local_scalar_dense",
        "_pin_memory",
        "_reshape_alias",
        "_to_copy",
        "as_strided",
        "as_strided_",
        "clone",
        "contiguous",
        "copy_",
        "empty",
        "empty_like",
        "empty_strided",
        "is_pinned",
        "is_set_to",
        "new_empty_strided",
        "record_stream",
        "resize_",
        "resize_as_",
        "set_",
    }
)

_ATTENTION = "aten::scaled_dot_product_attention"
_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def _is_plain(value: Any) -> bool:
    if isinstance(value, Tensor):
        return type(value) in (Tensor, torch.nn.Parameter)
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return True


def _prefer(
    stock: Callable[..., Any], vendor: Callable[..., Any], keyset: Any, *args: Any, **kwargs: Any
) -> Any:
    """PyTorch's own kernel in eager mode.

    While a graph is traced, the vendor's kernel is used, so that the graph is the same as on a real
    device.
    """
    if all(_is_plain(value) for value in (*args, *kwargs.values())):
        return stock(keyset, *args, **kwargs)
    return vendor(keyset, *args, **kwargs)


def _attention(
    stock: Callable[..., Any], vendor: Callable[..., Any], keyset: Any, *args: Any, **kwargs: Any
) -> Any:
    """scaled_dot_product_attention: the vendor's kernel calls FlashAttentionScore, which is here.

    A call with dropout is decomposed, as its mask is a kernel that is not here.
    """
    if not all(_is_plain(value) for value in (*args, *kwargs.values())):
        add_attention()
        return vendor(keyset, *args, **kwargs)
    dropout = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if dropout or soc_family(runtime.options().soc) != A2:
        return stock(keyset, *args, **kwargs)
    return vendor(keyset, *args, **kwargs)


def _decompose(op: torch._ops.OpOverload, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """Decompose a composite operator, as PyTorch does on a CPU."""
    del keyset
    return op._op_dk(_IMPLICIT, *args, **kwargs)


def _overloads() -> list[tuple[str, torch._ops.OpOverload]]:
    """The aten overloads for which torch_npu has a kernel, by full name."""
    found = []
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        if not name.startswith("aten::"):
            continue
        base, _, overload = name.removeprefix("aten::").partition(".")
        packet = getattr(torch.ops.aten, base, None)
        op = getattr(packet, overload or "default", None) if packet is not None else None
        if op is not None:
            found.append((name, op))
    return found


def _makes_view(op: torch._ops.OpOverload) -> bool:
    return any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in op._schema.returns
    )


class AtenKernels:
    """Replaces torch_npu's kernels by PyTorch's operators, as long as this object lives.

    Attributes:
        count: of the operators replaced.
    """

    def __init__(self, library: ctypes.CDLL, captures: CapturedWork) -> None:
        self._replacements = Replacements(library)
        self._captures = captures
        self._views = HostViews(library)
        self.count = 0
        for name, op in _overloads():
            if op._schema.name.removeprefix("aten::") in KEPT or _makes_view(op):
                continue
            self.count += self._replace(name, op)

    def _replace(self, name: str, op: torch._ops.OpOverload) -> bool:
        """Replace one overload's kernels. Returns whether there is one here."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        stock: Callable[..., Any]
        if has_kernel(name, "CompositeImplicitAutograd"):
            stock = partial(_decompose, op)
            keys = [key for key in ("PrivateUse1", "AutogradPrivateUse1") if has_kernel(name, key)]
            # With torch's own kernel (matmul), the gradient would call the vendor's
            # matmul_backward.
            if keys == ["PrivateUse1"] and has_kernel(name, "Autograd"):
                keys.append("AutogradPrivateUse1")
        elif torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU"):
            self._replacements.replace(
                name, CpuKernel(op, self._captures, self._views), "PrivateUse1"
            )
            if not has_kernel(name, "AutogradPrivateUse1"):
                return True
            # The vendor's gradient would call the vendor's backward kernels.
            stock = stock_kernel(op, "AutogradCPU")
            keys = ["AutogradPrivateUse1"]
        elif name in GRADIENTS:
            self._replacements.replace(name, GRADIENTS[name], "PrivateUse1")
            return True
        else:
            return False
        choose = _attention if op._schema.name == _ATTENTION else _prefer
        for key in keys:
            kernel = partial(choose, stock, self._replacements.vendor_kernel(op, key))
            self._replacements.replace(name, kernel, key, with_keyset=True)
        return True
