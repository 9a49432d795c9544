"""The quantized layers of a checkpoint, each with the module of the model that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..modules.places import held_elsewhere, places_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import why_not_replaceable
from .files import refuse
from .formats import (
    PARTS,
    Part,
)

if TYPE_CHECKING:
    from ..parallel.styles import LinearQuantStyle
from .folder import CheckpointFiles
from .tensors import bit_equal, memory_of

__all__ = ["LayerToLoad", "layers_to_load", "weight_of"]

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass
class LayerToLoad:
    """A quantized layer of the files, and the module of the model that it replaces.

    Attributes:
        parts: the tensors it has in the files.
        keys: their names there; a weight that is tied to another layer's may be under that one's.
    """

    name: str
    module: nn.Module
    dynamic: bool
    n: int
    k: int
    output: torch.dtype = _F16
    style: LinearQuantStyle | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def layers_to_load(
    model: nn.Module, path: Path, files: CheckpointFiles, kind: str, schemes: Mapping[str, bool]
) -> list[LayerToLoad]:
    """The layers, each with the module it replaces and the keys it has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places, elsewhere = places_of(model), held_elsewhere(model)
    layers: dict[nn.Module, LayerToLoad] = {}
    tied: dict[object, str] = {}  # a weight's memory in the model to its key in the files
    for name, dynamic in schemes.items():
        module = modules.get(name)
        layer = _module_for(path, name, module, dynamic)
        module = layer.module
        kind_of = QuantizedLinear if isinstance(module, QuantizedLinear) else nn.Linear
        why = why_not_replaceable(module, kind_of, places.get(module, ()))
        if not why and module in elsewhere:
            why = f"{elsewhere[module]} holds it too, where it would stay what it is"
        if why:
            todo = "make the model with a plain nn.Linear there, or load before it is changed"
            refuse(path, name, "a layer that can be replaced", why, todo)
        for part in PARTS[kind, dynamic]:
            if (key := f"{name}.{part.name}") in files:
                layer.parts[part.name], layer.keys[part.name] = part, key
        if other := layers.get(module):
            _check_same(files, other, layer)
            continue
        layers[module] = layer
        if "weight" in layer.keys:
            tied.setdefault(memory_of(weight_of(module)), layer.keys["weight"])
    for layer in layers.values():
        same = tied.get(memory_of(weight_of(layer.module)))
        if same is not None and "weight" not in layer.keys:
            layer.parts["weight"], layer.keys["weight"] = PARTS[kind, layer.dynamic][0], same
    return list(layers.values())


def _module_for(path: Path, name: str, module: nn.Module | None, dynamic: bool) -> LayerToLoad:
    if not name:
        todo = "put it in an nn.Sequential"
        refuse(path, name, "a layer inside the model", "the model itself", todo)
    if not isinstance(module, nn.Linear | QuantizedLinear):
        found = "no module of that name" if module is None else type(module).__name__
        refuse(path, name, "an nn.Linear in the model", found)
    if isinstance(module, QuantizedLinear) and (
        module.takes_int8 or (module.linear.output_dtype or _I8) == _I8
    ):
        refuse(
            path,
            name,
            "a layer with float input and output",
            "one that takes or gives int8, and the ReLU beside it may be gone",
            "load into the float model",
        )
    return LayerToLoad(name, module, dynamic, module.out_features, module.in_features)


def _check_same(files: CheckpointFiles, one: LayerToLoad, other: LayerToLoad) -> None:
    """One module under two names has one set of tensors."""
    for part, key in other.keys.items():
        if part not in one.keys or not bit_equal(files.read(key), files.read(one.keys[part])):
            refuse(
                files.path(key),
                key,
                f"the tensor of {one.name}, which is the same layer",
                "another",
            )


def weight_of(module: nn.Module) -> Tensor:
    found = module.linear.weight if isinstance(module, QuantizedLinear) else module.weight
    return cast(Tensor, found)
