"""The names that the tensors of the files have in the model.

Versions of transformers call the same modules by different names: the layers of a language model
are `model.layers` in a file, and `model.language_model.layers` in the model that also sees images.
So a prefix may differ. It is replaced only if otherwise not one quantized layer had a module, and
if one replacement, and no other, gives every quantized layer a module.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..modules.quantized_linear import QuantizedLinear

__all__ = ["ModelNames", "Prefix"]

# prefixes that a tensor of another part of the model, lm_head for example, may have or lack
_PREFIXES = ("model.", "language_model.", "model.language_model.")


class Prefix:
    """A replacement of the beginning of names.

    Args:
        old: in the files, without the dot at its end; empty for an added prefix.
        new: in the model; empty for a removed prefix.
    """

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = f"{old}." if old else "", f"{new}." if new else ""

    def __call__(self, name: str) -> str | None:
        """The name in the model; None for a name without the prefix."""
        if not name.startswith(self._old):
            return None
        return self._new + name[len(self._old) :]


class ModelNames:
    """The modules and tensors of a model by name.

    Args:
        model: the model to load into.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._linears = {
            name: name.split(".")
            for name, module in self._modules.items()
            if name and isinstance(module, nn.Linear | QuantizedLinear)
        }
        self._tensors = {
            f"{name}.{tensor}" if name else tensor
            for name, module in self._modules.items()
            for tensor in (*module._parameters, *module._buffers)
        }

    def classes(self, name: str) -> tuple[str, ...]:
        """Names of the classes of a module; those of nn.Linear for one that the model lacks."""
        module = self._modules.get(name)
        if module is None or isinstance(module, QuantizedLinear):
            return _LINEAR
        return _names(type(module))

    def prefix_of(self, layers: Iterable[str]) -> Prefix | None:
        """The prefix that differs between the files and the model; None if none does, or if it is
        unclear which.

        Args:
            layers: names of the quantized layers in the files.
        """
        layers = list(layers)
        if not layers or any(name in self._modules for name in layers):
            return None
        first = layers[0].split(".")
        found: dict[int, list[Prefix]] = {}  # by the number of parts that stay
        for parts in self._linears.values():
            if stay := _equal_at_end(first, parts):
                prefix = Prefix(".".join(first[:-stay]), ".".join(parts[:-stay]))
                if all(prefix(name) in self._linears for name in layers):
                    found.setdefault(stay, []).append(prefix)
        best = found[max(found)] if found else []
        return best[0] if len(best) == 1 else None

    def renamed(self, prefix: Prefix, layers: set[str], keys: Iterable[str]) -> dict[str, str]:
        """The names in the model of the tensors that have another one in the files.

        Args:
            prefix: that of the quantized layers.
            layers: names of the quantized layers in the files.
            keys: names of the tensors in the files.
        """
        names = {}
        for key in keys:
            new = self._name_of(prefix, layers, key)
            if new != key:
                names[key] = new
        return names

    def _name_of(self, prefix: Prefix, layers: set[str], key: str) -> str:
        own, _, _ = key.rpartition(".")
        new = prefix(key)
        if own in layers and new is not None:
            return new
        if key in self._tensors:
            return key
        if new is not None and (new in self._tensors or new.rpartition(".")[0] in self._modules):
            return new
        others = {
            other
            for part in _PREFIXES
            for other in (part + key, key.removeprefix(part))
            if other in self._tensors
        }
        return others.pop() if len(others) == 1 else key


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
