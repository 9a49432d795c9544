"""PyTorch's CPU kernel for an operator on npu tensors: on their own memory where this is possible,
else on copies. While a graph is captured, the call is recorded for its replays instead
(captured.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cann_host.aten import captured
from cann_host.aten.captured import CapturedWork
from cann_host.aten.host_views import (
    HostViews,
    can_write,
    check_overlap,
    is_expanded,
    note_written,
)
from cann_host.aten.nz_weights import with_nd_weight
from cann_host.bindings import CAPTURES, WAITS

__all__ = ["CpuKernel"]

# torch_npu copies the indices of these to the device itself (op-plugin, AdvancedIndex.cpp)
TAKES_CPU = frozenset(
    {"_index_put_impl_", "index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"}
)

# Types of arguments that hold no tensor and no device
_NUMBERS = frozenset(
    {type(None), bool, int, float, complex, str, torch.dtype, torch.memory_format, torch.layout}
)
_CPU = torch.device("cpu")


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


def _has_cpu(values: Any) -> bool:
    """Whether a tensor with dims is on the CPU; a tensor without dims counts as a number."""
    if isinstance(values, Tensor):
        return values.dim() > 0 and values.device.type == "cpu"
    return isinstance(values, (list, tuple)) and any(map(_has_cpu, values))


def _npu() -> Any:
    return torch.npu  # type: ignore[attr-defined] # torch_npu adds it


class _Found:
    """What the arguments of a call hold."""

    __slots__ = ("device", "generators", "has_cpu", "tensors")

    def __init__(self, *arguments: Sequence[Any]) -> None:
        self.device: torch.device | None = None  # the first that an argument has
        self.tensors: list[Tensor] = []  # on the npu
        self.generators: list[torch.Generator] = []
        self.has_cpu = False  # a tensor with dims
        for values in arguments:
            self._look(values)
        if self.device is None or self.device.index is None:
            self.device = torch.device("npu", _npu().current_device())

    def _look(self, values: Sequence[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _NUMBERS:
                continue
            if kind is list or kind is tuple:
                self._look(value)
            elif isinstance(value, Tensor):
                device = value.device
                if device.type == "npu":
                    self.tensors.append(value)
                    if self.device is None:
                        self.device = device
                elif not self.has_cpu:
                    self.has_cpu = _has_cpu(value)
            elif isinstance(value, torch.Generator):
                self.generators.append(value)
                if self.device is None and value.device.type == "npu":
                    self.device = value.device
            elif self.device is None and isinstance(value, torch.device) and value.type == "npu":
                self.device = value


def _on_cpu(value: Any, views: dict[int, Tensor], seeded: dict[int, torch.Generator]) -> Any:
    """An argument on the CPU: the view of a tensor, else a copy, one for each time it is passed."""
    kind = type(value)
    if kind in _NUMBERS:
        return value
    if kind is list or kind is tuple:
        return [_on_cpu(item, views, seeded) for item in value]
    if isinstance(value, Tensor):
        if (view := views.get(id(value))) is not None:
            return view
        return value.cpu() if value.device.type == "npu" else value
    if isinstance(value, torch.device):
        return _CPU if value.type == "npu" else value
    return seeded.get(id(value), value)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _finish(target: Tensor, value: Tensor, *, is_view: bool) -> None:
    """Let an argument that the operator wrote to have its new value."""
    if is_view:
        if value.shape == target.shape and value.stride() == target.stride():
            return
        value = value.clone()  # an out= of another size
    if target.shape != value.shape:
        target.resize_(value.shape)
    target.copy_(value)


def _to_npu(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous().to(device)  # the vendor's kernels return contiguous results too
    if isinstance(value, (list, tuple)):
        return type(value)(_to_npu(item, device) for item in value)
    return value


class CpuKernel:
    """The fallback of one operator overload."""

    def __init__(self, op: torch._ops.OpOverload, captures: CapturedWork, views: HostViews) -> None:
        self.op, self.captures, self.views = op, captures, views
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
        self.takes_device = "device" in self.names
        self.takes_cpu = schema.name.removeprefix("aten::") in TAKES_CPU
        # t_() and others change only what a view says of the memory
        self.writes_memory = torch.Tag.inplace_view not in op.tags

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A default device or a function mode of the caller must not affect what is done here.
        with torch._C.DisableTorchFunction():
            found = _Found(args, tuple(kwargs.values())) if kwargs else _Found(args)
            device = found.device
            assert device is not None
            if found.has_cpu and not self.takes_cpu:
                self._check_devices(args, kwargs)
            state = self.views.state(device)
            if state & CAPTURES and self.captures.is_capturing(device):
                return self._record(args, kwargs, device)
            if state & WAITS:
                self.views.wait({tensor.device: None for tensor in found.tensors})
            return self._compute(args, kwargs, found, device)

    def _compute(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        found: _Found,
        device: torch.device,
        *,
        on_memory: bool = True,
    ) -> Any:
        """Compute on the tensors' own memory; on copies, if the operator could not write there."""
        written = self._written(args, kwargs)
        targets = list(_tensors(written.values())) if written else []
        if targets:
            if not can_write(targets, found.tensors):
                check_overlap(targets, found.tensors)
                # the kernel itself takes or refuses a tensor that was expanded
                on_memory = on_memory and any(map(is_expanded, targets))
            on_memory = on_memory and self.writes_memory
        views = self._views_of(found.tensors, targets) if on_memory else {}
        for target in targets:
            if id(target) not in views:
                self.views.check_written(target, self.op)
        seeded: dict[int, torch.Generator] = {}
        if found.generators:
            npu = [one for one in found.generators if one.device.type == "npu"]
            seeded = {id(one): _cpu_generator(one) for one in npu}
        cpu_args = [_on_cpu(value, views, seeded) for value in args]
        cpu_kwargs = {name: _on_cpu(value, views, seeded) for name, value in kwargs.items()}
        if self.takes_device and cpu_kwargs.get("device") is None:
            cpu_kwargs["device"] = _CPU
        try:
            if self.draws and not found.generators:
                with _seeded(device):
                    result = self.op(*cpu_args, **cpu_kwargs)
            else:
                result = self.op(*cpu_args, **cpu_kwargs)
        except RuntimeError as error:
            # an out= of another size, which no view can grow to
            if not (targets and views and "not resizable" in str(error)):
                raise
            return self._compute(args, kwargs, found, device, on_memory=False)
        finally:
            for target in targets:
                if id(target) in views:
                    note_written(target)
        if not written and isinstance(result, Tensor):
            return _to_npu(result, device)
        if targets:
            values = _tensors(self._written(cpu_args, cpu_kwargs).values())
            for target, value in zip(targets, values, strict=True):
                _finish(target, value, is_view=id(target) in views)
        return self._results(result, written, lambda value: _to_npu(value, device))

    def _views_of(self, tensors: Iterable[Tensor], targets: Iterable[Tensor]) -> dict[int, Tensor]:
        """The views of tensors that can have one, by id. An out= may get another shape."""
        of, views, written = self.views.of, {}, set(map(id, targets))
        for tensor in tensors:
            if (view := of(tensor, is_new=id(tensor) in written)) is not None:
                views[id(tensor)] = view
        return views

    def _check_devices(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Refuse a CPU tensor beside npu tensors, with torch_npu's message, and name it."""
        for name, value in [*zip(self.names, args, strict=False), *kwargs.items()]:
            if _has_cpu(value):
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

    def _record(self, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device) -> Any:
        """Record the call for the graph that is being captured; compute only its shapes now."""
        if self.draws:
            raise RuntimeError(f"cann_host: {self.op} draws random numbers, which is not captured.")
        args = with_nd_weight(self.op, args)
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
        check_overlap(list(_tensors(written.values())), captured.tensors([*args, *kwargs.values()]))
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

        targets = [*_tensors(written.values()), *made]
        self.captures.record(device, str(self.op), used, targets, work)
        return results
