"""Which layers that read one tensor can be one product, with the same bits as before."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..rules.tables import dtype_name
from .linear_quant import PARAMETERS, LinearQuant
from .places import Place
from .quantized_linear import QuantizedLinear
from .replaceable import why_not_replaceable
from .split import SPLIT, Split
from .supported import LayerKind, why_not_supported

__all__ = ["Model", "alike", "kind_of", "why_not", "why_not_together"]

_FLOATS = (torch.float16, torch.bfloat16)


class Model(NamedTuple):
    """What the rules need of the model.

    Attributes:
        places: where it holds each module.
        elsewhere: modules that an attribute holds too, with its name.
        holders: how many modules hold each parameter or buffer, by its memory.
    """

    places: dict[nn.Module, list[Place]]
    elsewhere: dict[nn.Module, str]
    holders: Counter[int]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        places: dict[nn.Module, list[Place]],
        elsewhere: dict[nn.Module, str],
    ) -> Model:
        """Count the holders of a model's tensors."""
        holders = Counter(
            memory(tensor)
            for module in model.modules()
            for tensor in [*module._parameters.values(), *module._buffers.values()]
            if tensor is not None
        )
        return cls(places, elsewhere, holders)


def memory(tensor: Tensor) -> int:
    """A number that is equal for tensors with one memory."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return (plain and not tensor.is_meta and tensor.data_ptr()) or id(tensor)


def kind_of(layer: QuantizedLinear) -> LayerKind:
    """How a layer is quantized."""
    return LayerKind(layer.linear.weight_dtype, static=not layer.dynamic)


def why_not(layer: nn.Module, model: Model) -> str:
    """Why a layer cannot be merged with any other; empty if it can."""
    if not isinstance(layer, QuantizedLinear):
        return "it is float"
    linear = layer.linear
    if not isinstance(linear, LinearQuant):
        return "its linear is the vendor's"
    split: Split | None = vars(linear).get(SPLIT)
    if split is not None and not split.on_n:
        return "it is split over devices on k"
    kept_hooks = frozenset() if split is None else split.hooks
    places = model.places.get(layer, ())
    if why := why_not_replaceable(layer, QuantizedLinear, places, kept_hooks):
        return why
    if len(model.places.get(linear, ())) > 1:
        return "another layer holds its LinearQuant too"
    if linear in model.elsewhere:
        return f"{model.elsewhere[linear]} holds its tensors too and would keep the old ones"
    tensors = {name: getattr(linear, name) for name in PARAMETERS}
    for name in ("weight", "scale", "bias"):
        if tensors[name] is not None and model.holders[memory(tensors[name])] > 1:
            return f"another layer has the same {name}"
    if any(tensor is not None and tensor.is_meta for tensor in tensors.values()):
        return "it is on meta"
    if linear.output_dtype not in _FLOATS or layer.output_scale is not None:
        return f"its output is {dtype_name(linear.output_dtype or torch.int8)}"
    if tensors["offset"] is not None:
        return "it has an offset"
    n = linear.out_features
    for name, shape in (("weight", (n, linear.weight.shape[-1])), ("scale", (n,)), ("bias", (n,))):
        if tensors[name] is not None and tuple(tensors[name].shape) != shape:
            return f"its {name} has shape {tuple(tensors[name].shape)}, not {shape}"
    if layer.dynamic != (tensors["pertoken_scale"] is not None):
        return "its pertoken_scale is not that of a dynamic layer"
    return ""


def alike(layer: QuantizedLinear) -> dict[str, Any]:
    """What must be equal in layers that are merged, by its name: then each row of the merged
    product is computed as before.

    A bias of zeros is not the same as no bias: a sum with it loses the sign of -0.
    """
    linear = layer.linear
    same: dict[str, Any] = {
        "scheme": str(kind_of(layer)),
        "k": linear.in_features,
        "device": str(linear.weight.device),
        "output dtype": dtype_name(linear.output_dtype or torch.int8),
        "bias": None if linear.bias is None else dtype_name(linear.bias.dtype),
        "scale dtype": dtype_name(linear.scale.dtype),
        "float32 scale": "kept" if linear._scale_before_folding() is not None else "not kept",
        "x1_dtype and x2_dtype": f"{linear.x1_dtype} and {linear.x2_dtype}",
    }
    if layer.input_scale is not None and layer.input_offset is not None:
        same |= {
            "input dtype": dtype_name(layer.input_dtype),
            "input_scale": layer.input_scale.tolist(),
            "input_offset": layer.input_offset.tolist(),
            "int8 input": layer.takes_int8,
        }
    return same


def why_not_together(layers: list[QuantizedLinear]) -> str:
    """Why the product in force cannot run alike layers as one; empty if it can."""
    first = layers[0]
    linear = first.linear
    why, _ = why_not_supported(
        kind_of(first),
        linear.in_features,
        sum(layer.out_features for layer in layers),
        input_dtype=first.input_dtype if not first.dynamic else linear.output_dtype or torch.int8,
        output_dtype=linear.output_dtype or torch.int8,
        scale=linear.scale.dtype,
        bias=None if linear.bias is None else linear.bias.dtype,
    )
    return why
