"""The JSON of compressed-tensors: which layers are quantized, and how.

Its groups name layers and say how their weights and inputs are quantized.

Source: vllm-project/compressed-tensors (src/compressed_tensors: quantization/quant_args.py and
quant_scheme.py for the values that a config may leave out, utils/match.py and
quantization/lifecycle/apply.py for the layers of a group, transform/transform_args.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from .files import refuse, shown
from .patterns import Pattern, PatternError, Text, Work

__all__ = ["CONFIG_KEY", "METHOD", "AnyConfig", "Config", "Group", "config_in", "object_of"]

METHOD = "compressed-tensors"
_TRANSFORMERS = "lq_graph"  # of folders that save_pretrained wrote
CONFIG_KEY = "quantization_config"
_OLD_KEY = "compression_config"
_TEXT_KEY = "text_config"

# how a weight is stored, if it is one int8 for each value; None and "fakequant" do not say it
_PLAIN = ("int-quantized", "naive-quantized", "mixed-precision", "dense", "fakequant", None)
_FUSED = ("weight_input", "weight_output")  # transforms that are in the weights already
_AGAIN = (
    "load the float model and call lq_graph.quantize, or quantize it again as W8A8 "
    "(int8 weights per channel, int8 activations per token)"
)
# predefined groups, of which a config may hold only the name
_W8A8: dict[str, Any] = {
    "weights": {"num_bits": 8, "strategy": "channel"},
    "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
}
_PRESETS = {"W8A8": _W8A8, "INT8": _W8A8}


@dataclass(frozen=True)
class AnyConfig:
    """What a config.json says about quantization.

    Attributes:
        value: the quantization_config, of any format.
        place: where it is, as the keys that lead to it.
        sparsity: the sparsity_config beside it or in it.
        is_old: whether it is in compression_config, which needs no quant_method.
    """

    value: Any
    place: str
    sparsity: Any
    is_old: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it says that it is of compressed-tensors."""
        if not isinstance(self.value, dict):
            return False
        return self.value.get("quant_method", METHOD if self.is_old else None) == METHOD


def config_in(about: dict[str, Any], file: Path) -> AnyConfig | None:
    """The quantization_config in a config.json; None if it has none.

    Raises:
        CheckpointError: two that differ.
    """
    found = [
        AnyConfig(outer[key], f"{prefix}{key}", None, key == _OLD_KEY)
        for outer, prefix in ((about, ""), (object_of(about.get(_TEXT_KEY)), f"{_TEXT_KEY}."))
        for key in (CONFIG_KEY, _OLD_KEY)
        if outer.get(key) is not None
    ]
    if not found:
        return None
    first = _inner(found[0])
    for other in map(_inner, found[1:]):
        if other.value != first.value:
            refuse(
                file,
                other.place,
                f"that of {first.place}",
                "another one",
                "remove the one that is not of these weights",
            )
    return first


def _inner(given: AnyConfig) -> AnyConfig:
    """Older files have the quantization_config inside, beside sparsity_config."""
    outer, inner = given.value, object_of(given.value).get(CONFIG_KEY)
    if inner is None:
        return AnyConfig(outer, given.place, object_of(outer).get("sparsity_config"), given.is_old)
    place = f"{given.place}.{CONFIG_KEY}"
    return AnyConfig(inner, place, outer.get("sparsity_config"), is_old=True)


