"""The two published formats of W8A8 checkpoints: their files, their tensors, and what they say.

    msmodelslim          quant_model_description*.json says what each tensor is: "W8A8" (static),
                         "W8A8_DYNAMIC" or "FLOAT"
    compressed-tensors   quantization_config in config.json says which modules are int8 and how
                         their inputs are quantized

Sources: vllm-project/vllm-ascend (docs/source/developer_guide/Design_Documents/quantization.md and
vllm_ascend/quantization) for msmodelslim's tensors; vllm-project/compressed-tensors
(src/compressed_tensors/quantization) for the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .files import read_json, refuse
from .patterns import Pattern, PatternError, Text, Work

__all__ = [
    "CONFIG",
    "DESCRIPTION",
    "FILES",
    "INDEX",
    "PARTS",
    "SCHEMES",
    "Part",
    "is_description",
    "kept",
    "list_folder",
    "schemes_of",
    "temporary",
    "waiting",
]

DESCRIPTION, CONFIG, INDEX = "quant_model_description", "config.json", ".safetensors.index.json"
# format: the names save_checkpoint gives to weights and JSON
FILES = {
    "msmodelslim": ("quant_model_weight_w8a8.safetensors", f"{DESCRIPTION}.json"),
    "compressed-tensors": ("model.safetensors", CONFIG),
}

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_FLOATS = (_F32, _F16, _BF16)


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized layer: its name after the layer's, and what it may be. n and k
    stand for the layer's sizes; a part that is not required may be absent."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[str | int, ...], ...]
    required: bool = True
    positive: bool = False


_WEIGHT = Part("weight", (_I8,), (("n", "k"),))
_BIAS = Part("bias", _FLOATS, (("n",),), required=False)
_WEIGHT_SCALE = Part("weight_scale", _FLOATS, (("n", 1), ("n",)), positive=True)
_WEIGHT_OFFSET = Part("weight_offset", (*_FLOATS, _I8), (("n", 1), ("n",)), required=False)
_INPUT_SCALE = Part("input_scale", _FLOATS, ((1,), ()), positive=True)

# (format, dynamic): the tensors of a layer
PARTS: dict[tuple[str, bool], tuple[Part, ...]] = {
    ("msmodelslim", False): (
        _WEIGHT,
        Part("quant_bias", (_I32,), (("n",),)),
        Part("deq_scale", (_I64, _F32), (("n",),), positive=True),
        _INPUT_SCALE,
        Part("input_offset", (*_FLOATS, _I8), ((1,), ())),
        Part("weight_scale", _FLOATS, (("n", 1), ("n",)), required=False, positive=True),
        _WEIGHT_OFFSET,
        _BIAS,
    ),
    ("msmodelslim", True): (_WEIGHT, _WEIGHT_SCALE, _WEIGHT_OFFSET, _BIAS),
    ("compressed-tensors", False): (_WEIGHT, _WEIGHT_SCALE, _INPUT_SCALE, _BIAS),
    ("compressed-tensors", True): (_WEIGHT, _WEIGHT_SCALE, _BIAS),
}
SCHEMES = {"W8A8": False, "W8A8_DYNAMIC": True}  # msmodelslim's words: dynamic?


def temporary(name: str) -> str:
    """The name of a file while it is written, and until it takes another's place."""
    return f".{name}.saving"


def kept(name: str) -> str:
    """The name of a copy of a file that was replaced, until the save is done."""
    return f".{name}.before"


def waiting(folder: Path) -> Path | None:
    """Weights that are complete and wait for their name, while the JSON that describes them is in
    place: those of a save between its two steps, or one that was killed there."""
    for weights, about in FILES.values():
        found = folder / temporary(weights)
        in_place = os.path.isfile(folder / kept(about)) and not os.path.isfile(
            folder / temporary(about)
        )
        if in_place and os.path.isfile(found):
            return found
    return None


def is_description(name: str) -> bool:
    """Whether a file's name is that of one of msmodelslim's descriptions."""
    return name.startswith(DESCRIPTION) and name.endswith(".json")


def list_folder(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError) as error:
        refuse(folder, None, "a folder", getattr(error, "strerror", None) or str(error))


