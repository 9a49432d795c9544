"""How save_checkpoint writes the format of compressed-tensors.

The configuration has the fields that the package compressed-tensors writes itself, because readers
(vllm, transformers) look some of them up without a default.

Source: vllm-project/compressed-tensors (src/compressed_tensors/quantization).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..modules.quantized_linear import QuantizedLinear
from ..modules.static_values import weight_scale_of
from ..modules.supported import A8W8_STATIC, LayerKind
from .base import Format, State, Written, float_scale, packed_scale
from .base import static_parts as known_parts

__all__ = ["config", "static_parts"]

_I8, _I32, _I64, _F32 = torch.int8, torch.int32, torch.int64, torch.float32
_LINEAR = "Linear"  # as a target: every nn.Linear that is not ignored
_FORMAT = "int-quantized"


# ---- tensors ----


def static_parts(format: Format, layer: QuantizedLinear, state: State) -> Written:
    """A static layer's tensors, and what they lose.

    The format has the two scales and the float bias. What the layer does not know of them is
    computed, and whether that gives the same layer is tried.
    """
    weight = state["linear.weight"]
    state = {key: tensor.cpu() for key, tensor in state.items()}  # NPUs have no float64
    parts, scale = known_parts(state), float_scale(state)
    if "weight_scale" not in parts:
        parts["weight_scale"] = weight_scale_of(scale, state["input_scale"]).unsqueeze(-1)
    if bool(state["input_offset"].any()):
        parts["input_zero_point"] = state["input_offset"].to(_I8)
    bias = state.get("linear.bias")
    if bias is not None and "bias" not in parts:
        parts |= _float_bias(bias, scale, state)
    again = format.build(A8W8_STATIC, layer.input_dtype, parts.get).linear
    parts["weight"] = weight  # one copy at a time on the CPU, when it is written
    if not torch.equal(packed_scale(layer, again.scale), packed_scale(layer, scale)):
        return Written(parts, "its scale is not exactly the product of two scales")
    same = _same_bias(again.bias, bias)
    return Written(parts, "" if same else "its bias is not the one that its float bias gives")


def _float_bias(bias: Tensor, scale: Tensor, state: State) -> dict[str, Tensor]:
    """The float bias of a layer of which only the bias of the product is known; none for zeros."""
    if bias.is_floating_point():
        return {"bias": bias}
    zero_point = state["input_offset"].to(_I64) * state["linear.weight"].sum(1, dtype=_I64)
    steps = bias + zero_point
    return {"bias": (steps * scale.double()).to(_F32)} if bool(steps.any()) else {}


def _same_bias(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two biases add the same numbers; None adds nothing."""
    if one is None or other is None:
        return all(bias is None or not bool(bias.any()) for bias in (one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


# ---- configuration ----


def config(
    keys: Iterable[str], layers: Mapping[str, QuantizedLinear], floats: Iterable[str]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint.

    Args:
        keys: names of the model's tensors.
        layers: the quantized layers by name.
        floats: names of the linear layers that stay float.
    """
    scales = {name for name, _, part in (k.rpartition(".") for k in keys) if part == "weight_scale"}
    groups: dict[tuple[LayerKind, bool], list[str]] = {}
    for name, layer in layers.items():
        offset = layer.input_offset
        symmetric = offset is None or not bool(offset.any())
        groups.setdefault((layer.kind, symmetric), []).append(_target(name))
    if len(groups) == 1 and _LINEAR not in layers:
        groups = {group: [_LINEAR] for group in groups}
    ignored = dict.fromkeys(_target(name) for name in [*floats, *sorted(scales - layers.keys())])
    return {
        "config_groups": {
            f"group_{i}": _group(kind, symmetric, targets)
            for i, ((kind, symmetric), targets) in enumerate(groups.items())
        },
        "format": _FORMAT,
        "global_compression_ratio": None,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def _group(kind: LayerKind, symmetric: bool, targets: list[str]) -> dict[str, Any]:
    bits = 4 if kind.storage == _I32 else 8
    inputs = _arguments(bits, "tensor" if kind.static else "token", dynamic=not kind.static)
    inputs |= {"symmetric": symmetric, "zp_dtype": None if symmetric else "torch.int8"}
    return {
        "format": _FORMAT,
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": _arguments(bits, "channel", dynamic=False),
    }


def _arguments(bits: int, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    """All fields of the package's QuantizationArgs."""
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": None,
        "num_bits": bits,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "scale_dtype": None,
        "strategy": strategy,
        "symmetric": True,
        "type": "int",
        "zp_dtype": None,
    }


def _target(name: str) -> str:
    """The target that selects one layer: its name, or a pattern if the name would select more."""
    return f"re:{re.escape(name)}$" if name == _LINEAR or name.startswith("re:") else name
