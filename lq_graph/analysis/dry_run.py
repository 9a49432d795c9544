"""A model without weights, as if it had them: its large tensors get memory that nobody writes or
reads, so that the machine gives it no pages.

The model may be on meta. `with_memory` gives it tensors, and in a block of `dry_run` calls of
operators on large tensors return such tensors again, of the right shape, dtype, device and format.
What is small is computed: scales, biases, the positions of tokens. So all code for models with
weights, which merges, folds and casts them, works unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_map, tree_map_only

from ..backends.npu import format_of
from ..rules.plan import Spec
from ..rules.tables import ND

__all__ = [
    "dry_run",
    "is_dry",
    "is_on_meta",
    "outside",
    "with_memory",
    "with_values",
    "without_values",
]

_SMALL = 1 << 16  # bytes; a tensor of one dim is small too


def is_on_meta(model: nn.Module) -> bool:
    """Whether some of a model's tensors have no memory."""
    return any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def with_memory(model: nn.Module, device: str = "cpu") -> None:
    """Give the tensors of a model that are on meta memory, in place; tied ones stay tied.

    Small ones hold ones: scales that are equal, finite and not 0. The others hold nothing.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        own |= {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        for name, tensor in own.items():
            if tensor is None or not tensor.is_meta:
                continue
            if id(tensor) not in made:
                made[id(tensor)] = _filled(tensor, device)
            setattr(module, name, made[id(tensor)])


def with_values(argument: Any, device: str) -> Any:
    """An argument of a model, its tensors on a device. One on meta, and a Spec, become zeros."""
    if isinstance(argument, Spec):
        return torch.zeros(argument.shape, dtype=argument.dtype, device=device)
    if isinstance(argument, Tensor) and argument.is_meta:
        return torch.zeros(argument.shape, dtype=argument.dtype, device=device)
    return argument.to(device) if isinstance(argument, Tensor) else argument


@contextmanager
def dry_run() -> Iterator[None]:
    """A block in which calls on large tensors are not computed."""
    with _DryRun():
        yield


def is_dry() -> bool:
    """Whether this is a block of `dry_run`."""
    return any(isinstance(mode, _DryRun) for mode in _get_current_dispatch_mode_stack())


@contextmanager
def outside() -> Iterator[None]:
    """A block outside of `dry_run`, for torch.compile, which traces nothing inside."""
    with _disable_current_modes():
        yield


def _filled(tensor: Tensor, device: str) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if not _is_large(new):
        new.fill_(1)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


def _is_large(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.numel() * tensor.element_size() > _SMALL


class _DryRun(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        large: list[Tensor] = []
        tree_map_only(Tensor, lambda t: large.append(t) if _is_large(t) else None, (args, kwargs))
        if not large or _is_view(func):
            return func(*args, **kwargs)
        if (written := _written(func, args, kwargs)) is not None:
            return written
        if func._opname in _CASTS:  # torch_npu has no fake kernel of it
            return _made(self._fake.from_tensor(args[0]), int(args[1]))
        try:
            with self._fake:
                fakes = tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
                found = func(*fakes[0], **fakes[1])
        except (NotImplementedError, *_OF_VALUES):  # its result depends on values
            return func(*args, **kwargs)
        acl_format = format_of(large[0]) if func._opname in _KEEP_FORMAT else ND
        return tree_map(lambda value: _made(value, acl_format), found)


_CASTS = ("npu_format_cast", "_npu_format_cast")
_KEEP_FORMAT = ("clone", "empty_like")
_OF_VALUES = tuple(
    getattr(torch._subclasses.fake_tensor, name)
    for name in (
        "DataDependentOutputException",
        "DynamicOutputShapeException",
        "UnsupportedOperatorException",
    )
)


def _is_view(func: Any) -> bool:
    """Whether the results are views, or only sizes and the like change: no values are read."""
    returned = [one.alias_info for one in func._schema.returns]
    return torch.Tag.inplace_view in func.tags or (
        any(alias is not None for alias in returned)
        and not any(alias is not None and alias.is_write for alias in returned)
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call that writes into its arguments returns; None if it does not write."""
    given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
    found = [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if not found or not func._schema.returns:
        return None
    return found[0] if len(func._schema.returns) == 1 else tuple(found)


def _made(value: Any, acl_format: int) -> Any:
    """A tensor like a fake one, with memory. A small one holds ones."""
    if not isinstance(value, FakeTensor):
        return value
    if acl_format != ND:
        import torch_npu

        return torch_npu.empty_with_format(
            value.shape, dtype=value.dtype, device=value.device, acl_format=acl_format
        )
    made = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
    return made if _is_large(made) else made.fill_(1)


def without_values(backend: Callable[..., Any], lowered: type[Exception]) -> Callable[..., Any]:
    """A backend of torch.compile whose graphs return tensors that hold nothing.

    Args:
        backend: makes a graph. The graph raises `lowered` when it is called.
        lowered: is not passed on.
    """

    def compile_graph(gm: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        run = backend(gm, inputs, **options)
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        values = tree_map(_value_of, output.args[0])

        def call(*args: Any) -> Any:
            with suppress(lowered):
                run(*args)
            return tree_map(lambda value: _made(value, ND), values)

        return call

    return compile_graph


def _value_of(argument: Any) -> Any:
    return argument.meta.get("example_value") if isinstance(argument, fx.Node) else argument
