"""The quantized layers of a checkpoint, each with the module of the model that it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from torch import Tensor, nn

from ..errors import LinearQuantTypeError
from ..kernels import storage_k
from ..modules.places import Place, held_elsewhere, places_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import carry_over, why_not_replaceable
from ..modules.split import SplitStyle
from ..modules.supported import LayerKind
from .base import Contents, Format, Part, StaticTensors
from .experts import check_experts
from .files import CheckpointError, Refusals, refuse
from .folder import CheckpointFiles
from .tensor_parallel import TensorParallel
from .tensors import bit_equal, memory_of

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

__all__ = [
    "LayerToLoad",
    "check_twins",
    "layer_of_files",
    "layers_to_load",
    "new_layer",
    "weight_of",
]

_I8, _I64 = torch.int8, torch.int64
_F32, _F16 = torch.float32, torch.float16
# the parameter of LinearQuant that a part becomes, if it is not a scale; it decides the split
_PARAMETER = {"weight": "weight", "quant_bias": "bias", "bias": "bias"}


@dataclass
class LayerToLoad:
    """A quantized layer of the files, and the module of the model that it replaces.

    Attributes:
        name: qualified name.
        module: the nn.Linear or QuantizedLinear of that name.
        files: where its tensors are.
        format: that of the files.
        kind: how it is quantized.
        n, k: its sizes.
        output: the float dtype that it takes and returns.
        style: how it is split over devices; None if it is not.
        parts: the tensors it has in the files, by the names of their parts.
        keys: the names of these tensors in the files, by the names of their parts. A weight that is
            tied to another layer's weight may have that layer's name.
        twins: the same module under its other names, with the tensors of those names.
    """

    name: str
    module: nn.Module
    files: CheckpointFiles
    format: Format
    kind: LayerKind
    n: int
    k: int
    output: torch.dtype = _F16
    style: SplitStyle | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    twins: list[LayerToLoad] = field(default_factory=list)

    def __contains__(self, part: str) -> bool:
        return part in self.keys

    def dtype(self, part: str) -> torch.dtype | None:
        """The dtype of one of its tensors; None for a dtype that torch does not have."""
        return self.files.header(self.keys[part])[0]

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of one of its tensors."""
        return self.files.header(self.keys[part])[1]

    def read(self, part: str) -> Tensor:
        """Read one of its tensors."""
        return self.files.read(self.keys[part])

    def scales(self, part: str) -> Tensor:
        """Read the scales in one of its tensors; an int64 scale holds the bits of a float32."""
        values = self.read(part)
        return (values & 0xFFFFFFFF).to(torch.uint32).view(_F32) if values.dtype == _I64 else values

    @property
    def bytes(self) -> int:
        """Size of its weight in memory."""
        return self.n * storage_k(self.k, self.kind.storage) * self.kind.storage.itemsize

    def refuse(self, expected: str, found: str, todo: str) -> NoReturn:
        """Raise a CheckpointError that names the layer."""
        refuse(self.files.path, self.name, expected, found, todo)

    def refuse_part(self, part: str, expected: str, found: str, todo: str) -> NoReturn:
        """Raise a CheckpointError that names one of its tensors."""
        key = self.keys[part]
        refuse(self.files.file_of(key), key, expected, found, todo)


def layers_to_load(
    model: nn.Module, files: CheckpointFiles, contents: Contents, refusals: Refusals
) -> list[LayerToLoad]:
    """The quantized layers of the files, each with the module it replaces and its keys. Those with
    tensors in the files but no module in the model are not among them.

    Args:
        model: the model to load into.
        files: of the checkpoint.
        contents: what the JSON says about them.
        refusals: a module that is absent or cannot be replaced.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    format = contents.format
    places, elsewhere = places_of(model), held_elsewhere(model)
    layers: dict[nn.Module, LayerToLoad] = {}
    tied: dict[object, str] = {}  # a weight's memory in the model to its key in the files
    in_files = {key.rpartition(".")[0] for key in files}
    for name in contents.kinds:
        if name in in_files and name not in modules:
            continue  # check_rest tells it
        with refusals.each():
            layer = layer_of_files(files, contents, name, _module_for(files, name, modules))
            module = layer.module
            _check_replaceable(layer, places.get(module, []), elsewhere)
            if other := layers.get(module):
                other.twins.append(layer)
                continue
            layers[module] = layer
            if "weight" in layer:
                tied.setdefault(memory_of(weight_of(module)), layer.keys["weight"])
    for layer in layers.values():
        key_of_other = tied.get(memory_of(weight_of(layer.module)))
        if key_of_other is not None and "weight" not in layer:
            layer.parts["weight"] = format.parts[layer.kind][0]
            layer.keys["weight"] = key_of_other
    return list(layers.values())


def layer_of_files(
    files: CheckpointFiles, contents: Contents, name: str, module: nn.Linear | QuantizedLinear
) -> LayerToLoad:
    """A quantized layer, with its tensors in the files."""
    kind, n, k = contents.kinds[name], module.out_features, module.in_features
    layer = LayerToLoad(name, module, files, contents.format, kind, n, k)
    for part in contents.format.parts[kind]:
        if (key := f"{name}.{part.name}") in files:
            layer.parts[part.name], layer.keys[part.name] = part, key
    return layer


def _module_for(
    files: CheckpointFiles, name: str, modules: Mapping[str, nn.Module]
) -> nn.Linear | QuantizedLinear:
    if not name:
        todo = "put it in an nn.Sequential"
        refuse(files.path, name, "a layer inside the model", "the model itself", todo)
    module = modules.get(name)
    if module is None:
        check_experts(files.path, name, dict(modules[""].named_parameters()))
    if not isinstance(module, nn.Linear | QuantizedLinear):
        found = "no module of that name" if module is None else type(module).__name__
        todo = "make the model that these files were saved from: compare its config.json"
        refuse(files.path, name, "an nn.Linear in the model", found, todo)
    return module


def _check_replaceable(
    layer: LayerToLoad, places: list[Place], elsewhere: Mapping[nn.Module, str]
) -> None:
    module = layer.module
    quantized = isinstance(module, QuantizedLinear)
    if isinstance(module, QuantizedLinear) and (
        module.takes_int8 or (module.linear.output_dtype or _I8) == _I8
    ):
        layer.refuse(
            "a layer with float input and output",
            "a layer that takes or returns int8; the ReLU beside it may be fused into it",
            "load into the float model",
        )
    why = why_not_replaceable(module, QuantizedLinear if quantized else nn.Linear, places)
    if not why and module in elsewhere:
        why = f"{elsewhere[module]} holds it too and would keep the old one"
    if why:
        layer.refuse(
            "a layer that can be replaced",
            why,
            "make the model with a plain nn.Linear there, or load before it is changed",
        )


def check_twins(one: LayerToLoad) -> None:
    """Refuse a module with two names in the model that has different tensors under them."""
    for other in one.twins:
        for part in other.keys:
            if part not in one or not bit_equal(other.read(part), one.read(part)):
                expected = f"the tensor of {one.name}, which is the same layer"
                todo = "make the model with two layers, or correct the files"
                other.refuse_part(part, expected, "another", todo)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of an nn.Linear, or the quantized weight of a QuantizedLinear."""
    found = module.linear.weight if isinstance(module, QuantizedLinear) else module.weight
    return cast(Tensor, found)


