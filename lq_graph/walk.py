"""Replacing submodules of a model: where they are held, which may be replaced, all or nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["all_or_nothing", "places_of", "uninterrupted", "why_not_replaceable"]

# hooks of nn.Module that a replacement would lose, by the attribute that holds them
_HOOKS = {
    "_forward_pre_hooks": "forward hooks",
    "_forward_hooks": "forward hooks",
    "_backward_pre_hooks": "backward hooks",
    "_backward_hooks": "backward hooks",
    "_state_dict_hooks": "state dict hooks",
    "_state_dict_pre_hooks": "state dict hooks",
    "_load_state_dict_pre_hooks": "state dict hooks",
    "_load_state_dict_post_hooks": "state dict hooks",
}
# what an instance may have of its own that its class's forward does not know
_METHODS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "state_dict")
_SETTINGS: dict[type[nn.Module], frozenset[str]] = {}


def why_not_replaceable(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why a module does more than its kind says, so that one of another kind cannot stand in its
    place; empty if it may.

    Args:
        module: that is to be replaced.
        kind: the class whose behaviour the replacement has, nn.Linear for example.
    """
    if type(module) is not kind:
        return f"a {type(module).__name__}, whose forward may differ from {_name(kind)}'s"
    own = vars(module)
    for name in _METHODS:
        if name in own:
            return f"it has a {name} of its own, which would be lost"
    for attribute, what in _HOOKS.items():
        if own.get(attribute):
            return f"it has {what}, which would be lost"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled by itself, which would be lost: call module.compile() afterwards"
    for name, child in module._modules.items():
        if child is not None:
            return f"it holds a module of its own, {name}, which would be lost"
    known = _tensors_of(kind)
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is None:
            continue
        if name not in known:
            return f"it holds a tensor of its own, {name}, which would be lost"
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"its {name} is a {type(tensor).__name__}, with behaviour of its own"
    return ""


def _tensors_of(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the parameters and buffers that instances of a class have."""
    if kind not in _SETTINGS:
        with torch.device("meta"):
            plain = kind(8, 8)
        _SETTINGS[kind] = frozenset([*plain._parameters, *plain._buffers])
    return _SETTINGS[kind]


def _name(kind: type[nn.Module]) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn") else kind.__name__


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each submodule, every (parent, attribute) that holds it; shared ones have several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Python delivers it to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """A block whose steps are taken back, last first, when one of them fails.

    Note in the stack what takes a step back before the step: `undo.callback(...)`. Ctrl-C waits for
    the end of the block, so do what takes long before it.
    """
    with uninterrupted(), ExitStack() as undo:
        yield undo
        undo.pop_all()
