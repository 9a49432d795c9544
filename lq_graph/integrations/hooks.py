"""The hooks with which accelerate moves inputs between devices, kept when a layer is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["hooks_put_back", "put_hook", "taken_hook"]

_HOOK = "_hf_hook"  # accelerate's attribute of a module


def taken_hook(module: nn.Module) -> Any:
    """Take accelerate's hook from a module and the modules in it; returns the module's, or None."""
    if not any(hasattr(inner, _HOOK) for inner in module.modules()):
        return None
    from accelerate.hooks import remove_hook_from_module

    hook = getattr(module, _HOOK, None)
    for inner in module.modules():
        remove_hook_from_module(inner)
        own = vars(inner).get("forward")  # accelerate leaves the class's own, set on the instance
        if own is not None and getattr(own, "__func__", None) is type(inner).forward:
            del inner.forward
    return hook


def put_hook(module: nn.Module, hook: Any) -> None:
    """Give a module a hook that another had."""
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)


@contextmanager
def hooks_put_back(model: nn.Module) -> Iterator[None]:
    """A block in which the nn.Linear layers of a model have no hooks of accelerate: a layer with a
    hook is not plain, and would stay float. Afterwards, what is in their place has them."""
    hooks = {
        name: taken_hook(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    try:
        yield
    finally:
        for name, hook in hooks.items():
            put_hook(model.get_submodule(name), hook)
