"""save_checkpoint: a model with QuantizedLinear layers as a W8A8 checkpoint.

The formats and their sources are those of checkpoint.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import DESCRIPTION, SCHEMES, CheckpointError, require_safetensors
from .module import SPLIT
from .ops import trans_quant_param
from .quantized_linear import QuantizedLinear

__all__ = ["FORMATS", "save_checkpoint"]

FORMATS = ("msmodelslim", "compressed-tensors")


def save_checkpoint(model: nn.Module, folder: str | Path, format: str = "msmodelslim") -> None:
    """Write a model with QuantizedLinear layers as a checkpoint that `load_checkpoint` reads.

    A dynamic layer goes into either format. A static one goes into the format whose tensors it
    has: msmodelslim's deq_scale and quant_bias do not give compressed-tensors' weight_scale and
    float bias back, nor the other way round.

    Args:
        model: CPU or NPU.
        folder: made if it is not there.
        format: "msmodelslim" or "compressed-tensors".

    Raises:
        CheckpointError: another format, a static layer of the other one, an int4 layer, one with
            int8 output, or one that is split over devices. Nothing is written.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise CheckpointError(
            f"save_checkpoint: format is {format!r}; allowed are "
            f"{' and '.join(map(repr, FORMATS))}."
        )
    save_file = require_safetensors().torch.save_file
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        _check_w8a8(name, layer)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        state = {key: value.cpu() for key, value in layer.state_dict().items()}
        for part, tensor in _parts_of(name, layer, state, format).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    for key, value in model.state_dict().items():
        if not any(key.startswith(f"{name}.") for name in layers):
            tensors[key] = value.cpu().contiguous()

    folder.mkdir(parents=True, exist_ok=True)
    if format == "msmodelslim":
        words = {dynamic: word for word, dynamic in SCHEMES.items()}
        kinds = dict.fromkeys(tensors, "FLOAT")
        for name, layer in layers.items():
            kinds |= {k: words[layer.dynamic] for k in tensors if k.startswith(f"{name}.")}
        save_file(tensors, folder / "quant_model_weight_w8a8.safetensors")
        (folder / f"{DESCRIPTION}.json").write_text(json.dumps(kinds, indent=2))
    else:
        save_file(tensors, folder / "model.safetensors")
        config = {"quantization_config": _config_of(layers)}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _check_w8a8(name: str, layer: QuantizedLinear) -> None:
    """The formats hold whole layers, int8 weights and float outputs."""
    if SPLIT in vars(layer.linear):
        raise CheckpointError(
            f"save_checkpoint: {name} is split over devices, and this process has a part of it. "
            "What to do: save before the model is split, or save model.state_dict(), whose "
            "DTensors torch.distributed.checkpoint writes."
        )
    if layer.linear.weight.dtype != torch.int8:
        what, todo = "is int4", "quantize it with A8W8Dynamic or A8W8Static"
    elif layer.linear.output_dtype not in (torch.float16, torch.bfloat16):
        what, todo = "gives int8", "quantize with A8W8Static(int8_between=False)"
    else:
        return
    raise CheckpointError(
        f"save_checkpoint: {name} {what}, which the formats have no place for. What to do: {todo}, "
        "or save model.state_dict()."
    )


def _parts_of(
    name: str, layer: QuantizedLinear, state: dict[str, Tensor], format: str
) -> dict[str, Tensor]:
    scale, bias = state["linear.scale"], state.get("linear.bias")
    parts = {"weight": state["linear.weight"]}
    if layer.dynamic:
        parts["weight_scale"] = scale.unsqueeze(-1)
        if format == "msmodelslim":
            parts["weight_offset"] = torch.zeros_like(parts["weight_scale"])
        return parts if bias is None else {**parts, "bias": bias}
    own = "compressed-tensors" if "weight_scale" in state and _is_product(state) else "msmodelslim"
    if format != own:
        raise CheckpointError(
            f"save_checkpoint: {name} is static and holds {own}'s tensors, from which those of "
            f"{format} cannot be had exactly. What to do: save it as {own}."
        )
    parts["input_scale"] = state["input_scale"]
    if format == "msmodelslim":
        n = parts["weight"].shape[0]
        if scale.dtype == torch.float32 and layer.linear.output_dtype == torch.float16:
            scale = trans_quant_param(scale)  # float32 says bfloat16 there
        parts["deq_scale"], parts["input_offset"] = scale, state["input_offset"]
        parts["quant_bias"] = torch.zeros(n, dtype=torch.int32) if bias is None else bias
        if "weight_scale" in state:
            parts["weight_scale"] = state["weight_scale"].unsqueeze(-1)
        return parts
    parts["weight_scale"] = state["weight_scale"].unsqueeze(-1)
    float_bias = state.get("float_bias", bias)
    return parts if float_bias is None else {**parts, "bias": float_bias}


def _is_product(state: dict[str, Tensor]) -> bool:
    """Whether a static layer's scale is the one compressed-tensors' two scales give."""
    scale = state["linear.scale"]
    product = state["input_scale"] * state["weight_scale"]
    return (
        scale.dtype == torch.float32
        and torch.equal(scale, product)
        and not state["input_offset"].any()
    )


def _config_of(layers: dict[str, QuantizedLinear]) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "int", "symmetric": True}
    groups: dict[str, Any] = {}
    for dynamic in (False, True):
        names = [name for name, layer in layers.items() if layer.dynamic == dynamic]
        if names:
            groups[f"group_{len(groups)}"] = {
                "targets": names,
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    **common,
                    "strategy": "token" if dynamic else "tensor",
                    "dynamic": dynamic,
                },
            }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
