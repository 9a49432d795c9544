"""The format of compressed-tensors: quantization_config in config.json.

Its groups say which modules are int8, and how their inputs are quantized.

Source: vllm-project/compressed-tensors (src/compressed_tensors/quantization).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..modules.quantized_linear import QuantizedLinear
from ..modules.static_values import has_int32_bias, static_bias, static_scale
from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from . import compressed_writing
from .base import (
    BIAS,
    INPUT_SCALE,
    INPUT_ZERO_POINT,
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
)
from .files import CONFIG, read_json, refuse
from .patterns import Pattern, PatternError, Text, Work

__all__ = ["COMPRESSED_TENSORS", "CompressedTensors"]

_KEY = "quantization_config"
_I32, _F16 = torch.int32, torch.float16
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}


class CompressedTensors(Format):
    """The format of compressed-tensors."""

    name = "compressed-tensors"
    stem = "model"
    json_file = CONFIG
    zero_point = "input_zero_point"
    parts: ClassVar[Mapping[LayerKind, tuple[Part, ...]]] = {
        A8W8_STATIC: (WEIGHT, WEIGHT_SCALE, INPUT_SCALE, INPUT_ZERO_POINT, BIAS),
        A8W8_DYNAMIC: (WEIGHT, WEIGHT_SCALE, BIAS),
        A4W4_DYNAMIC: (WEIGHT, WEIGHT_SCALE, BIAS),
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
            refuse(file, _KEY, "compressed-tensors with config_groups", repr(config)[:80])
        if config.get("transform_config"):
            refuse(file, "transform_config", "none", repr(config["transform_config"])[:80])
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
                refuse(file, "config_groups", f"a group whose targets contain {name}", "none")
            kinds[name] = kind
        return Contents(self, kinds)

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
        scale = static_scale(input_scale, weight_scale, output)
        zero_point = read(self.zero_point)
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
        return CONFIG in names and self.is_method_of(read_json(folder / CONFIG).get(_KEY))


COMPRESSED_TENSORS = CompressedTensors()


def _kind(file: Path, name: str, group: dict[str, Any]) -> LayerKind:
    """How a config group quantizes its layers.

    Raises:
        CheckpointError: LinearQuant cannot run the group.
    """
    weights, inputs = _dict(group.get("weights")), _dict(group.get("input_activations"))
    bits = 4 if weights.get("num_bits") == 4 else 8
    for part, given, strategies in (
        ("weights", weights, ("channel",)),
        ("input_activations", inputs, ("tensor", "token") if bits == 8 else ("token",)),
    ):
        wanted: dict[str, Any] = {**_INT8, "num_bits": bits}
        if given.get("strategy") == "tensor":
            del wanted["symmetric"]
        ok = all(given.get(k) == v for k, v in wanted.items())
        if not ok or given.get("strategy") not in strategies:
            refuse(
                file,
                f"config_groups.{name}.{part}",
                f"{bits} bits, int, symmetric, strategy {' or '.join(strategies)}",
                json.dumps({k: given.get(k) for k in (*_INT8, "strategy")}),
            )
    if group.get("output_activations") is not None:
        found = repr(group["output_activations"])[:80]
        refuse(file, f"config_groups.{name}.output_activations", "none", found)
    dynamic = inputs.get("dynamic", False)
    if dynamic is not (inputs["strategy"] == "token"):
        refuse(
            file,
            f"config_groups.{name}",
            "dynamic with token, static with tensor",
            repr(inputs)[:80],
        )
    if not dynamic:
        return A8W8_STATIC
    return A8W8_DYNAMIC if bits == 8 else A4W4_DYNAMIC


def _dict(value: object) -> dict[str, Any]:
    """A JSON object; {} for any other value, which the checks refuse afterwards."""
    return value if isinstance(value, dict) else {}


class _Targets:
    """A list of module names, "Linear" or "re:" patterns."""

    def __init__(self, file: Path, key: str, value: object, work: Work) -> None:
        self._file, self._key = file, key
        given = value or []
        if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
            refuse(file, key, "a list of names", repr(value)[:60])
        self._names = {text for text in given if not text.startswith("re:")}
        self._patterns = []
        for text in given:
            if text.startswith("re:"):
                try:
                    self._patterns.append(Pattern(text.removeprefix("re:"), work))
                except PatternError as error:
                    expected = "a regular expression after re:"
                    refuse(file, key, expected, f"{text[:80]!r}: {error}")

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
                refuse(self._file, self._key, "patterns that match in bounded time", found)
        return False
