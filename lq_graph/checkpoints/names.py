"""The names that the tensors of the files have in the model.

Versions of transformers call the same modules by different names: the layers of a language model
are `model.layers` in a file, and `model.language_model.layers` in the model that also sees images.
A module of the files that the model lacks gets another name only if it is clear which: the only one
with the same name but for the parts that stand for a model as a whole; or, if the model has not one
of the quantized layers, the only one with another beginning.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..modules.quantized_linear import QuantizedLinear

__all__ = ["ModelNames", "NewNames"]

# the parts of names that stand for a model as a whole
_WHOLE = {"model", "language_model", "vision_model"}


@dataclass(frozen=True)
class NewNames:
    """The names in the model of modules that have another one in the files.

    Attributes:
        modules: by the name in the files.
    """

    modules: dict[str, str] = field(default_factory=dict)

    def module(self, name: str) -> str:
        """The name in the model of a module of the files."""
        return self.modules.get(name, name)

    def tensors(self, keys: Iterable[str]) -> dict[str, str]:
        """The names in the model of the tensors that have another one in the files."""
        names = {}
        for key in keys:
            own, _, part = key.rpartition(".")
            if own in self.modules:
                names[key] = f"{self.modules[own]}.{part}"
        return names


class ModelNames:
    """The modules of a model by name.

    Args:
        model: the model to load into.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._bare: dict[str, list[str]] = {}
        for name in self._modules:
            self._bare.setdefault(_bare(name), []).append(name)

    def classes(self, name: str) -> tuple[str, ...]:
        """Names of the classes of a module; those of nn.Linear for one that the model lacks."""
        module = self._modules.get(name)
        if module is None or isinstance(module, QuantizedLinear):
            return _LINEAR
        return _names(type(module))

    def new_names(self, layers: Iterable[str], keys: Iterable[str]) -> NewNames:
        """The new names of the modules of the files, if every quantized layer has one, or the same
        name.

        Args:
            layers: names of the quantized layers in the files.
            keys: names of the tensors in the files.
        """
        layers = list(layers)
        if all(name in self._modules for name in layers):
            return NewNames()
        prefix = None
        if not all(self._same(name) for name in layers):
            prefix = self._prefix(layers)
            if prefix is None:
                return NewNames()
        found = {}
        for name in {key.rpartition(".")[0] for key in keys} - self._modules.keys():
            new = self._same(name)
            if new is None and prefix is not None:
                new = prefix(name)
            if new is not None and new in self._modules:
                found[name] = new
        return NewNames(found)

    def _same(self, name: str) -> str | None:
        """The module with the same name but for the parts of the whole, if there is one."""
        if name in self._modules:
            return name
        others = self._bare.get(_bare(name), [])
        return others[0] if len(others) == 1 else None

    def _prefix(self, layers: list[str]) -> _Prefix | None:
        """The beginning of the layers that is another one in the model, if it is clear which."""
        if any(name in self._modules for name in layers):
            return None
        first = layers[0].split(".")
        found: dict[int, list[_Prefix]] = {}  # by the number of parts that stay
        for name, module in self._modules.items():
            parts = name.split(".")
            stay = _equal_at_end(first, parts)
            if not name or not stay or not isinstance(module, nn.Linear | QuantizedLinear):
                continue
            prefix = _Prefix(first[:-stay], parts[:-stay])
            if all(prefix(layer) in self._modules for layer in layers):
                found.setdefault(stay, []).append(prefix)
        best = found[max(found)] if found else []
        return best[0] if len(best) == 1 else None


class _Prefix:
    """A replacement of the beginning of names."""

    def __init__(self, old: list[str], new: list[str]) -> None:
        self._old, self._new = ("".join(f"{part}." for part in parts) for parts in (old, new))

    def __call__(self, name: str) -> str | None:
        """The new name; None for a name with another beginning."""
        return self._new + name[len(self._old) :] if name.startswith(self._old) else None


def _bare(name: str) -> str:
    """A name without the parts that stand for a model as a whole."""
    return ".".join(part for part in name.split(".") if part not in _WHOLE)


def _equal_at_end(one: list[str], other: list[str]) -> int:
    """How many parts of two names are equal, from the last one on."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _names(cls: type) -> tuple[str, ...]:
    return tuple(c.__name__ for c in cls.__mro__ if issubclass(c, nn.Module))


_LINEAR = _names(nn.Linear)