def schemes_of(folder: Path, keys: Iterable[str]) -> tuple[str, dict[str, bool]]:
    """The format of a folder, and for each quantized layer whether it is dynamic.

    Args:
        folder: with the JSON.
        keys: names of the tensors in its files.

    Raises:
        CheckpointError: neither format's JSON, both, or one that asks for something else than W8A8.
    """
    names = list_folder(folder)
    descriptions = [folder / name for name in names if is_description(name)]
    config = folder / CONFIG
    about = read_json(config) if CONFIG in names else {}
    if descriptions:
        found = read_json(descriptions[0])
        for other in descriptions[1:]:
            if read_json(other) != found:
                refuse(
                    other,
                    None,
                    "one description",
                    f"another one than {descriptions[0].name}",
                    "remove the one that is not of these weights",
                )
        if _dict(about.get("quantization_config")).get("quant_method") == "compressed-tensors":
            refuse(
                config,
                "quantization_config",
                f"none beside {descriptions[0].name}",
                "compressed-tensors",
                "remove the one that is not of these weights",
            )
        return "msmodelslim", dict(_from_description(descriptions[0], found))
    if "quantization_config" not in about:
        refuse(
            folder,
            None,
            f"{DESCRIPTION}*.json (msmodelslim) or config.json with quantization_config "
            "(compressed-tensors)",
            "neither",
        )
    return "compressed-tensors", dict(_from_config(config, about["quantization_config"], keys))


def _from_description(file: Path, description: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    for key, kind in description.items():
        name, _, part = key.rpartition(".")
        if part != "weight" or kind == "FLOAT":
            continue
        if not isinstance(kind, str) or kind not in SCHEMES:
            refuse(file, key, "W8A8, W8A8_DYNAMIC or FLOAT", repr(kind))
        yield name, SCHEMES[kind]


def _from_config(file: Path, config: Any, keys: Iterable[str]) -> Iterator[tuple[str, bool]]:
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(groups, dict) or config.get("quant_method") != "compressed-tensors":
        refuse(
            file, "quantization_config", "compressed-tensors with config_groups", repr(config)[:80]
        )
    if config.get("transform_config"):
        refuse(file, "transform_config", "none", repr(config["transform_config"])[:80])
    work = Work()
    schemes = [
        (
            _Targets(file, f"config_groups.{name}.targets", _dict(group).get("targets"), work),
            _scheme_of(file, name, _dict(group)),
        )
        for name, group in groups.items()
    ]
    ignored = _Targets(file, "ignore", config.get("ignore"), work)
    for key in keys:
        name, _, part = key.rpartition(".")
        if part != "weight_scale":
            continue
        text = Text(name)
        if ignored.take(text):
            continue
        dynamic = next((dynamic for targets, dynamic in schemes if targets.take(text)), None)
        if dynamic is None:
            refuse(file, "config_groups", f"a group whose targets take {name}", "none")
        yield name, dynamic


def _scheme_of(file: Path, name: str, group: dict[str, Any]) -> bool:
    """Whether a config group quantizes its input dynamically; refuses what LinearQuant is not."""
    weights, inputs = _dict(group.get("weights")), _dict(group.get("input_activations"))
    wanted = {"num_bits": 8, "type": "int", "symmetric": True}
    for part, given, strategies in (
        ("weights", weights, ("channel",)),
        ("input_activations", inputs, ("tensor", "token")),
    ):
        ok = all(given.get(k) == v for k, v in wanted.items())
        if not ok or given.get("strategy") not in strategies:
            refuse(
                file,
                f"config_groups.{name}.{part}",
                f"8 bits, int, symmetric, strategy {' or '.join(strategies)}",
                json.dumps({k: given.get(k) for k in (*wanted, "strategy")}),
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
    return bool(dynamic)


def _dict(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one in the place of anything else, which no check then accepts."""
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

    def take(self, name: Text) -> bool:
        """Whether a module is one of them."""
        if "Linear" in self._names or name.text in self._names:
            return True
        for pattern in self._patterns:
            try:
                if pattern.matches(name):
                    return True
            except PatternError as error:
                found = f"'re:{pattern.text[:80]}': {error}"
                refuse(self._file, self._key, "patterns that are soon matched", found)
        return False