@dataclass(frozen=True)
class Group:
    """One group of layers.

    Attributes:
        file, key: where it is.
        weights, inputs, outputs: how they are quantized; None for float.
        storage: how the weights are stored; None if the group does not say it.
    """

    file: Path
    key: str
    weights: dict[str, Any] | None
    inputs: dict[str, Any] | None
    outputs: dict[str, Any] | None
    storage: str | None

    @property
    def has_zero_point(self) -> bool:
        """Whether the scale of the input comes with a zero point."""
        return _value(self.inputs or {}, "symmetric") is not True

    @property
    def weight_has_zero_point(self) -> bool:
        """Whether the scales of the weight come with zero points."""
        return _value(self.weights or {}, "symmetric") is not True

    def kind(self) -> LayerKind:
        """How its layers are quantized.

        Raises:
            CheckpointError: LinearQuant cannot run them, or the format stores them packed.
        """
        weights, inputs = self.weights, self.inputs
        if weights is None:
            self._refuse("weights", "a scheme for the weights", "none", "remove the group")
        if inputs is None or any(_value(x, "type") != "int" for x in (weights, inputs)):
            self._refuse(
                "",
                "integer weights and integer activations, because LinearQuant multiplies them",
                f"{_scheme(weights, inputs)}: {_of_weights(weights)} and {_of_inputs(inputs)}",
                _AGAIN,
            )
        bits = _value(weights, "num_bits"), _value(inputs, "num_bits")
        if (
            not all(isinstance(b, int) for b in bits)
            or not 2 <= bits[0] <= bits[1]
            or (bits[1] not in (4, 8))
        ):
            self._refuse(
                "",
                "activations of 8 or 4 bits, and weights of no more bits",
                _scheme(weights, inputs),
                _AGAIN,
            )
        self._check_weights(weights)
        self._check_inputs(inputs)
        if self.storage not in _PLAIN:
            self._refuse(
                "format",
                "int-quantized, which stores one int8 for each weight",
                shown(self.storage, 60),
                "save the model again with quantization_format='int-quantized'",
            )
        if bits[1] == 4:
            return A4W4_DYNAMIC
        return A8W8_DYNAMIC if _value(inputs, "dynamic") else A8W8_STATIC

    def _check_weights(self, weights: dict[str, Any]) -> None:
        if _strategy(weights) not in ("channel", "tensor") or _value(weights, "dynamic"):
            self._refuse(
                "weights",
                "one scale for each channel (strategy channel or tensor)",
                f"{_scheme(weights, self.inputs)}, {_of_weights(weights)}",
                "quantize again with strategy='channel' and no group_size",
            )

    def _check_inputs(self, inputs: dict[str, Any]) -> None:
        dynamic, strategy = _value(inputs, "dynamic"), _strategy(inputs)
        if (dynamic is True) != (strategy == "token") or (not dynamic and strategy != "tensor"):
            self._refuse(
                "input_activations",
                "dynamic with strategy token, or static with strategy tensor",
                f"{_of_inputs(inputs)} (dynamic {json.dumps(dynamic)})",
                "quantize again with dynamic=True and strategy='token'",
            )
        if dynamic and self.has_zero_point:
            self._refuse(
                "input_activations",
                "symmetric dynamic activations, which DynamicQuant of the layers computes",
                "asymmetric ones (symmetric false)",
                "quantize again with symmetric=True, or with static activations, which may have a "
                "zero point",
            )
        if not dynamic and _value(inputs, "num_bits") == 4:
            self._refuse(
                "input_activations",
                "int4 activations that are dynamic, per token",
                _of_inputs(inputs),
                "quantize again with dynamic=True and strategy='token'",
            )

    def _refuse(self, part: str, expected: str, found: str, todo: str) -> NoReturn:
        refuse(self.file, f"{self.key}.{part}" if part else self.key, expected, found, todo)


