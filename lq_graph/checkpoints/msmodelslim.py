"""msmodelslim's format: quant_model_description*.json says what each tensor is.

msmodelslim_words.py has its words.

Source: vllm-project/vllm-ascend (docs/source/developer_guide/Design_Documents/quantization.md and
vllm_ascend/quantization).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels import unpack_scale
from ..modules.quantized_linear import QuantizedLinear
from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from ..rules.tables import dtype_name
from .base import (
    BIAS,
    FLOATS,
    INPUT_SCALE,
    WEIGHT,
    WEIGHT_OFFSET,
    WEIGHT_SCALE,
    Contents,
    Format,
    Part,
    Read,
    State,
    StaticTensors,
    Written,
    packed_scale,
    per_channel_scale,
    static_parts,
)
from .files import read_json, refuse
from .msmodelslim_words import (
    MIX,
    NO_EFFECT,
    STATIC_ONLY,
    Prefer,
    check_inputs,
    kind_of,
    name_in_model,
)

__all__ = ["DESCRIPTION", "MSMODELSLIM", "Msmodelslim"]

DESCRIPTION = "quant_model_description"  # how the JSON's name begins
_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_WORDS = {  # of the description, as they are written
    A8W8_STATIC: "W8A8",
    A8W8_DYNAMIC: "W8A8_DYNAMIC",
    A4W4_DYNAMIC: "W4A4_DYNAMIC",
}
_PRIORITY = ["W8A8_DYNAMIC", "W8A8", "W4A4_DYNAMIC"]  # a model of several has the last as its type


class Msmodelslim(Format):
    """The format of msmodelslim."""

    name = "msmodelslim"
    stem = "quant_model_weights"
    older = ("quant_model_weight_w8a8.safetensors",)
    json_file = f"{DESCRIPTION}.json"
    parts: ClassVar[Mapping[LayerKind, tuple[Part, ...]]] = {
        A8W8_STATIC: (
            WEIGHT,
            Part("quant_bias", (_I32,), (("n",),)),
            Part("deq_scale", (_I64, _F32), (("n",), (1,)), positive=True),
            INPUT_SCALE,
            Part("input_offset", (*FLOATS, _I8), ((1,), ())),
            replace(WEIGHT_SCALE, required=False),
            WEIGHT_OFFSET,
            BIAS,
        ),
        A8W8_DYNAMIC: (WEIGHT, WEIGHT_SCALE, WEIGHT_OFFSET, BIAS),
        A4W4_DYNAMIC: (WEIGHT, WEIGHT_SCALE, WEIGHT_OFFSET, BIAS),
    }
    output_decided_by: ClassVar[Mapping[str, Mapping[torch.dtype, torch.dtype]]] = {
        "deq_scale": {_I64: _F16, _F32: _BF16}
    }
    adds_biases: ClassVar[bool] = True

    # ---- reading ----

    def description(self, folder: Path, names: Iterable[str]) -> tuple[Path, dict[str, Any]] | None:
        """The description in a folder and its contents; None if there is none.

        Raises:
            CheckpointError: several descriptions that differ.
        """
        files = [folder / name for name in names if self.describes_weights(name)]
        if not files:
            return None
        found = read_json(files[0])
        for other in files[1:]:
            if read_json(other) != found:
                refuse(
                    other,
                    None,
                    "one description",
                    f"another one than {files[0].name}",
                    "remove the one that is not of these weights",
                )
        return files[0], found

    def contents(
        self,
        file: Path,
        description: dict[str, Any],
        keys: Collection[str],
        prefer: Prefer = "dynamic",
    ) -> Contents:
        """What a description says about the tensors of the files.

        Args:
            file: the description.
            description: what is in it.
            keys: names of the tensors in the files.
            prefer: how a layer that has the tensors of both kinds is loaded.

        Raises:
            CheckpointError: a word of a layer that LinearQuant cannot run.
        """
        check_inputs(file, description, keys)
        kinds, left_out = {}, {}
        for key, word in description.items():
            name, _, part = key.rpartition(".")
            if isinstance(word, str) and (why := NO_EFFECT.get(word)):
                left_out[key] = why
            elif part in ("weight", "weight_packed") and name_in_model(key) == key:
                kind = kind_of(file, key, word, prefer)
                if kind is not None:
                    kinds[name] = kind
                if word == MIX and kind == A8W8_DYNAMIC:
                    why = "it is for a static layer; prefer='static' loads it"
                    left_out |= {f"{name}.{other}": why for other in STATIC_ONLY}
        names = {key: new for key in keys if (new := name_in_model(key)) != key}
        left_out = {key: why for key, why in left_out.items() if key in keys}
        return Contents(self, kinds, names, left_out)

    def static_tensors(self, read: Read, output: torch.dtype) -> StaticTensors:
        del output
        weight, scale = read("weight"), read("deq_scale")
        assert weight is not None and scale is not None
        scale = scale.expand(weight.shape[0]).contiguous()  # one for all channels, or one for each
        # quant_bias already contains the float bias and the zero point of the input
        return StaticTensors(scale, read("quant_bias"), read("bias"))

    # ---- writing ----

    def dynamic_parts(self, state: State) -> dict[str, Tensor]:
        parts = super().dynamic_parts(state)
        return {**parts, "weight_offset": torch.zeros_like(parts["weight_scale"])}

    def static_parts(self, layer: QuantizedLinear, state: State) -> Written:
        parts, bias, scale = static_parts(state), state.get("linear.bias"), per_channel_scale(state)
        word = packed_scale(layer, scale)
        if bias is None:
            bias = torch.zeros(word.shape[0], dtype=_I32, device=word.device)
        parts |= {"input_offset": state["input_offset"], "deq_scale": word, "quant_bias": bias}
        if bias.dtype != _I32:
            return Written(parts, f"its bias is {dtype_name(bias.dtype)}, and quant_bias is int32")
        cut = word.dtype != scale.dtype and not torch.equal(unpack_scale(word)[0], scale)
        return Written(parts, lost="deq_scale keeps 19 bits of its scale" if cut else "")

    def described(
        self, keys: Iterable[str], layers: Mapping[str, QuantizedLinear], floats: Iterable[str]
    ) -> dict[str, Any]:
        del floats
        said = {}
        for key in keys:
            name, _, part = key.rpartition(".")
            layer = layers.get(name)
            said[key] = "FLOAT" if layer is None or part == "bias" else _WORDS[layer.kind]
        words = {_WORDS[layer.kind] for layer in layers.values()}
        return {
            **said,
            "version": "1.0.0",
            "model_quant_type": max(words, key=_PRIORITY.index, default="FLOAT"),
            "metadata": {},
            "group_size": 0,
            "optional": {},
        }

    def is_in(self, folder: Path, names: Iterable[str]) -> bool:
        del folder
        return self.json_file in names

    def describes_weights(self, name: str) -> bool:
        return name.startswith(DESCRIPTION) and name.endswith(".json")


MSMODELSLIM = Msmodelslim()
