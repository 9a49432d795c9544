"""Which modules of a model can rescale the inputs of its linear layers: what a run shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .calibrate import run

__all__ = ["Source", "Trace", "address_of", "trace"]


class Source:
    """A norm or a linear layer, whose parameters can rescale the channels of its output.

    Attributes:
        name, module: of the model.
        refusal: why its output must stay as it is; empty if nothing else reads it.
        targets: the linear layers that take its output, or a product with its output.
        peak: (k,), the largest magnitude that they got in each channel.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.refusal = ""
        self.targets: dict[nn.Linear, None] = {}
        self.peak: Tensor | None = None

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def feed(self, layer: nn.Linear, x: Tensor) -> None:
        """It made the input x of a layer."""
        self.targets[layer] = None
        if x.numel():
            peak = x.abs().flatten(0, -2).amax(0).float()
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)


class Trace(TorchDispatchMode):
    """Follows the outputs of norms and linear layers through a run of a model.

    Outputs are known by their tensor object: a layer that gets a view or a copy gets something
    else. They are kept until the end of a run, because memory that is freed is used again.

    Attributes:
        sources: by module.
        fed_by: for each linear layer that was called, the sources of its inputs; None stands for
            anything else.
        read: modules of which something else read a parameter, with the operator.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sources: dict[nn.Module, Source] = {}
        self.fed_by: dict[nn.Linear, set[Source | None]] = {}
        self.read: dict[nn.Module, str] = {}
        self._made: dict[int, tuple[Tensor, Source]] = {}
        self._owners: dict[int, list[nn.Module]] = {}
        self._running: list[tuple[nn.Module, set[int]]] = []  # with the memory it was given
        for name, module in model.named_modules():
            if any(map(is_lazy, module.parameters(recurse=False))):
                continue
            if isinstance(module, nn.Linear) or _scales_its_output(module):
                self.sources[module] = Source(name, module)
                for parameter in module.parameters(recurse=False):
                    self._owners.setdefault(address_of(parameter), []).append(module)

    def watched(self, module: nn.Module) -> Callable[..., Any]:
        """A forward that does what the module's does, and follows what it takes and returns."""
        forward, source = module.forward, self.sources[module]
        checked = isinstance(module, nn.Linear)

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal checked
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self._running.append((module, {_memory(leaf) for leaf in leaves}))
            try:
                self._enter(module, source.name, args, kwargs)
                result = forward(*args, **kwargs)
                if not checked:
                    checked = True
                    if not _is_proportional(module, forward, args, kwargs, result):
                        source.refuse("its output is not proportional to its parameters")
            finally:
                self._running.pop()
            if isinstance(result, Tensor):
                if _memory(result) in self._made:
                    source.refuse("it returns its input")
                self._made[_memory(result)] = result, source
            return result

        return run

    def _enter(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> None:
        x = None
        if isinstance(module, nn.Linear):
            x = args[0] if args else kwargs["input"]
            made = self._made_as(x)
            self.fed_by.setdefault(module, set()).add(made)
            if made is not None:
                made.feed(module, x)
        for leaf in tree_leaves((args, kwargs)):
            if leaf is not x or self._made_as(leaf) is None:
                self._note_read(leaf, f"{name} reads it")

    def _made_as(self, tensor: Any) -> Source | None:
        """The source whose output a tensor is, this very object."""
        if isinstance(tensor, Tensor):
            made, source = self._made.get(_memory(tensor), (None, None))
            if made is tensor:
                return source
        return None

    def _note_read(self, leaf: Any, why: str) -> None:
        """Something reads a tensor, which may be an output, a view of one, or a parameter."""
        if not isinstance(leaf, Tensor):
            return
        memory, running = _memory(leaf), self._running
        if memory in self._made and not (running and memory in running[-1][1]):
            self._made[memory][1].refuse(why)
        for module in self._owners.get(address_of(leaf), ()):
            if not any(module is one for one, _ in running):
                self.read.setdefault(module, why)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        scaled = None
        if not self._running and func is torch.ops.aten.mul.Tensor and args[0] is not args[1]:
            same = (x for x in args if isinstance(x, Tensor) and x.shape[-1:] == result.shape[-1:])
            scaled = next((x for x in same if self._made_as(x) is not None), None)
        for leaf in tree_leaves((args, kwargs)):
            if leaf is not scaled:
                self._note_read(leaf, f"{func} reads it")
        if scaled is not None and result.dim():
            source = self._made_as(scaled)
            assert source is not None
            self._made[_memory(result)] = result, source
        return result

    def end(self, returned: Any) -> None:
        """A run is over: what the model returned, others will read."""
        for leaf in tree_leaves(returned):
            self._note_read(leaf, "the model returns it")
        self._made.clear()


def address_of(tensor: Tensor) -> int:
    """A number that is equal for tensors that begin at the same place of memory."""
    return (_is_plain(tensor) and tensor.data_ptr()) or id(tensor)


def _memory(tensor: Tensor) -> int:
    """A number that is equal for a tensor and its views."""
    return (_is_plain(tensor) and tensor.untyped_storage().data_ptr()) or id(tensor)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta


def _scales_its_output(module: nn.Module) -> bool:
    """Whether a module looks like a norm: it has one dim of parameters, and no modules in it."""
    shapes = {tuple(p.shape) for p in module.parameters(recurse=False)}
    one_dim = len(shapes) == 1 and len(shapes.pop()) == 1
    return one_dim and not module._modules and not isinstance(module, torch.jit.ScriptModule)


def _is_proportional(
    module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, result: Any
) -> bool:
    """Whether other factors in a norm's parameters are factors in its output: not in a norm that
    adds 1 to its weight, for example."""
    size = next(module.parameters(recurse=False)).shape[0]
    if not isinstance(result, Tensor) or result.shape[-1:] != (size,) or not result.numel():
        return False
    if not result.isfinite().all():
        return True  # smooth refuses the values
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # it may write into them
    factors = torch.where(torch.arange(size, device=result.device) % 3 == 0, 0.5, 0.25)
    parameters = {name: p * factors.to(p) for name, p in module.named_parameters(recurse=False)}
    kept = dict(module._parameters)
    try:
        module._parameters.update({n: nn.Parameter(p, False) for n, p in parameters.items()})
        found = forward(*args, **kwargs)
    finally:
        module._parameters.update(kept)
    want, found = result.float() * factors, found.float()
    return torch.allclose(found, want, rtol=2**-6, atol=1e-6 * float(want.abs().max()))


def trace(model: nn.Module, batches: Iterable[Any]) -> Trace:
    """Run a model, and find which modules made the inputs of its linear layers.

    Args:
        model: float; unchanged afterwards, also after an error.
        batches: what the model is called with, one at a time; see `runs.call`.

    Raises:
        LinearQuantTypeError: an input that a model cannot be called with.
        LinearQuantValueError: no batches.
    """
    found = Trace(model)
    forwards = {module: found.watched(module) for module in found.sources}
    run(model, batches, "smooth: inputs is empty", forwards, found, found.end)
    return found
