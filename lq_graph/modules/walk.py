"""Replacing submodules of a model: where they are held, which may be replaced, all or nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from inspect import signature
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ..errors import LinearQuantTypeError

__all__ = [
    "all_or_nothing",
    "carry_over",
    "held_elsewhere",
    "keeps_grad_mode",
    "one_at_a_time",
    "places_of",
    "put",
    "tensors_beside",
    "uninterrupted",
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
_DEPTH = 4  # of objects in objects that are searched for modules
_REACHED = ("_parameters", "_buffers", "_modules")  # of a module: where replacements go
# what can hold no module, or is not the model's
_NO_HOLDERS = (str, bytes, bytearray, memoryview, range, int, float, complex, type, ModuleType)
_PLAIN: dict[type[nn.Module], nn.Module] = {}

Places = Iterable[tuple[nn.Module, str]]
_Function = TypeVar("_Function", bound=Callable[..., Any])


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


def places_of(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """For each submodule, every (parent, attribute) that holds it; shared ones have several."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place. By the dict itself, for a parent's own __setattr__ may refuse it when
    others are in place already."""
    parent._modules[name] = module


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """Submodules that something of the model's modules holds, itself or its weight, where no
    replacement reaches them. By each the name of the attribute.

    Looked at are attributes of modules and of their classes, and hooks; in them collections,
    functions with what they enclose, and plain objects, a few levels deep. Nothing is consumed.
    """
    found: dict[nn.Module, str] = {}
    inside = set(model.modules())
    owners: dict[int, list[nn.Module]] = {}
    for module in inside:
        for parameter in module.parameters():
            owners.setdefault(_memory(parameter), []).append(module)

    def note(value: object, attribute: str) -> None:
        for held in _held_in(value, _DEPTH, seen):
            if isinstance(held, Tensor):
                for owner in owners.get(_memory(held), ()):
                    found.setdefault(owner, attribute)
                continue
            found.setdefault(held, attribute)
            if held not in inside:
                for part in held.modules():
                    found.setdefault(part, attribute)

    seen: dict[int, int] = {}
    kinds: dict[type, None] = {}
    for name, module in model.named_modules():
        kinds.update(dict.fromkeys(type(module).__mro__))
        for attribute, value in vars(module).items():
            if attribute not in _REACHED:
                note(value, f"{name}.{attribute}" if name else attribute)
    for kind in kinds:
        if not _is_torchs(kind) and kind is not object:
            for attribute, value in list(vars(kind).items()):
                note(value, f"{kind.__name__}.{attribute}")
    return found


def tensors_beside(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Tensors that attributes of a model's modules hold and that are no parameters or buffers, with
    the name of the attribute and the module that has it."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REACHED:
                for held in _held_in(value, _DEPTH, {}):
                    if isinstance(held, Tensor):
                        yield f"{name}.{attribute}", module, held


def _memory(tensor: Tensor) -> int:
    """What two objects for the same memory have in common."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and not tensor.is_meta and tensor.data_ptr()) or id(tensor)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _held_in(value: object, depth: int, seen: dict[int, int]) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors in a value; `seen` has how deep each object was searched."""
    if isinstance(value, nn.Module | Tensor):
        yield value
        return
    if value is None or isinstance(value, _NO_HOLDERS) or seen.get(id(value), 0) >= depth:
        return
    seen[id(value)] = depth
    for part in _parts_of(value):
        yield from _held_in(part, depth - 1, seen)


def _parts_of(value: object) -> list[object]:
    """What an object holds."""
    parts: list[object] = []
    if isinstance(value, Mapping):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, Collection) and not hasattr(value, "__array__"):
        parts += value  # an iterator, which can be read once, is no Collection, nor a data loader
    if isinstance(value, MethodType):
        parts += [value.__self__, value.__func__]
    elif isinstance(value, partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, weakref.ref):
        parts.append(value())
    elif isinstance(value, FunctionType):
        parts += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
    if not _is_torchs(type(value)):
        parts += getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            names = vars(kind).get("__slots__", ())
            parts += [
                getattr(value, name, None)
                for name in ([names] if isinstance(names, str) else names)
                if name not in ("__dict__", "__weakref__")
            ]
    return parts


def keeps_grad_mode(function: _Function) -> _Function:
    """Decorator: whether gradients are recorded is afterwards as before, also when Ctrl-C comes
    while torch.no_grad() ends, which would leave them off for the rest of the process."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = torch.is_grad_enabled()
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return cast(_Function, wrapper)


def one_at_a_time() -> threading.RLock:
    """A lock that is free in a forked process, whose thread that held it is not there."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]
    return lock


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for the end of the block, or for a call of what the block is given: a point at
    which it may come. Python delivers it to the main thread only."""
    caught: list[tuple[Any, ...]] = []
    before = signal.getsignal(signal.SIGINT)

    def deliver() -> None:
        if not caught:
            return
        args = caught.pop()
        if callable(before):
            before(*args)
        elif before is signal.SIG_DFL:  # the process ends, as without us
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    # None: a handler that is not Python's, and cannot be put back
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield deliver
        return
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield deliver
    finally:
        signal.signal(signal.SIGINT, before)
        deliver()


@contextmanager
def all_or_nothing() -> Iterator[ExitStack]:
    """A block whose steps are taken back, last first, when one of them fails.

    Note in the stack what takes a step back before the step: `undo.callback(...)`. Ctrl-C waits for
    the end of the block, so do what takes long before it.
    """
    with uninterrupted(), ExitStack() as undo:
        yield undo
        undo.pop_all()