def new_layer(
    layer: LayerToLoad, parallel: TensorParallel | None, weights: dict[str, nn.Parameter]
) -> QuantizedLinear:
    """The layer that replaces the module, on its device.

    Args:
        layer: a layer that was checked.
        parallel: selects this process's part of it; None for the whole.
        weights: the weights of earlier layers, by key; a weight that several layers share stays
            shared.
    """

    def read(part: str) -> Tensor | None:
        tensor = _read(layer, parallel, part)
        if part == "weight" and tensor is not None and layer.kind.storage == torch.int32:
            _check_int4(layer, tensor)
        return tensor

    new = layer.format.build(layer.kind, layer.output, read, _static_part(layer, parallel))
    device = weight_of(layer.module).device
    new = new.to(torch.device("cpu") if device.type == "meta" else device)
    if layer.style is None:
        new.linear.weight = weights.setdefault(
            layer.keys["weight"], cast(nn.Parameter, new.linear.weight)
        )
    elif parallel is not None:
        layer.style.adopt(new, parallel.mesh)
    try:
        carry_over(layer.module, new)
    except LinearQuantTypeError as error:
        raise CheckpointError(f"load_checkpoint: {layer.name}: {error}") from None
    return new


def _static_part(layer: LayerToLoad, parallel: TensorParallel | None) -> StaticTensors | None:
    """This process's part of the scale and bias of a static layer, computed for the whole layer:
    the sums of whole rows are in the bias, and all parts have one dtype. None for a layer that is
    not split, or whose files have the bias with these sums."""
    if layer.style is None or parallel is None or not layer.kind.static or "quant_bias" in layer:
        return None
    style, ranks, rank = layer.style, parallel.ranks, parallel.rank

    def read(part: str) -> Tensor | None:
        if part == "weight" and layer.format.zero_point not in layer:  # only its size matters
            return torch.zeros(1, 1, dtype=_I8, device="cpu").expand(layer.n, layer.k)
        return layer.read(part) if part in layer else None

    def own(name: str, tensor: Tensor | None) -> Tensor | None:
        placement = style.placement(name, (layer.n,))
        if tensor is None or not (placement.is_shard() or placement.is_partial()):
            return tensor
        if placement.is_shard():
            return tensor.chunk(ranks)[rank].clone()
        return torch.zeros_like(tensor) if rank else tensor

    scale, bias, float_bias = layer.format.static_tensors(read, layer.output)
    part = own("scale", scale)
    assert part is not None
    return StaticTensors(part, own("bias", bias), own("bias", float_bias))


def _check_int4(layer: LayerToLoad, weight: Tensor) -> None:
    """Refuse the weight of an int4 layer if it has other values than -8 to 7."""
    low, high = map(int, weight.aminmax()) if weight.numel() else (0, 0)
    if low < -8 or high > 7:
        layer.refuse_part(
            "weight",
            "int4 values, -8 to 7",
            f"{low} to {high}",
            "use the JSON that was saved with these weights; it says which weights are int4",
        )


def _read(layer: LayerToLoad, parallel: TensorParallel | None, part: str) -> Tensor | None:
    """A tensor of a layer, or this process's part of it; None if the layer has none."""
    if part not in layer:
        return None
    shape = layer.shape(part)
    split = layer.parts[part].shapes[0][0] == "n" and shape[:1] == (layer.n,)
    if layer.style is None or parallel is None or not split:
        return layer.read(part)
    size = shape if part == "weight" else shape[:1]
    placement = layer.style.placement(_PARAMETER.get(part, "scale"), size)
    if placement.is_shard():
        dim = cast("Shard", placement).dim
        return layer.files.read_part(layer.keys[part], dim, parallel.rank, parallel.ranks)
    tensor = layer.read(part)
    return torch.zeros_like(tensor) if placement.is_partial() and parallel.rank else tensor
