"""The interface of a format of checkpoints: its files, its tensors, and how they make a layer.

Each published format has its own file: msmodelslim.py, compressed_tensors.py. formats.py lists
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..kernels import pack_int4, unpack_int4, unpack_scale
from ..modules.linear_quant import layer_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.supported import LayerKind
from ..ops import trans_quant_param
from .shards import is_shard

__all__ = [
    "BIAS",
    "FLOATS",
    "INPUT_SCALE",
    "WEIGHT",
    "WEIGHT_OFFSET",
    "WEIGHT_SCALE",
    "Contents",
    "Format",
    "MustBe",
    "Part",
    "Read",
    "State",
    "StaticTensors",
    "Written",
    "float_scale",
    "packed_scale",
    "per_channel_scale",
    "static_parts",
]

_I8, _I32 = torch.int8, torch.int32
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
FLOATS = (_F32, _F16, _BF16)

Read = Callable[[str], Tensor | None]  # a tensor of a layer by the name of its part; None: absent
State = dict[str, Tensor]  # the state dict of one QuantizedLinear


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized layer in a file.

    The names mean the same in every format: `weight_scale` is of the weights, `deq_scale` is
    input_scale * weight_scale, `quant_bias` is the int32 bias with the input's zero point in it.

    Attributes:
        name: after the layer's name and a dot.
        dtypes: those allowed.
        shapes: those allowed; "n" and "k" stand for the layer's sizes.
        required: whether every layer has it.
        positive: whether its values are scales, finite and above 0.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[str | int, ...], ...]
    required: bool = True
    positive: bool = False


WEIGHT = Part("weight", (_I8,), (("n", "k"),))
BIAS = Part("bias", FLOATS, (("n",),), required=False)
_CHANNELS: tuple[tuple[str | int, ...], ...] = (("n", 1), ("n",), (1,))  # (1,): one for all
WEIGHT_SCALE = Part("weight_scale", FLOATS, _CHANNELS, positive=True)
WEIGHT_OFFSET = Part("weight_offset", (*FLOATS, _I8), _CHANNELS, required=False)
INPUT_SCALE = Part("input_scale", FLOATS, ((1,), ()), positive=True)


class StaticTensors(NamedTuple):
    """The tensors of a static layer, except its weight.

    Attributes:
        scale: of the LinearQuant: input_scale * weight_scale, float32 or packed int64, (n,).
        bias: of the LinearQuant, int32 or a float, (n,).
        float_bias: the bias before it was rounded to int32, if the file has it.
    """

    scale: Tensor
    bias: Tensor | None
    float_bias: Tensor | None


class Written(NamedTuple):
    """A static layer's tensors as a format writes them.

    Attributes:
        tensors: by the names of their parts.
        inexact: why the loaded layer would not be equal bit for bit; empty if it would be.
        lost: the data that they lose and that the layer does not compute with; empty if nothing.
    """

    tensors: dict[str, Tensor]
    inexact: str = ""
    lost: str = ""


class MustBe(Enum):
    """What a tensor without effect must be; the value is the reason why it is not loaded."""

    ZERO = "it is zero"
    ORDERED = "it keeps the order of the columns"
    SHAPE = "it is the shape of the weight"


@dataclass(frozen=True)
class Contents:
    """What the JSON of a folder says about its tensors.

    Attributes:
        format: that of the folder.
        kinds: how each quantized layer is quantized, by the layer's name in the model.
        names: the name in the model of a tensor that has another name in the files, by that name.
        left_out: tensors of the files that are not loaded, with the reason; by their name in the
            model.
        must_be: tensors of quantized layers that are not loaded because they have no effect, which
            is checked; by their name in the model.
    """

    format: Format
    kinds: dict[str, LayerKind]
    names: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    must_be: dict[str, MustBe] = field(default_factory=dict)

    def not_loaded(self) -> dict[str, str]:
        """Tensors of the files that are not loaded, with the reason."""
        return {**{key: wanted.value for key, wanted in self.must_be.items()}, **self.left_out}


class Format(ABC):
    """One published format of checkpoints.

    Attributes:
        name: as `save_checkpoint` takes it.
        stem: how the names of the files of weights begin that `save_checkpoint` writes.
        older: names that files of weights had in earlier versions of lq_graph.
        json_file: name of the file that describes them.
        parts: the tensors of a layer, by how it is quantized; the weight is the first.
        output_decided_by: parts whose dtype decides the float dtype that a layer takes and returns.
        zero_point: the part that is the zero point of a static layer's input.
        adds_biases: whether the files may have a bias for a float module that has none.
    """

    name: ClassVar[str]
    stem: ClassVar[str]
    older: ClassVar[tuple[str, ...]] = ()
    json_file: ClassVar[str]
    parts: ClassVar[Mapping[LayerKind, tuple[Part, ...]]]
    zero_point: ClassVar[str] = "input_offset"
    output_decided_by: ClassVar[Mapping[str, Mapping[torch.dtype, torch.dtype]]] = {}
    adds_biases: ClassVar[bool] = False

    # ---- reading ----

    @abstractmethod
    def static_tensors(self, read: Read, output: torch.dtype) -> StaticTensors:
        """The tensors of a static layer.

        Args:
            read: returns the tensors of the file; scales and biases as `parts` has them.
            output: the float dtype that the layer takes and returns.
        """

    def bias_dtype(
        self,
        kind: LayerKind,  # noqa: ARG002 - a format may have another rule for static layers
        output: torch.dtype,
        given: torch.dtype | None,
    ) -> torch.dtype:
        """The dtype of the built layer's bias, if the file has a float bias."""
        return output if given == output else _F32

    def build(
        self,
        kind: LayerKind,
        output: torch.dtype,
        read: Read,
        static: StaticTensors | None = None,
    ) -> QuantizedLinear:
        """Make a layer from the tensors of a file.

        Args:
            kind: how the layer is quantized.
            output: the float dtype that it takes and returns.
            read: returns a tensor by the name of its part, or None.
            static: the tensors of a static layer; default those that `read` gives.
        """
        read = cache(read)  # static_tensors may read the weight too
        weight, weight_scale = read("weight"), as_vector(read("weight_scale"))
        assert weight is not None
        if weight_scale is not None:  # one for all channels, or one for each
            weight_scale = weight_scale.expand(weight.shape[0]).contiguous()
        if kind.storage == _I32:
            weight = pack_int4(weight)
        if not kind.static:
            assert weight_scale is not None
            scale, bias, float_bias = StaticTensors(weight_scale, read("bias"), None)
            weight_scale = None
        else:
            scale, bias, float_bias = static or self.static_tensors(read, output)
        if bias is not None and bias.is_floating_point():
            bias = bias.to(self.bias_dtype(kind, output, bias.dtype))
        return QuantizedLinear(
            layer_of(weight, scale, bias, pertoken=not kind.static, output_dtype=output),
            as_vector(read("input_scale")),
            as_vector(read(self.zero_point)),
            input_dtype=output,
            weight_scale=weight_scale,
            float_bias=float_bias,
        )

    # ---- writing ----

    def dynamic_parts(self, state: State) -> dict[str, Tensor]:
        """A dynamic layer's tensors. int4 weights are int8 values of -8 to 7."""
        weight = state["linear.weight"]
        parts = {
            "weight": unpack_int4(weight) if weight.dtype == _I32 else weight,
            "weight_scale": per_channel_scale(state).unsqueeze(-1),
        }
        if "linear.bias" in state:
            parts["bias"] = state["linear.bias"]
        return parts

    @abstractmethod
    def static_parts(self, layer: QuantizedLinear, state: State) -> Written:
        """A static layer's tensors, and what they lose."""

    @abstractmethod
    def described(
        self, keys: Iterable[str], layers: Mapping[str, QuantizedLinear], floats: Iterable[str]
    ) -> dict[str, Any]:
        """What the JSON says about the tensors: the contents of `json_file`, or, if that is
        config.json, the quantization_config in it.

        Args:
            keys: names of the model's tensors, tied ones too.
            layers: the quantized layers by name.
            floats: names of the linear layers that stay float.
        """

    def is_weights(self, name: str) -> bool:
        """Whether `save_checkpoint` may have written a file of this name, with weights."""
        return name in self.older or is_shard(name, self.stem)

    @abstractmethod
    def is_in(self, folder: Path, names: Iterable[str]) -> bool:
        """Whether the weights in a folder are described as this format does it.

        Args:
            folder: with the files.
            names: of the files in it.
        """

    def describes_weights(self, name: str) -> bool:  # noqa: ARG002
        """Whether a file of this name describes weights of this format and nothing else."""
        return False


def as_vector(tensor: Tensor | None) -> Tensor | None:
    """float32 (size,) of a scale or a zero point."""
    return None if tensor is None else tensor.reshape(-1).to(_F32)


def per_channel_scale(state: State) -> Tensor:
    """The scale of a layer, (n,); the layer may hold one value for all channels."""
    return state["linear.scale"].expand(state["linear.weight"].shape[0])


def float_scale(state: State) -> Tensor:
    """The scale of a layer as float32, (n,)."""
    scale = per_channel_scale(state)
    return unpack_scale(scale)[0] if scale.dtype == torch.int64 else scale


def packed_scale(layer: QuantizedLinear, scale: Tensor) -> Tensor:
    """A static layer's scale as its row of the support table reads it: packed for float16."""
    if scale.dtype == _F32 and layer.linear.output_dtype == _F16:
        return trans_quant_param(scale)
    return scale


def static_parts(state: State) -> dict[str, Tensor]:
    """The tensors that static layers have in every format."""
    parts = {"weight": state["linear.weight"], "input_scale": state["input_scale"]}
    if "weight_scale" in state:
        parts["weight_scale"] = state["weight_scale"].unsqueeze(-1)
    if "float_bias" in state:
        parts["bias"] = state["float_bias"]
    return parts