class Config:
    """A quantization_config of compressed-tensors, checked as far as no layer is needed.

    Args:
        file: config.json.
        found: see `config_in`.

    Attributes:
        quantizes_cache: whether the key and value cache, or the attention, is quantized.
        in_text_config: whether names may lack the part that stands for the language model.

    Raises:
        CheckpointError: it is of another format, or says what cannot be loaded of any layer.
    """

    def __init__(self, file: Path, found: AnyConfig) -> None:
        config = found.value
        groups = config.get("config_groups") if isinstance(config, dict) else None
        if not isinstance(groups, dict) or not found.is_ours:
            todo = "quantize the float model with lq_graph.quantize, llmcompressor or msmodelslim"
            if object_of(config).get("quant_method") == _TRANSFORMERS:
                todo = (
                    "import lq_graph.integrations.transformers, and load the folder with "
                    "transformers' from_pretrained, which saved it"
                )
            refuse(file, found.place, f"{METHOD} with config_groups", _method_of(config), todo)
        _check_sparsity(file, found.sparsity)
        _check_transforms(file, config.get("transform_config"))
        self._file, self._place = file, found.place
        self.in_text_config = found.place.startswith(_TEXT_KEY)
        work, storage = Work(), config.get("format")
        self._groups: dict[str, Group] = {}  # by target; a target of two groups is of the second
        attention = False
        for name, value in groups.items():
            key = f"config_groups.{name}"
            group, targets = _group(file, key, value, name, storage)
            attention = attention or (group.weights is None and group.inputs is not None)
            for target in _texts(file, f"{key}.targets", targets):
                self._groups[target] = group
        self.quantizes_cache = attention or bool(config.get("kv_cache_scheme"))
        self._targets = _Targets(file, "config_groups", list(self._groups), work)
        ignored = _texts(file, "ignore", config.get("ignore"))
        self._ignored = _Targets(file, "ignore", ignored, work)

    def group_of(self, names: Sequence[str], classes: Sequence[str]) -> Group | None:
        """The group of a layer: that of the target which names it exactly; else that of the first
        regular expression that matches, in alphabetical order; else that of its class. None for a
        layer that is ignored.

        Args:
            names: the names that the config may use for the layer.
            classes: names of its class and the bases.

        Raises:
            CheckpointError: no group has it.
        """
        texts = [Text(name) for name in names]
        if self._ignored.first(texts, classes) is not None:
            return None
        target = self._targets.first(texts, classes)
        if target is None:
            refuse(
                self._file,
                f"{self._place}.config_groups",
                f"a group whose targets contain {names[0]}",
                "none",
                "add the layer to the targets of its group, or use the config.json that was saved "
                "with these weights",
            )
        return self._groups[target]


class _Targets:
    """Names of modules, names of classes, and "re:" patterns."""

    def __init__(self, file: Path, key: str, targets: list[str], work: Work) -> None:
        self._file, self._key = file, key
        self._names = {text for text in targets if not text.startswith("re:")}
        self._patterns = []
        for text in sorted({text for text in targets if text.startswith("re:")}):
            try:
                self._patterns.append((text, Pattern(text.removeprefix("re:"), work)))
            except PatternError as error:
                self._refuse("a regular expression after re:", text, error)

    def first(self, names: Sequence[Text], classes: Sequence[str]) -> str | None:
        """The target that decides for a layer; None if no one contains it."""
        for name in names:
            if name.text in self._names:
                return name.text
        for text, pattern in self._patterns:
            try:
                if any(pattern.matches(name) for name in names):
                    return text
            except PatternError as error:
                self._refuse("patterns that match in bounded time", text, error)
        return min(self._names.intersection(classes), default=None)

    def _refuse(self, expected: str, text: str, error: PatternError) -> NoReturn:
        found = f"{text[:80]!r}: {error}"
        todo = "write the names of the layers instead, or a simpler pattern"
        refuse(self._file, self._key, expected, found, todo)


def object_of(value: object) -> dict[str, Any]:
    """A JSON object; {} for any other value, which the checks refuse afterwards."""
    return value if isinstance(value, dict) else {}


def _method_of(config: object) -> str:
    method = object_of(config).get("quant_method")
    return f"quant_method {method!r}" if method not in (None, METHOD) else repr(config)[:80]


def _group(file: Path, key: str, value: object, name: str, storage: object) -> tuple[Group, object]:
    """A group of a config, and its targets."""
    if isinstance(value, list):  # the name of a predefined scheme, and its targets
        if name.upper() not in _PRESETS:
            allowed = " or ".join(_PRESETS)
            refuse(file, key, f"the predefined scheme {allowed}", shown(name, 60), _AGAIN)
        value = {**_PRESETS[name.upper()], "targets": value}
    given = object_of(value)

    def scheme(part: str) -> dict[str, Any] | None:
        found = given.get(part)
        if found is not None and not isinstance(found, dict):
            todo = "use the config.json that was saved with these weights"
            refuse(file, f"{key}.{part}", "an object", repr(found)[:80], todo)
        return found

    own = given.get("format") or storage
    return Group(
        file,
        key,
        scheme("weights"),
        scheme("input_activations"),
        scheme("output_activations"),
        own if isinstance(own, str) else None,
    ), given.get("targets")


