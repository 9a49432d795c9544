"""The quantized layers of a model as a config.json describes them, and how a folder's tensors
become these layers again.

The tensors are those of the layers' state dicts, under their names: `...q_proj.linear.weight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LinearQuantValueError
from ..kernels import storage_k
from ..modules.linear_quant import layer_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.split import SPLIT
from ..rules.tables import dtype_name

__all__ = ["Loading", "SavedLayer", "SavedLayers", "why_not_saved"]

_OF_LINEAR = ("weight", "scale", "offset", "pertoken_scale", "bias")
_OWN = ("input_scale", "input_offset", "weight_scale", "float_bias")
_NAMES = (*(f"linear.{name}" for name in _OF_LINEAR), *_OWN)
_FLOATS = ("float16", "bfloat16")


@dataclass(frozen=True)
class SavedLayer:
    """What a QuantizedLinear is, beside its sizes and values. Equal for most layers of a model.

    Attributes:
        input_dtype, output_dtype: by name, float16 or bfloat16.
        tensors: names and dtypes of the tensors in its state dict. A name ends in `[1]` if the
            tensor has one value for all channels.
    """

    input_dtype: str
    output_dtype: str
    tensors: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, layer: QuantizedLinear) -> SavedLayer:
        """The description of a layer that `why_not_saved` accepts."""
        tensors = [
            (f"{name}[1]" if tuple(tensor.shape) == (1,) else name, dtype_name(tensor.dtype))
            for name, tensor in layer.state_dict().items()
        ]
        output = layer.linear.output_dtype or torch.int8
        return cls(dtype_name(layer.input_dtype), dtype_name(output), tuple(sorted(tensors)))

    def empty(self, n: int, k: int) -> dict[str, Tensor]:
        """The tensors of a layer on meta."""
        found = {}
        for name, dtype_text in self.tensors:
            dtype = getattr(torch, dtype_text)
            bare = name.removesuffix("[1]")
            shape = (n, storage_k(k, dtype)) if bare == "linear.weight" else (n,)
            found[bare] = torch.empty((1,) if bare != name else shape, dtype=dtype, device="meta")
        return found

    def build(self, tensors: Mapping[str, Tensor]) -> QuantizedLinear:
        """The layer of tensors that were loaded."""
        linear = layer_of(
            tensors["linear.weight"],
            tensors["linear.scale"],
            tensors.get("linear.bias"),
            tensors.get("linear.offset"),
            pertoken="linear.pertoken_scale" in tensors,
            output_dtype=getattr(torch, self.output_dtype),
        )
        if "linear.pertoken_scale" in tensors:
            values = tensors["linear.pertoken_scale"]
            linear.pertoken_scale = nn.Parameter(values, requires_grad=False)
        return QuantizedLinear(
            linear,
            tensors.get("input_scale"),
            tensors.get("input_offset"),
            input_dtype=getattr(torch, self.input_dtype),
            weight_scale=tensors.get("weight_scale"),
            float_bias=tensors.get("float_bias"),
        )


class SavedLayers(dict[str, SavedLayer]):
    """The quantized layers of a model by qualified name."""

    @classmethod
    def of(cls, model: nn.Module) -> SavedLayers:
        """Those of a model; a layer with several names under the first."""
        return cls(
            (name, SavedLayer.of(module))
            for name, module in model.named_modules()
            if isinstance(module, QuantizedLinear)
        )

    def to_json(self) -> list[dict[str, Any]]:
        """One entry for all layers that are alike."""
        groups: dict[SavedLayer, list[str]] = {}
        for name, layer in self.items():
            groups.setdefault(layer, []).append(name)
        return [
            {
                "input_dtype": layer.input_dtype,
                "output_dtype": layer.output_dtype,
                "tensors": dict(layer.tensors),
                "names": names,
            }
            for layer, names in groups.items()
        ]

    @classmethod
    def from_json(cls, found: Any) -> SavedLayers:
        """What `to_json` wrote.

        Raises:
            ValueError: it says something else.
        """
        layers = cls()
        for group in found:
            dtypes = group["input_dtype"], group["output_dtype"]
            tensors = dict(group["tensors"])
            known = {
                name.removesuffix("[1]") in _NAMES
                and isinstance(getattr(torch, dtype, None), torch.dtype)
                for name, dtype in tensors.items()
            }
            needed = {"linear.weight", "linear.scale"}
            if (
                not set(dtypes) <= set(_FLOATS)
                or known != {True}
                or not needed <= {name.removesuffix("[1]") for name in tensors}
            ):
                raise ValueError(f"layers has {group!r}"[:200])
            layer = SavedLayer(*dtypes, tuple(sorted(tensors.items())))
            for name in group["names"]:
                if not isinstance(name, str):
                    raise ValueError(f"names has {name!r}")
                layers[name] = layer
        return layers


def why_not_saved(model: nn.Module) -> str:
    """Why the layers of a model cannot be saved as `SavedLayers`; empty if they can."""
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        linear: Any = module.linear
        if module.takes_int8 or (linear.output_dtype or torch.int8) == torch.int8:
            return f"{name} takes or returns int8, and a ReLU beside it may be fused into it"
        if hasattr(linear, SPLIT):
            return f"{name} is split over devices"
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            return f"{name} is on meta"
        if unknown := set(module.state_dict()) - set(_NAMES):
            return f"{name} holds {', '.join(sorted(unknown))}"
    return ""


class _NotLoaded(Tensor):
    """A tensor that no file gave: transformers makes an empty one like it, which is one too."""


class Loading(nn.Module):
    """Stands in a model for a layer whose tensors transformers loads.

    Args:
        saved: of the layer.
        linear: the nn.Linear of the model, on meta.
    """

    def __init__(self, saved: SavedLayer, linear: nn.Linear) -> None:
        super().__init__()
        self.saved, self.replaces = saved, (linear,)  # in a tuple: it is no part of the model
        inner = nn.Module()
        for name, tensor in saved.empty(linear.out_features, linear.in_features).items():
            owner, _, own = name.rpartition(".")
            parameter = nn.Parameter(tensor.as_subclass(_NotLoaded), requires_grad=False)
            (inner if owner else self).register_parameter(own, parameter)
        self.linear = inner

    # what initializations of transformers read, which leave loaded tensors alone
    weight: Any = property(lambda self: self.linear.weight)
    bias: Any = property(lambda self: getattr(self.linear, "bias", None))
    in_features = property(lambda self: self.replaces[0].in_features)
    out_features = property(lambda self: self.replaces[0].out_features)

    def tensors(self) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Names, tensors and the dtypes that they must have."""
        wanted = {name.removesuffix("[1]"): dtype for name, dtype in self.saved.tensors}
        for name, tensor in self.named_parameters():
            yield name, tensor, getattr(torch, wanted[name])

    def build(self, name: str) -> QuantizedLinear:
        """The layer, when its tensors are loaded.

        Args:
            name: of the layer, for the message.

        Raises:
            LinearQuantValueError: a tensor is not there, or has another dtype.
        """
        if self._forward_hooks or self._forward_pre_hooks:
            raise LinearQuantValueError(
                f"lq_graph: {name} has hooks, of tensor parallelism for example. What to do: leave "
                "tp_plan out, or split the model with lq_graph.load_checkpoint(mesh=, plan=)."
            )
        found = {}
        for key, tensor, dtype in self.tensors():
            absent = isinstance(tensor, _NotLoaded)
            if absent or tensor.dtype != dtype:
                is_now = "not loaded" if absent else f"loaded as {dtype_name(tensor.dtype)}"
                raise LinearQuantValueError(
                    f"lq_graph: {name}.{key} is {is_now}, and {dtype_name(dtype)} is needed. What "
                    "to do: load the whole folder that save_pretrained wrote, in its dtype."
                )
            found[key] = tensor.detach()
        return self.saved.build(found)
