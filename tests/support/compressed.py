"""Folders of compressed-tensors, made tensor by tensor as its own tools write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.checkpoint_files import BF16, I8, K, Model, N

Json = dict[str, Any]


def scheme(bits: int, strategy: str, *, dynamic: bool = False, **more: object) -> Json:
    """One scheme of a group, as compressed-tensors 0.19 writes it."""
    found: Json = {
        "actorder": None, "block_structure": None, "dynamic": dynamic, "group_size": None,
        "num_bits": bits, "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None,
        "strategy": strategy, "symmetric": True, "type": "int", "zp_dtype": None,
    }  # fmt: skip
    return found | more


CHANNEL, TENSOR = scheme(8, "channel"), scheme(8, "tensor")
TOKEN, STATIC = scheme(8, "token", dynamic=True), scheme(8, "tensor")
CHANNEL4, TOKEN4 = scheme(4, "channel"), scheme(4, "token", dynamic=True)
ASYMMETRIC = scheme(8, "tensor", symmetric=False, zp_dtype="torch.int8")


def group(weights: Json | None, inputs: Json | None, *targets: str, **more: object) -> Json:
    """One group of a config."""
    return {
        "format": "int-quantized",
        "input_activations": inputs,
        "output_activations": None,
        "targets": list(targets or ["Linear"]),
        "weights": weights,
    } | more


def config(*groups: Json, **more: object) -> Json:
    """A quantization_config."""
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": "int-quantized",
        "global_compression_ratio": None,
        "ignore": ["head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    } | more


def layer(
    weights: Json,
    inputs: Json,
    n: int = N,
    k: int = K,
    *,
    bias: bool = True,
    zero_point: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a layer with these schemes."""
    g = torch.Generator().manual_seed(seed)
    top = 2 ** (weights["num_bits"] - 1)
    shape = (n, 1) if weights["strategy"] == "channel" else (1,)
    tensors = {
        "weight": torch.randint(-top, top, (n, k), dtype=I8, generator=g),
        "weight_scale": (torch.rand(shape, generator=g) + 0.5).to(BF16) / top,
    }
    if bias:
        tensors["bias"] = torch.randn(n, generator=g).to(BF16)
    if not inputs["dynamic"]:
        tensors["input_scale"] = torch.tensor([0.03125], dtype=BF16)
        if not inputs["symmetric"]:
            tensors["input_zero_point"] = torch.tensor([zero_point], dtype=I8)
    return tensors


def save(folder: Path, layers: dict[str, dict[str, torch.Tensor]], about: Json) -> Path:
    """Write a folder: these quantized layers, the rest of `Model` in bfloat16, and config.json."""
    torch.manual_seed(1)
    tensors = {
        key: tensor
        for key, tensor in Model(BF16).state_dict().items()
        if key.rpartition(".")[0] not in layers
    }
    tensors |= {
        f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": about}))
    return folder
