"""A model, and files in the two formats that hold its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N, K = 24, 40


class Model(nn.Module):
    """A quantized layer, a float one, and a norm between."""

    def __init__(self, dtype: torch.dtype = F16, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(K, N, bias=bias, dtype=dtype)
        self.norm = nn.LayerNorm(N, dtype=dtype)
        self.head = nn.Linear(N, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.up(x)))


def layer_tensors(kind: str, dynamic: bool, dtype: torch.dtype, bias: bool = True) -> dict:
    """The tensors of the layer "up", as the formats publish them."""
    g = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randint(-127, 128, (N, K), dtype=I8, generator=g)}
    weight_scale = torch.rand(N, 1, generator=g) * 1e-3 + 1e-4
    if not dynamic:
        tensors["input_scale"] = torch.tensor([0.03125], dtype=dtype)
    if kind == "msmodelslim" and not dynamic:
        deq = (weight_scale.flatten() * 0.03125).to(F32)
        tensors["deq_scale"] = deq.view(I32).to(I64) if dtype == F16 else deq
        tensors["input_offset"] = torch.tensor([5], dtype=dtype)
        tensors["quant_bias"] = torch.randint(-2000, 2000, (N,), dtype=I32, generator=g)
        return tensors
    tensors["weight_scale"] = weight_scale.to(F32)
    if kind == "msmodelslim":
        tensors["weight_offset"] = torch.zeros(N, 1)
    if bias:
        tensors["bias"] = torch.randn(N, generator=g).to(dtype)
    return tensors


def args(strategy: str, dynamic: bool) -> dict:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
    }


def write(folder: Path, kind: str, dynamic: bool, dtype: torch.dtype, *, shards: int = 1) -> Path:
    """A checkpoint of Model in a published format."""
    torch.manual_seed(1)
    tensors = {k: v for k, v in Model(dtype).state_dict().items() if not k.startswith("up.")}
    layer = {f"up.{k}": v for k, v in layer_tensors(kind, dynamic, dtype).items()}
    if kind == "msmodelslim":
        word = "W8A8_DYNAMIC" if dynamic else "W8A8"
        about = {
            "model_quant_type": word,
            **dict.fromkeys(tensors, "FLOAT"),
            **dict.fromkeys(layer, word),
        }
        (folder / "quant_model_description.json").write_text(json.dumps(about))
    else:
        inputs = args("token", True) if dynamic else args("tensor", False)
        group = {
            "targets": ["Linear"],
            "weights": args("channel", False),
            "input_activations": inputs,
        }
        config = {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": group},
            "ignore": ["head"],
        }
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    tensors |= layer
    if shards == 1:
        save_file(tensors, folder / "quant_model_weights.safetensors")
        return folder
    names = {key: f"part-{i % shards}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def example_input(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 1] = 0  # a row of zeros has no scale of its own
    return x


# ---- refusals ----


def edit_file(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Rewrite the safetensors file after changing its tensors."""

    def edit(folder: Path) -> None:
        file = folder / "quant_model_weights.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def put(key: str, value: torch.Tensor) -> Callable[[Path], None]:
    return edit_file(lambda tensors: tensors.__setitem__(key, value))


ABOUT, INDEX = "quant_model_description.json", "model.safetensors.index.json"

FILE = "quant_model_weights.safetensors"


def config(**changes: object) -> dict:
    group = {
        "targets": ["Linear"],
        "weights": args("channel", False),
        "input_activations": args("token", True),
    }
    whole = {"quant_method": "compressed-tensors", "config_groups": {"g": {**group, **changes}}}
    return {"quantization_config": whole}  # fmt: skip


# ---- values that do not fit ----


BIG, SMALL = torch.full((N,), 1e30), torch.full((N,), 1e-9)


class Told(nn.Module):
    def get_extra_state(self) -> dict:
        return {"a": 1}

    def set_extra_state(self, state: dict) -> None:
        raise AssertionError(state)
