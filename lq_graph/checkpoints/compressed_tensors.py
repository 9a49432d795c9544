"""The format of compressed-tensors: quantization_config in config.json.

Its groups say which modules are int8, and how their inputs are quantized.

Source: vllm-project/compressed-tensors (src/compressed_tensors/quantization).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..modules.quantized_linear import QuantizedLinear
from ..modules.supported import A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from .base import (
    BIAS,
    INPUT_SCALE,
    WEIGHT,
    WEIGHT_SCALE,
    Contents,
    Format,
    Part,
    Read,
    State,
    StaticTensors,
    Written,
    as_vector,
    packed_scale,
    per_channel_scale,
    static_parts,
)
from .files import CONFIG, read_json, refuse
from .patterns import Pattern, PatternError, Text, Work

__all__ = ["COMPRESSED_TENSORS", "CompressedTensors"]

_KEY = "quantization_config"
_I32, _F32, _F16 = torch.int32, torch.float32, torch.float16
_QUANTIZE = "quantize the float model again with llmcompressor's scheme W8A8"
_CONFIG = "take the config.json that was published with these weights, or correct it"
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


class CompressedTensors(Format):
    """The format of compressed-tensors."""

    name = "compressed-tensors"
    weights_file = "model.safetensors"
    json_file = CONFIG
    parts: ClassVar[Mapping[LayerKind, tuple[Part, ...]]] = {
        A8W8_STATIC: (WEIGHT, WEIGHT_SCALE, INPUT_SCALE, BIAS),
        A8W8_DYNAMIC: (WEIGHT, WEIGHT_SCALE, BIAS),
    }

    # ---- reading ----

    def is_method_of(self, config: Any) -> bool:
        """Whether a quantization_config says that it is of this format."""
        return isinstance(config, dict) and config.get("quant_method") == self.name

    def contents(self, file: Path, config: Any, keys: Iterable[str]) -> Contents:
        """What a quantization_config says about the tensors of the files.

        Args:
            file: config.json.
            config: the quantization_config in it.
            keys: names of the tensors in the files.

        Raises:
            CheckpointError: the config is not W8A8 with symmetric weights.
        """
        groups = config.get("config_groups") if isinstance(config, dict) else None
        if not isinstance(groups, dict) or not self.is_method_of(config):
            refuse(
                file, _KEY, "compressed-tensors with config_groups", repr(config)[:80], _QUANTIZE
            )
        if config.get("transform_config"):
            found = repr(config["transform_config"])[:80]
            refuse(file, "transform_config", "none", found, _QUANTIZE)
        work = Work()
        given = [
            (
                _Targets(file, f"config_groups.{name}.targets", _dict(group).get("targets"), work),
                _kind(file, name, _dict(group)),
            )
            for name, group in groups.items()
        ]
        ignored = _Targets(file, "ignore", config.get("ignore"), work)
        kinds = {}
        for key in keys:
            name, _, part = key.rpartition(".")
            if part != "weight_scale":
                continue
            text = Text(name)
            if ignored.contain(text):
                continue
            kind = next((kind for targets, kind in given if targets.contain(text)), None)
            if kind is None:
                expected = f"a group whose targets contain {name}"
                refuse(file, "config_groups", expected, "none", _CONFIG)
            kinds[name] = kind
        return Contents(self, kinds)

    def bias_dtype(
        self, kind: LayerKind, output: torch.dtype, given: torch.dtype | None
    ) -> torch.dtype:
        if kind.static and output == _F16:
            return _I32  # the row of float16 output without pertoken_scale takes only int32
        return super().bias_dtype(kind, output, given)

    def static_tensors(self, read: Read, output: torch.dtype) -> StaticTensors:
        weight_scale, input_scale = as_vector(read("weight_scale")), as_vector(read("input_scale"))
        assert weight_scale is not None and input_scale is not None
        scale, bias = input_scale * weight_scale, read("bias")
        if bias is None or self.bias_dtype(A8W8_STATIC, output, bias.dtype) != _I32:
            return StaticTensors(scale, bias, None)
        return StaticTensors(scale, (bias.to(_F32) / scale).round().to(_I32), bias)

    # ---- writing ----

    def static_parts(self, layer: QuantizedLinear, state: State) -> Written:
        parts, bias = static_parts(state), state.get("linear.bias")
        if "weight_scale" not in parts or bool(state["input_offset"].any()):
            return Written(parts, "it has a zero point, or its weight's own scale is not known")
        if bias is not None and not parts.setdefault("bias", bias).is_floating_point():
            return Written(parts, "its float bias is not known")
        again = self.build(A8W8_STATIC, layer.input_dtype, parts.get).linear
        scale = per_channel_scale(state)
        if not torch.equal(packed_scale(layer, again.scale), packed_scale(layer, scale)):
            return Written(parts, "its scale is not exactly the product of the two scales")
        same = bias is again.bias is None or (
            bias is not None
            and again.bias is not None
            and bias.dtype == again.bias.dtype
            and torch.equal(bias, again.bias)
        )
        return Written(parts, "" if same else "its bias is not the one that its float bias gives")

    def json(
        self, keys: Iterable[str], layers: Mapping[str, QuantizedLinear], old: dict[str, Any]
    ) -> dict[str, Any]:
        scales = {
            name for name, _, part in (k.rpartition(".") for k in keys) if part == "weight_scale"
        }
        groups: dict[str, Any] = {}
        for dynamic in (False, True):
            names = [_target(name) for name, layer in layers.items() if layer.dynamic == dynamic]
            if names:
                groups[f"group_{len(groups)}"] = {
                    "targets": names,
                    "weights": {**_INT8, "strategy": "channel", "dynamic": False},
                    "input_activations": {
                        **_INT8,
                        "strategy": "token" if dynamic else "tensor",
                        "dynamic": dynamic,
                    },
                }
        config = {
            "quant_method": self.name,
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [_target(name) for name in sorted(scales - layers.keys())],
        }
        return {**old, _KEY: config}

    def json_to_keep(self, folder: Path, names: Iterable[str]) -> dict[str, Any]:
        return read_json(folder / self.json_file) if self.json_file in names else {}


COMPRESSED_TENSORS = CompressedTensors()


def _kind(file: Path, name: str, group: dict[str, Any]) -> LayerKind:
    """How a config group quantizes its layers.

    Raises:
        CheckpointError: LinearQuant cannot run the group.
    """
    weights, inputs = _dict(group.get("weights")), _dict(group.get("input_activations"))
    for part, given, strategies in (
        ("weights", weights, ("channel",)),
        ("input_activations", inputs, ("tensor", "token")),
    ):
        ok = all(given.get(k) == v for k, v in _INT8.items())
        if not ok or given.get("strategy") not in strategies:
            refuse(
                file,
                f"config_groups.{name}.{part}",
                f"8 bits, int, symmetric, strategy {' or '.join(strategies)}",
                json.dumps({k: given.get(k) for k in (*_INT8, "strategy")}),
                _QUANTIZE,
            )
    if group.get("output_activations") is not None:
        found = repr(group["output_activations"])[:80]
        refuse(file, f"config_groups.{name}.output_activations", "none", found, _QUANTIZE)
    dynamic = inputs.get("dynamic", False)
    if dynamic is not (inputs["strategy"] == "token"):
        refuse(
            file,
            f"config_groups.{name}",
            "dynamic with token, static with tensor",
            repr(inputs)[:80],
            _QUANTIZE,
        )
    return A8W8_DYNAMIC if dynamic else A8W8_STATIC


def _dict(value: object) -> dict[str, Any]:
    """A JSON object; {} for any other value, which the checks refuse afterwards."""
    return value if isinstance(value, dict) else {}


def _target(name: str) -> str:
    """The target that selects one layer: its name, or a pattern if the name would select more."""
    return f"re:{re.escape(name)}$" if name == "Linear" or name.startswith("re:") else name


class _Targets:
    """A list of module names, "Linear" or "re:" patterns."""

    def __init__(self, file: Path, key: str, value: object, work: Work) -> None:
        self._file, self._key = file, key
        given = value or []
        if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
            refuse(file, key, "a list of names", repr(value)[:60], _CONFIG)
        self._names = {text for text in given if not text.startswith("re:")}
        self._patterns = []
        for text in given:
            if text.startswith("re:"):
                try:
                    self._patterns.append(Pattern(text.removeprefix("re:"), work))
                except PatternError as error:
                    expected = "a regular expression after re:"
                    refuse(file, key, expected, f"{text[:80]!r}: {error}", _CONFIG)

    def contain(self, name: Text) -> bool:
        """Whether a module is one of them."""
        if "Linear" in self._names or name.text in self._names:
            return True
        for pattern in self._patterns:
            try:
                if pattern.matches(name):
                    return True
            except PatternError as error:
                found = f"'re:{pattern.text[:80]}': {error}"
                refuse(self._file, self._key, "patterns that match in bounded time", found, _CONFIG)
        return False