def _texts(file: Path, key: str, value: object) -> list[str]:
    given = value or []
    if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
        refuse(file, key, "a list of names", repr(value)[:60], "write a list of strings")
    return given


def _check_sparsity(file: Path, sparsity: object) -> None:
    """Weights that are stored without their zeros are refused; 2:4 weights with zeros are plain."""
    storage = object_of(sparsity).get("format", "dense" if not sparsity else None)
    if storage != "dense":
        refuse(
            file,
            "sparsity_config.format",
            "dense, which stores the zeros of a weight too",
            shown(storage, 60),
            "save the model again without sparse compression",
        )


def _check_transforms(file: Path, transforms: object) -> None:
    """Transforms of weights are in the weights already. Those of activations run with the model,
    and a QuantizedLinear has none."""
    if not transforms:
        return
    groups = object_of(transforms).get("config_groups")
    if not isinstance(groups, dict):
        expected, found = "none, or one with config_groups", repr(transforms)[:80]
        todo = "use the config.json that was saved with these weights"
        refuse(file, "transform_config", expected, found, todo)
    for name, group in groups.items():
        applied = object_of(group).get("apply")
        for args in applied if isinstance(applied, list) else [None]:
            location = object_of(args).get("location")
            if location not in _FUSED:
                refuse(
                    file,
                    f"transform_config.config_groups.{name}",
                    "transforms that are in the weights (weight_input, weight_output), such as R1 "
                    "and R2 of SpinQuant",
                    f"one at {location}, which has to run with the model",
                    "quantize again with SpinQuantModifier(rotations=['R1', 'R2'])",
                )


# ---- words and values of a scheme ----

_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}


def _value(scheme: dict[str, Any], key: str) -> Any:
    """A value of a scheme, or the one that is meant if it is left out."""
    found = scheme.get(key, _DEFAULTS[key])
    return found.lower() if isinstance(found, str) else found


def _strategy(scheme: dict[str, Any]) -> str:
    size, given = scheme.get("group_size"), scheme.get("strategy")
    if given is None:
        return "tensor" if size is None else "channel" if size == -1 else "group"
    return str(given).lower()


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None) -> str:
    """W8A8, FP8 and the like."""
    one = _bits(weights)
    if _value(weights, "type") == "float":
        return f"{one}A16" if inputs is None else one
    return f"W{one}A{16 if inputs is None else _bits(inputs)}"


def _bits(scheme: dict[str, Any]) -> str:
    """The bits, with the name of the family for floats."""
    family = ""
    if _value(scheme, "type") == "float":
        family = "FP"
        if _strategy(scheme) == "tensor_group":
            family = "NVFP"
        elif scheme.get("scale_dtype") == "torch.uint8":
            family = "MXFP"
    return f"{family}{shown(_value(scheme, 'num_bits'), 20)}"


def _of_weights(weights: dict[str, Any]) -> str:
    strategy, size = _strategy(weights), shown(weights.get("group_size"), 20)
    scales = {
        "tensor": "one scale",
        "channel": "a scale for each channel",
        "block": "a scale for each block",
        "group": f"a scale for each {size} columns",
        "tensor_group": f"a scale for each {size} columns",
    }
    return f"{_type(weights)} weights with {scales.get(strategy, shown(strategy, 40))}"


def _of_inputs(inputs: dict[str, Any] | None) -> str:
    if inputs is None:
        return "float activations"
    return f"{_type(inputs)} activations per {shown(_strategy(inputs), 40)}"


def _type(scheme: dict[str, Any]) -> str:
    return f"{shown(_value(scheme, 'type'), 20)}{shown(_value(scheme, 'num_bits'), 20)}"
