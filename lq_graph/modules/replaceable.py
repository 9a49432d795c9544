"""Whether a module may be replaced by one of another class, and what the replacement takes over."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container, Iterable
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..errors import LinearQuantTypeError
from .places import Place

__all__ = [
    "carry_over",
    "why_not_replaceable",
]

# hooks of an nn.Module, which a replacement would lose, by the attribute that holds them
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
# modules that may read the weight of a layer they hold instead of calling the layer
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_PLAIN: dict[type[nn.Module], nn.Module] = {}


def why_not_replaceable(
    module: nn.Module,
    kind: type[nn.Module],
    places: Iterable[Place] = (),
    kept_hooks: Container[int] = (),
) -> str:
    """Why a module must not be replaced; empty if it may be.

    A module may be replaced if it does what its class does and nothing else. Plain attributes of
    the instance are no reason to refuse, because `carry_over` copies them; neither are
    `requires_grad` and the training flag.

    Args:
        module: the module to replace.
        kind: the class that the replacement behaves like, nn.Linear for example.
        places: where the model holds it, from `places_of`; some parents do not call their child.
        kept_hooks: ids of hooks that are not lost.
    """
    if type(module) is not kind:
        return f"a {type(module).__name__}, whose forward may differ from {_name(kind)}'s"
    if _is_patched(kind):
        return f"the forward of class {_name(kind)} was patched, and the patch would be lost"
    if kind is nn.Linear and nn.functional.linear is not torch._C._nn.linear:
        return "torch.nn.functional.linear was patched, and the patch would be lost"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "there are forward hooks for all modules, which may act on it"
    why = _own_behaviour(module, _plain(kind), kept_hooks)
    return why or next(filter(None, (_why_not_in(parent) for parent, _ in places)), "")


def _hooks_of(module: nn.Module, kept: Container[int]) -> str:
    for attribute, what in _HOOKS.items():
        if any(hook not in kept for hook in vars(module).get(attribute) or ()):
            return f"it has {what}, which would be lost"
    return ""


def _own_behaviour(module: nn.Module, plain: nn.Module, kept_hooks: Container[int]) -> str:
    """What a module has that a new module of its class does not have; empty if nothing."""
    own, kind = vars(module), type(plain)
    if why := _hooks_of(module, kept_hooks):
        return why
    if own.get("_compiled_call_impl") is not None:
        return "module.compile() was called on it, which would be lost: call it afterwards"
    added = {
        name: value
        for name, value in own.items()
        if name not in vars(plain) and value is not getattr(kind, name, plain)
    }
    for name, value in added.items():
        if hasattr(kind, name) and not isinstance(value, Tensor):
            return f"it has its own {name}, which would be lost"
    for name, value in added.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            return f"it has its own method {name}, which would be lost"
    for name, child in module._modules.items():
        usual = plain._modules.get(name)
        if child is not None and usual is None:
            return f"it holds an additional module, {name}, which would be lost"
        if child is not None and usual is not None:
            # a MergedPart stands for a LinearQuant
            stands_for = getattr(type(child), "stands_for", type(child))
            if stands_for is not type(usual):
                return f"its {name} is a {type(child).__name__}"
            why = (
                _hooks_of(child, kept_hooks)
                if stands_for is not type(child)
                else _own_behaviour(child, usual, kept_hooks)
            )
            if why:
                return f"its {name}: {why}"
    usual_tensors = {**plain._parameters, **plain._buffers}
    if absent := [name for name in plain._parameters if name not in module._parameters]:
        return f"its {absent[0]} is not a parameter, so something else computes it"
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            if name not in usual_tensors:
                return f"it holds an additional tensor, {name}, which would be lost"
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"its {name} is a {type(tensor).__name__}, which may behave differently"
            if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                return f"its {name} has gradient hooks, which would be lost"
    return ""


def _why_not_in(parent: nn.Module) -> str:
    """Why a parent needs its child unchanged; empty if it does not."""
    if isinstance(parent, _READERS):
        kind = next(kind for kind in _READERS if isinstance(parent, kind))
        return f"nn.{kind.__name__} reads the weight itself, on its fast path"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    if dynamo is not None and isinstance(parent, dynamo.OptimizedModule):
        return "torch.compile was called on this module alone: call it afterwards"
    return ""


def _is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class, or its __call__, comes from elsewhere than its own file."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = getattr(vars(owner)["forward"], "__globals__", None)
    return forward is not vars(sys.modules[owner.__module__]) or "__call__" in vars(kind)


def _plain(kind: type[nn.Module]) -> nn.Module:
    """A new instance of a class."""
    if kind not in _PLAIN:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated classes
            make = getattr(kind, "_plain", None)
            parameters = signature(kind).parameters
            sizes = (8, 8) if "in_features" in parameters else ()
            # not `with torch.device("meta")`: Ctrl-C could leave it set
            device = {"device": "meta"} if "device" in parameters else {}
            _PLAIN[kind] = kind(*sizes, **device) if make is None else make()
    return _PLAIN[kind]


def _name(kind: type[nn.Module]) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn") else kind.__name__


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Copy the training flag, and the plain attributes that were set on the instance (names,
    indices, marks of libraries), to a replacement.

    Call it before the replacement is put in place.

    Raises:
        LinearQuantTypeError: the replacement has another attribute of that name.
    """
    usual = vars(_plain(type(old)))
    own = {name: value for name, value in vars(old).items() if name not in usual}
    if clash := [name for name in own if hasattr(new, name)]:
        raise LinearQuantTypeError(
            f"the layer has an attribute of its own, {clash[0]}, and {_name(type(new))} uses that "
            "name itself; the model is unchanged. What to do: rename it, or leave the layer out."
        )
    vars(new).update(own)
    new.train(old.training)
