"""The format of compressed-tensors: its tensors, which layers of them are quantized, and how
`save_checkpoint` writes them. compressed_config.py reads the JSON.

Source: vllm-project/compressed-tensors (src/compressed_tensors/quantization).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..modules.quantized_linear import QuantizedLinear
from ..modules.static_values import has_int32_bias, static_bias, static_scale
from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from . import compressed_writing
from .base import (
    BIAS,
    FLOATS,
    INPUT_SCALE,
    WEIGHT,
    Contents,
    Format,
    MustBe,
    Part,
    Read,
    State,
    StaticTensors,
    Written,
    as_vector,
)
from .compressed_config import METHOD, AnyConfig, Config, Group, config_in
from .files import CONFIG, read_json, refuse
from .names import ModelNames, NewNames

__all__ = ["COMPRESSED_TENSORS", "CompressedTensors"]

_I32, _F16 = torch.int32, torch.float16
_SCALE = Part("weight_scale", FLOATS, (("n", 1), ("n",), (1,), ()), positive=True)
_INTS = (torch.int8, torch.int16, _I32, torch.int64)
_ZERO_POINT = "input_zero_point"
# tensors of the attention and its cache, which stay float
_CACHE = re.compile(r"(.*\.)?([qkv]_(scale|zero_point)|[kv]_proj\.output_(scale|zero_point))")
_PROJECTION = re.compile(r"(.*\.)?[qkv]_proj")
_CACHE_REASON = "the attention and its cache stay float"
# tensors without effect, with what they must be
_NO_EFFECT = {
    "weight_zero_point": MustBe.ZERO,
    "weight_g_idx": MustBe.ORDERED,
    "weight_shape": MustBe.SHAPE,
}


class CompressedTensors(Format):
    """The format of compressed-tensors."""

    name = METHOD
    stem = "model"
    json_file = CONFIG
    parts: ClassVar[Mapping[LayerKind, tuple[Part, ...]]] = {
        A8W8_STATIC: (
            WEIGHT,
            _SCALE,
            INPUT_SCALE,
            Part(_ZERO_POINT, (*_INTS, *FLOATS), ((1,), ()), required=False),
            BIAS,
        ),
        A8W8_DYNAMIC: (WEIGHT, _SCALE, BIAS),
        A4W4_DYNAMIC: (WEIGHT, _SCALE, BIAS),
    }
    zero_point: ClassVar[str] = _ZERO_POINT

    # ---- reading ----

    def contents(
        self, file: Path, found: AnyConfig, keys: Iterable[str], model: ModelNames | None = None
    ) -> Contents:
        """What a quantization_config says about the tensors of the files.

        Args:
            file: config.json.
            found: the quantization_config in it.
            keys: names of the tensors in the files.
            model: the model to load into; None if it is not known.

        Raises:
            CheckpointError: a scheme that LinearQuant cannot run.
        """
        config, keys = Config(file, found), list(keys)
        layers = {
            name: None  # in the order of the files
            for name, _, part in (key.rpartition(".") for key in keys)
            if part in ("weight_scale", "weight_packed")
        }
        new_names = model.new_names(layers, keys) if model else NewNames()
        names = new_names.tensors(keys)
        contents = Contents(self, {}, names)
        kept = set(keys)
        for name in layers:
            new = new_names.module(name)
            classes = model.classes(new) if model else _likely_classes(name)
            group = config.group_of(_names_in_config(config, name, new), classes)
            if group is not None:
                _check_class(file, name, classes)
                contents.kinds[new] = group.kind()
                _note_rest(contents, group, name, new, kept)
        if config.quantizes_cache:
            for key in keys:
                if _CACHE.fullmatch(key):
                    contents.left_out[names.get(key, key)] = _CACHE_REASON
        return contents

    def bias_dtype(
        self, kind: LayerKind, output: torch.dtype, given: torch.dtype | None
    ) -> torch.dtype:
        if kind.static and output == _F16:
            return _I32  # the row of float16 output without pertoken_scale takes only int32
        return super().bias_dtype(kind, output, given)

    def static_tensors(self, read: Read, output: torch.dtype) -> StaticTensors:
        weight, weight_scale = read("weight"), as_vector(read("weight_scale"))
        input_scale, bias = as_vector(read("input_scale")), read("bias")
        assert weight is not None and weight_scale is not None and input_scale is not None
        weight_scale = weight_scale.expand(weight.shape[0]).contiguous()
        scale = static_scale(input_scale, weight_scale, output)
        zero_point = as_vector(read(self.zero_point))
        if zero_point is None:
            zero_point = torch.zeros_like(input_scale)
            if bias is not None and not has_int32_bias(scale, bias, weight.shape[1], output):
                return StaticTensors(scale, bias, None)
        return StaticTensors(scale, static_bias(bias, scale, zero_point, weight), bias)

    # ---- writing ----

    def static_parts(self, layer: QuantizedLinear, state: State) -> Written:
        return compressed_writing.static_parts(self, layer, state)

    def described(
        self, keys: Iterable[str], layers: Mapping[str, QuantizedLinear], floats: Iterable[str]
    ) -> dict[str, Any]:
        return compressed_writing.config(keys, layers, floats)

    def is_in(self, folder: Path, names: Iterable[str]) -> bool:
        if CONFIG not in names:
            return False
        found = config_in(read_json(folder / CONFIG), folder / CONFIG)
        return found is not None and found.is_ours


COMPRESSED_TENSORS = CompressedTensors()


def _names_in_config(config: Config, name: str, new: str) -> list[str]:
    """The names that a config may use for a layer: that of the files, that of the model, and, in
    the configuration of the language model alone, that without the part that stands for it."""
    names = [name] if name == new else [name, new]
    if config.in_text_config:
        names += [part.replace("language_model.", "") for part in names if "language_" in part]
    return names


def _likely_classes(name: str) -> tuple[str, ...]:
    """Names of the classes of a layer if the model is not known."""
    return ("Embedding",) if "embed" in name.rpartition(".")[2] else ("Linear",)


def _check_class(file: Path, name: str, classes: Sequence[str]) -> None:
    if "Linear" not in classes:
        refuse(
            file,
            name,
            "quantized layers that are nn.Linear",
            f"a quantized {classes[0]}",
            "quantize again and leave this layer float (ignore)",
        )


def _note_rest(contents: Contents, group: Group, name: str, new: str, keys: set[str]) -> None:
    """Note the tensors of a layer that are not loaded.

    Raises:
        CheckpointError: its output is quantized; or it lacks a zero point.
    """
    for part, wanted in _NO_EFFECT.items():
        if f"{name}.{part}" in keys:
            contents.must_be[f"{new}.{part}"] = wanted
    if group.weight_has_zero_point:
        _check_stored(group, f"{name}.weight_zero_point", keys)
    if group.has_zero_point:
        _check_stored(group, f"{name}.{_ZERO_POINT}", keys)
    elif f"{name}.{_ZERO_POINT}" in keys:
        contents.must_be[f"{new}.{_ZERO_POINT}"] = MustBe.ZERO
    if group.outputs is not None:
        if not _PROJECTION.fullmatch(name):
            refuse(
                group.file,
                f"{group.key}.output_activations",
                "none, or those of q_proj, k_proj and v_proj, which are for the cache",
                f"one of {name}",
                "quantize again without output_activations",
            )
        for part in ("output_scale", "output_zero_point"):
            if f"{name}.{part}" in keys:
                contents.left_out[f"{new}.{part}"] = _CACHE_REASON


def _check_stored(group: Group, key: str, keys: set[str]) -> None:
    if key not in keys:
        refuse(
            group.file,
            group.key,
            f"the tensor {key}, because the scheme is not symmetric",
            "no such tensor",
            "use the config.json that was saved with these weights",
        )
