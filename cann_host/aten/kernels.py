"""Ordinary aten operators on npu tensors: copy to the CPU, compute, copy back. While a graph is
captured, the call is recorded for its replays instead (captured.py).

torch_npu registers its own kernels for some 900 aten operators; each calls an aclnn kernel that
this stand-in does not have. This module replaces them. Operators that only allocate, copy or make
views work unchanged; an operator that PyTorch itself decomposes is decomposed, so its gradient
comes from PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.aten import captured
from cann_host.aten.captured import CapturedWork
from cann_host.aten.dispatch import Replacements, stock_kernel
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

# torch_npu copies the indices of these to the device itself (op-plugin, AdvancedIndex.cpp)
TAKES_CPU = frozenset(
    {"_index_put_impl_", "index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"}
)

_ATTENTION = "aten::scaled_dot_product_attention"
_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu() if value.device.type == "npu" else value
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "npu" else value
    if isinstance(value, torch.Generator):
        return _cpu_generator(value) if value.device.type == "npu" else value
    if isinstance(value, (list, tuple)):
        return [_to_cpu(item) for item in value]
    return value


def _next_seed(generator: torch.Generator) -> int:
    """A seed for one call: equal seeds and offsets give equal numbers."""
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # the offset moves in fours
    return (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset) % (1 << 63)


def _cpu_generator(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(_next_seed(generator))


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """While the block runs, the CPU's generator draws the numbers of the device's generator."""
    drawn_from = torch.default_generator
    state = drawn_from.get_state()
    drawn_from.manual_seed(_next_seed(_npu().default_generators[device.index]))
    try:
        yield
    finally:
        drawn_from.set_state(state)


def _on_cpu(values: Any) -> bool:
    """Whether a tensor with dims is on the CPU; a tensor without dims counts as a number."""
    if isinstance(values, Tensor):
        return values.dim() > 0 and values.device.type == "cpu"
    return isinstance(values, (list, tuple)) and any(map(_on_cpu, values))


def _npu() -> Any:
    return torch.npu  # type: ignore[attr-defined] # torch_npu adds it


def _find_device(values: list[Any]) -> torch.device | None:
    for value in values:
        if isinstance(value, (Tensor, torch.Generator)) and value.device.type == "npu":
            return value.device
        if isinstance(value, torch.device) and value.type == "npu":
            return value
        if isinstance(value, (list, tuple)) and (device := _find_device(list(value))):
            return device
    return None


def _device_of(values: list[Any]) -> torch.device:
    """The device of a call: that of the first argument that has one, else the current device."""
    device = _find_device(values)
    if device is None or device.index is None:
        return torch.device("npu", _npu().current_device())
    return device


def _has_generator(values: list[Any]) -> bool:
    return any(isinstance(value, torch.Generator) for value in values)


def _write_back(target: Any, result: Any) -> None:
    """Copy an argument that the operator wrote to from the CPU back to the npu tensor."""
    if isinstance(target, (list, tuple)):
        for one_target, one_result in zip(target, result, strict=True):
            _write_back(one_target, one_result)
    elif isinstance(target, Tensor) and target is not result:
        if target.shape != result.shape:
            target.resize_(result.shape)
        target.copy_(result)


def _to_npu(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous().to(device)  # the vendor's kernels return contiguous results too
    if isinstance(value, (list, tuple)):
        return type(value)(_to_npu(item, device) for item in value)
    return value


class _CpuKernel:
    """The fallback of one operator overload."""

    def __init__(self, op: torch._ops.OpOverload, captures: CapturedWork) -> None:
        self.op, self.captures = op, captures
        schema = op._schema
        self.written = [
            (i, argument.name)
            for i, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        sets = {
            argument.name: frozenset(argument.alias_info.before_set)
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        # For each result: the name of the written argument that it is, if it is one.
        self.returned: list[str | None] = []
        for result in schema.returns:
            result_set = frozenset(result.alias_info.before_set if result.alias_info else ())
            self.returned.append(
                next((name for name, one in sets.items() if one & result_set), None)
            )
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.names = [argument.name for argument in schema.arguments]
        self.takes_cpu = schema.name.removeprefix("aten::") in TAKES_CPU

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.takes_cpu:
            self._check_devices(args, kwargs)
        if self.captures.is_capturing(lambda: _device_of([*args, *kwargs.values()])):
            return self._record(args, kwargs)
        cpu_args = [_to_cpu(value) for value in args]
        cpu_kwargs = {name: _to_cpu(value) for name, value in kwargs.items()}
        if "device" in self.names and cpu_kwargs.get("device") is None:
            cpu_kwargs["device"] = torch.device("cpu")
        if self.draws and not _has_generator([*args, *kwargs.values()]):
            with _seeded(_device_of([*args, *kwargs.values()])):
                result = self.op(*cpu_args, **cpu_kwargs)
        else:
            result = self.op(*cpu_args, **cpu_kwargs)

        written = self._written(args, kwargs)
        for target, value in zip(
            written.values(), self._written(cpu_args, cpu_kwargs).values(), strict=True
        ):
            _write_back(target, value)
        return self._results(
            result, written, lambda value: _to_npu(value, _device_of([*args, *kwargs.values()]))
        )

    def _check_devices(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse a CPU tensor beside npu tensors, with torch_npu's message, and name it."""
        for name, value in [*zip(self.names, args, strict=False), *kwargs.items()]:
            if _on_cpu(value):
                raise RuntimeError(
                    "Expected all tensors to be on the same device. Expected NPU tensor, please "
                    f"check whether the input tensor device is correct: {name} of {self.op} is on "
                    "the CPU."
                )

    def _written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments the operator writes to, by name."""
        return {name: args[i] if i < len(args) else kwargs.get(name) for i, name in self.written}

    def _results(self, result: Any, written: dict[str, Any], give: Callable[[Any], Any]) -> Any:
        """The caller's results: arguments that were written to, and `give` of the other results."""
        if not self.returned:
            return None
        results = result if len(self.returned) > 1 else (result,)
        out = [
            give(value) if source is None else written[source]
            for value, source in zip(results, self.returned, strict=True)
        ]
        return tuple(out) if len(out) > 1 else out[0]

    def _record(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Record the call for the graph that is being captured; compute only its shapes now."""
        if self.draws:
            raise RuntimeError(f"cann_host: {self.op} draws random numbers, which is not captured.")
        device = _device_of([*args, *kwargs.values()])
        if "device" in self.names and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": device}
        meta_args = captured.on_meta(args)
        meta_kwargs = {name: captured.on_meta(value) for name, value in kwargs.items()}
        try:
            shapes = self.op(*meta_args, **meta_kwargs)
        except NotImplementedError as error:
            raise RuntimeError(
                f"cann_host: {self.op} is not captured: the shape of its result depends on values, "
                "or PyTorch does not tell it."
            ) from error
        written = self._written(args, kwargs)
        for name, meta in self._written(meta_args, meta_kwargs).items():
            if isinstance(meta, Tensor) and meta.shape != written[name].shape:
                raise RuntimeError(f"cann_host: {self.op} would resize {name} in a captured graph.")

        made: list[Tensor] = []

        def make(value: Any) -> Any:
            if isinstance(value, Tensor):
                made.append(torch.empty(value.shape, dtype=value.dtype, device=device))
                return made[-1]
            return type(value)(map(make, value)) if isinstance(value, (list, tuple)) else value

        results = self._results(shapes, written, make)
        used = list(captured.tensors([*args, *kwargs.values(), *made]))
        cpu_args = captured.on_memory(args)
        cpu_kwargs = {name: captured.on_memory(value) for name, value in kwargs.items()}
        cpu_written = self._written(cpu_args, cpu_kwargs)
        cpu_made = captured.on_memory(made)

        def work() -> None:
            places = iter(cpu_made)

            def place(value: Any) -> None:
                if isinstance(value, Tensor):
                    next(places).copy_(value)
                elif isinstance(value, (list, tuple)):
                    for item in value:
                        place(item)

            self._results(self.op(*cpu_args, **cpu_kwargs), cpu_written, place)

        self.captures.record(device, str(self.op), used, work)
        return results


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
        self.count = 0
        for name, op in _overloads():
            if op._schema.name.removeprefix("aten::") in KEPT or _makes_view(op):
                continue
            self.count += self._replace(name, op)

    def _replace(self, name: str, op: torch._ops.OpOverload) -> bool:
        """Replace one overload's kernels. Returns whether PyTorch has a kernel for it."""
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
            self._replacements.replace(name, _CpuKernel(op, self._captures), "PrivateUse1")
            if not has_kernel(name, "AutogradPrivateUse1"):
                return True
            # The vendor's gradient would call the vendor's backward kernels.
            stock = stock_kernel(op, "AutogradCPU")
            keys = ["AutogradPrivateUse1"]
        else:
            return False
        choose = _attention if op._schema.name == _ATTENTION else _prefer
        for key in keys:
            kernel = partial(choose, stock, self._replacements.vendor_kernel(op, key))
            self._replacements.replace(name, kernel, key, with_keyset=True)
        return True
