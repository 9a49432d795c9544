"""Finds where a model holds a module or a tensor."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

__all__ = [
    "Place",
    "held_elsewhere",
    "places_of",
    "put",
    "tensors_beside",
]

_DEPTH = 4  # levels of objects in objects that are searched for modules
_REACHED = ("_parameters", "_buffers", "_modules")  # attributes in which a replacement is put
# types that hold no module, or hold modules that are not the model's
_NO_HOLDERS = (str, bytes, bytearray, memoryview, range, int, float, complex, type, ModuleType)
Place = tuple[nn.Module, str]  # a parent, and the name of its child


def places_of(model: nn.Module) -> dict[nn.Module, list[Place]]:
    """For each submodule, every (parent, name) that holds it; a shared one has several."""
    places: dict[nn.Module, list[Place]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
    return places


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in place. Writes to the dict, because a parent's own __setattr__ could refuse it
    when other modules are already replaced."""
    parent._modules[name] = module


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """Submodules, or owners of weights, that an attribute of some module holds too, so that a
    replacement would not reach them; each with the name of that attribute.

    It searches the attributes of modules and of their classes, hooks included, and in them
    collections, functions with their closures, and plain objects, a few levels deep. It does not
    consume iterators.
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
    """Tensors in plain attributes of a model's modules, neither parameters nor buffers: the name of
    the attribute, the module that has it, the tensor."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REACHED:
                for held in _held_in(value, _DEPTH, {}):
                    if isinstance(held, Tensor):
                        yield f"{name}.{attribute}", module, held


def _memory(tensor: Tensor) -> int:
    """A number that is equal for two tensor objects with the same memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and not tensor.is_meta and tensor.data_ptr()) or id(tensor)


def _is_torchs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def _held_in(value: object, depth: int, seen: dict[int, int]) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors in a value; `seen` has the depth to which each object was searched."""
    if isinstance(value, nn.Module | Tensor):
        yield value
        return
    if value is None or isinstance(value, _NO_HOLDERS) or seen.get(id(value), 0) >= depth:
        return
    seen[id(value)] = depth
    for part in _parts_of(value):
        yield from _held_in(part, depth - 1, seen)


def _parts_of(value: object) -> list[object]:
    """The objects that an object holds."""
    parts: list[object] = []
    if isinstance(value, Mapping):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, Collection) and not hasattr(value, "__array__"):
        parts += value  # iterators and data loaders, which can be read once, are not Collections
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
