"""A model without weights, as if it had them: its large tensors get memory that nobody writes or
reads, so that the machine gives it no pages.

The model may be on meta. `copied` gives it tensors, and in a block of `DryRun` calls of
operators on large tensors return such tensors again, of the right shape, dtype, device and format.
What is small is computed: scales, biases, the positions of tokens. So all code for models with
weights, which merges, folds and casts them, works unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from ..modules.linear_quant import LinearQuant
from ..modules.quantized_linear import QuantizedLinear
from ..rules.plan import Spec
from ..rules.tables import ND

__all__ = [
    "DryRun",
    "arguments_by_name",
    "copied",
    "is_dry",
    "is_on_meta",
    "outside",
    "with_values",
    "without_values",
]

_SMALL = 1 << 16  # bytes; a tensor of one dim is small too


def is_on_meta(model: nn.Module) -> bool:
    """Whether some of a model's tensors have no memory."""
    return any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def copied(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, to be run in a block of `DryRun`.

    Large tensors are the model's own, or have memory that holds nothing if those are not on the
    CPU. Small ones are copied; those on meta become ones: scales that are equal, finite and not 0.
    Tied tensors stay tied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in own:
            if type(tensor) in (Tensor, nn.Parameter) and id(tensor) not in memo:
                memo[id(tensor)] = _copied(tensor)
    new = copy.deepcopy(model, memo)
    for module in new.modules():
        if isinstance(module, QuantizedLinear):
            module._derive()
        if isinstance(module, LinearQuant):
            module.note_weight_format()
            module.note_scale()
    return new


def _copied(tensor: Tensor) -> Tensor:
    if _is_large(tensor) and tensor.is_cpu:
        return tensor
    if _is_large(tensor) or tensor.is_meta:
        new = _filled(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype))
    else:
        new = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def with_values(argument: Any, device: str) -> Any:
    """An argument of a model, its tensors on a device. One on meta, and a Spec, become zeros."""
    if isinstance(argument, Spec):
        return torch.zeros(argument.shape, dtype=argument.dtype, device=device)
    if isinstance(argument, Tensor) and argument.is_meta:
        return torch.zeros(argument.shape, dtype=argument.dtype, device=device)
    return argument.to(device) if isinstance(argument, Tensor) else argument


def is_dry() -> bool:
    """Whether this is a block of `DryRun`."""
    return any(isinstance(mode, DryRun) for mode in _get_current_dispatch_mode_stack())


@contextmanager
def outside() -> Iterator[None]:
    """A block outside of `DryRun`, for torch.compile, which traces nothing inside."""
    with _disable_current_modes():
        yield


def _is_large(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.numel() * tensor.element_size() > _SMALL


def _filled(tensor: Tensor) -> Tensor:
    """A tensor of ones if it is small."""
    return tensor if _is_large(tensor) else tensor.fill_(1)


class DryRun(TorchDispatchMode):
    """A block in which calls on large tensors are not computed."""

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
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call returns."""
        large: list[Tensor] = []
        tree_map_only(Tensor, lambda t: large.append(t) if _is_large(t) else None, (args, kwargs))
        if not large or _is_view(func):
            return func(*args, **kwargs)
        if (written := _written(func, args, kwargs)) is not None:
            return written
        if func._opname in _CASTS:  # torch_npu has no fake kernel of it
            return _made(self._fake.from_tensor(args[0]), int(args[1]))
        try:
            return self.not_computed(func, args, kwargs)
        except (NotImplementedError, *_OF_VALUES):  # its result depends on values
            return func(*args, **kwargs)

    def not_computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Results of the shape, dtype, device and format that a call has."""
        with self._fake:
            fake_args, fake_kwargs = tree_map_only(Tensor, self._fake.from_tensor, (args, kwargs))
            found = func(*fake_args, **fake_kwargs)
        keeps = func._opname in _KEEP_FORMAT
        return tree_map(lambda value: _made(value, format_of(args[0]) if keeps else ND), found)

    def made(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A result on the CPU."""
        return _filled(torch.empty(tuple(shape), dtype=dtype))


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


def arguments_by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of its operator's schema; those left out are absent."""
    names = (argument.name for argument in func._schema.arguments)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call that writes into its arguments returns; None if it does not write."""
    given = arguments_by_name(func, args, kwargs)
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
    return _filled(
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    )


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
