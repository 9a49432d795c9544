"""May another module take a module's place, and what must it take over?"""

from __future__ import annotations

import sys
import warnings
from inspect import signature
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..errors import LinearQuantTypeError
from .places import Places

__all__ = [
    "carry_over",
    "why_not_replaceable",
]

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
# modules that read the weight of a layer they hold and do not call the layer, all or some of the
# time
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_PLAIN: dict[type[nn.Module], nn.Module] = {}


def why_not_replaceable(module: nn.Module, kind: type[nn.Module], places: Places = ()) -> str:
    """Why a module does more than its kind says, so that one of another kind cannot stand in its
    place; empty if it may.

    Plain attributes of the instance are no reason: `carry_over` takes them along. Neither are
    `requires_grad` and the training flag.

    Args:
        module: that is to be replaced.
        kind: the class whose behaviour the replacement has, nn.Linear for example.
        places: where it is held, of `places_of`; for parents that do not call it.
    """
    if type(module) is not kind:
        return f"a {type(module).__name__}, whose forward may differ from {_name(kind)}'s"
    if _is_patched(kind):
        return f"the forward of {_name(kind)} itself was replaced by another, which would be lost"
    if kind is nn.Linear and nn.functional.linear is not torch._C._nn.linear:
        return "torch.nn.functional.linear was replaced by another, which would be lost"
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "there are forward hooks for all modules, which may act on it"
    why = _own_behaviour(module, _plain(kind))
    return why or next(filter(None, (_why_not_in(parent) for parent, _ in places)), "")


def _own_behaviour(module: nn.Module, plain: nn.Module) -> str:
    """What a module has that a plain one of its class has not."""
    own, kind = vars(module), type(plain)
    for attribute, what in _HOOKS.items():
        if own.get(attribute):
            return f"it has {what}, which would be lost"
    if own.get("_compiled_call_impl") is not None:
        return "it is compiled by itself, which would be lost: call module.compile() afterwards"
    added = {
        name: value
        for name, value in own.items()
        if name not in vars(plain) and value is not getattr(kind, name, plain)
    }
    for name, value in added.items():
        if hasattr(kind, name) and not isinstance(value, Tensor):
            return f"it has a {name} of its own, which would be lost"
    for name, value in added.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            return f"it has a method of its own, {name}, which would be lost"
    for name, child in module._modules.items():
        usual = plain._modules.get(name)
        if child is not None and usual is None:
            return f"it holds a module of its own, {name}, which would be lost"
        if child is not None and usual is not None:
            if type(child) is not type(usual):
                return f"its {name} is a {type(child).__name__}"
            if why := _own_behaviour(child, usual):
                return f"its {name}: {why}"
    usual_tensors = {**plain._parameters, **plain._buffers}
    if absent := [name for name in plain._parameters if name not in module._parameters]:
        return f"its {absent[0]} is no parameter, so something else computes it"
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            if name not in usual_tensors:
                return f"it holds a tensor of its own, {name}, which would be lost"
            if type(tensor) not in (Tensor, nn.Parameter):
                return f"its {name} is a {type(tensor).__name__}, with behaviour of its own"
            if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
                return f"its {name} has gradient hooks, which would be lost"
    return ""


def _why_not_in(parent: nn.Module) -> str:
    """Why a parent needs the module that it holds as it is."""
    if isinstance(parent, _READERS):
        kind = next(kind for kind in _READERS if isinstance(parent, kind))
        return f"nn.{kind.__name__} reads the weight itself, on its fast path"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it takes seconds
    if dynamo is not None and isinstance(parent, dynamo.OptimizedModule):
        return "it is compiled by itself: call torch.compile on it afterwards"
    return ""


def _is_patched(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class is another than that of the file it stands in."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    forward = getattr(vars(owner)["forward"], "__globals__", None)
    return forward is not vars(sys.modules[owner.__module__]) or "__call__" in vars(kind)


def _plain(kind: type[nn.Module]) -> nn.Module:
    """An instance of a class as its constructor leaves it."""
    if kind not in _PLAIN:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a deprecated class says so
            make = getattr(kind, "_plain", None)
            parameters = signature(kind).parameters
            sizes = (8, 8) if "in_features" in parameters else ()
            # not `with torch.device("meta")`, which Ctrl-C could leave set
            device = {"device": "meta"} if "device" in parameters else {}
            _PLAIN[kind] = kind(*sizes, **device) if make is None else make()
    return _PLAIN[kind]


def _name(kind: type[nn.Module]) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn") else kind.__name__


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give a replacement the training flag and the plain attributes that its predecessor's instance
    has beside those of its class: names, indices, marks of libraries.

    Call it before the replacement is put in place.

    Raises:
        LinearQuantTypeError: the replacement has something else of that name.
    """
    usual = vars(_plain(type(old)))
    own = {name: value for name, value in vars(old).items() if name not in usual}
    if clash := [name for name in own if hasattr(new, name)]:
        raise LinearQuantTypeError(
            f"the layer has an attribute of its own, {clash[0]}, and {_name(type(new))} has one of "
            "that name for itself; nothing was changed. What to do: rename it, or leave the layer "
            "out."
        )
    vars(new).update(own)
    new.train(old.training)
