"""Runs of a model that show something about it, and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import LinearQuantTypeError

__all__ = ["Forward", "arguments_of", "call", "evaluating", "moved_to_model", "running"]

Forward = Callable[..., Any]


def arguments_of(inputs: Any, what: str = "inputs hold") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with: a mapping by keyword, a tuple or list by position, a tensor as the
    only argument.

    Args:
        inputs: one of these.
        what: how the message begins.

    Raises:
        LinearQuantTypeError: they are something else.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    raise LinearQuantTypeError(
        f"{what} a {type(inputs).__name__}; allowed are a tensor, a tuple or list of "
        "positional arguments, or a mapping of keyword arguments. What to do: wrap it in a tuple."
    )


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with what `arguments_of` takes."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def moved_to_model(model: nn.Module, arguments: Any) -> Any:
    """Arguments whose tensors are on the model's device, if all of the model is on one."""
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    if len(devices) != 1:
        return arguments
    (device,) = devices
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def running(
    model: nn.Module, forwards: Mapping[nn.Module, Forward] | None = None
) -> Iterator[None]:
    """A block in which a model runs in evaluation mode, without gradients and without compiled
    graphs: those were traced before, and do not call the forwards that watch.

    Args:
        model: as before afterwards, also after an error.
        forwards: for some modules, what is called instead of theirs.
    """
    with ExitStack() as undo:
        for module, forward in (forwards or {}).items():
            undo.callback(_restore_forward, module, vars(module).get("forward"))
            vars(module)["forward"] = forward
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _restore_forward(module: nn.Module, own: Forward | None) -> None:
    if own is not None:
        vars(module)["forward"] = own
    else:
        vars(module).pop("forward", None)
