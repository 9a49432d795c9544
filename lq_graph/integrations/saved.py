"""The quantized layers of a model as a config.json describes them, and how a folder's tensors
become these layers again.

The tensors are those of the layers' state dicts, under their names: `...q_proj.linear.weight`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.biases import add_bias
from ..errors import LinearQuantValueError
from ..kernels import storage_k
from ..modules.linear_quant import layer_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.split import SPLIT
from ..rules.tables import dtype_name

__all__ = [
    "MARK",
    "Loading",
    "SavedLayer",
    "SavedLayers",
    "added_biases",
    "check_biases",
    "name_in",
    "put_biases",
    "why_not_saved",
]

_OF_LINEAR = ("weight", "scale", "offset", "pertoken_scale", "bias")
_OWN = ("input_scale", "input_offset", "weight_scale", "float_bias")
_NAMES = (*(f"linear.{name}" for name in _OF_LINEAR), *_OWN)
_FLOATS = ("float16", "bfloat16")

# A tensor that is saved for each layer where the float layer has its weight, float32 (1,). Where
# "lq_graph" is not registered, transformers only warns, and would fill the layers with random
# values. It refuses a weight of another shape.
MARK = "weight"


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
    biases = [name.removesuffix(".bias") for name in added_biases(model)]
    fresh = dict(_fresh(model).named_modules())
    for name in (*SavedLayers.of(model), *biases):
        if name not in fresh:
            return f"{name} is no layer of {type(model).__name__}: adapters or merge added it"
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


def added_biases(model: Any) -> list[str]:
    """Names of the biases that float modules of a model of transformers have, and that its class
    does not make: those of msmodelslim's smoothing."""
    own = {
        f"{name}.bias"
        for name, module in model.named_modules()
        if not isinstance(module, QuantizedLinear) and module._parameters.get("bias") is not None
    }
    own -= {key for key in own if key.removesuffix(".linear.bias") in SavedLayers.of(model)}
    if not own:
        return []
    return sorted(own - {name for name, _ in _fresh(model).named_parameters()})


def _fresh(model: Any) -> nn.Module:
    """The model as its class makes it, on meta."""
    with torch.device("meta"):
        fresh: nn.Module = type(model)(copy.deepcopy(model.config))
    return fresh


def name_in(model: Any, saved_as: str) -> str | None:
    """The name of a module in a model that may be the base of the one that was saved, or have a
    head beside it; None for a module of a head that it has not."""
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    if saved_as in modules:
        return saved_as
    if hasattr(model, model.base_model_prefix):
        return prefix + saved_as
    return saved_as.removeprefix(prefix) if saved_as.startswith(prefix) else None


def put_biases(model: Any, names: Iterable[str]) -> None:
    """Give modules of a model, on meta, the biases that `added_biases` found."""
    for saved_as in names:
        if (name := name_in(model, saved_as.removesuffix(".bias"))) is None:
            continue
        module = model.get_submodule(name)
        weight = module.weight
        empty = torch.empty(weight.shape[:1], dtype=weight.dtype, device="meta")
        module.register_parameter("bias", nn.Parameter(empty.as_subclass(_NotLoaded)))
        if not isinstance(module, nn.Linear | nn.LayerNorm):  # whose forward adds it
            module.register_forward_hook(add_bias)


def check_biases(model: nn.Module) -> None:
    """Refuse biases that were not loaded."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, _NotLoaded):
            raise _not_loaded(name, "not loaded", "a float")


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
        mark = nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
        self.register_parameter(MARK, mark)
        self.linear = inner

    # what initializations of transformers read, which leave loaded tensors alone
    bias: Any = property(lambda self: getattr(self.linear, "bias", None))
    in_features = property(lambda self: self.replaces[0].in_features)
    out_features = property(lambda self: self.replaces[0].out_features)

    def tensors(self) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Names, tensors and the dtypes that they must have."""
        wanted = {name.removesuffix("[1]"): dtype for name, dtype in self.saved.tensors}
        for name, tensor in self.named_parameters():
            if name != MARK:
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
                raise _not_loaded(f"{name}.{key}", is_now, dtype_name(dtype))
            found[key] = tensor.detach()
        return self.saved.build(found)


def _not_loaded(name: str, is_now: str, needed: str) -> LinearQuantValueError:
    return LinearQuantValueError(
        f"lq_graph: {name} is {is_now}, and {needed} is needed. What to do: load the whole folder "
        "that save_pretrained wrote, in its dtype."
    )
