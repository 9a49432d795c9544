"""Small models and folders in the layouts that msmodelslim writes, and their layers in numpy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import golden

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I8, I32, I64 = torch.int8, torch.int32, torch.int64
EPS = 1e-6


class RMSNorm(nn.Module):
    """As in transformers' decoders: it has no bias."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * wide.to(x.dtype)


class FusedExperts(nn.Module):
    """As in transformers 5: one parameter for all experts."""

    def __init__(self, experts: int, inner: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 2 * inner, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.zeros(experts, hidden, inner, dtype=dtype))


def tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A model with modules of these names."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, module)
    return root


class Msmodelslim:
    """The tensors and the description of a folder, and the float modules that they are of.

    Args:
        dtype: of the float model.
        version: 0 or 1, of the service that quantizes; they differ in the dtypes of scales.
        one_scale: whether a layer has one scale for all channels (mm_tensor).
    """

    def __init__(
        self, dtype: torch.dtype = BF16, version: int = 0, *, one_scale: bool = False
    ) -> None:
        self.dtype, self.one_scale = dtype, one_scale
        self.scales = F32 if version else dtype
        self.tensors: dict[str, Tensor] = {}
        self.words: dict[str, Any] = {"version": "1.0.0", "model_quant_type": "W8A8"}
        if version:
            self.words |= {"metadata": {}, "group_size": 0, "optional": {}}
        self.modules: dict[str, nn.Module] = {}
        self._random = torch.Generator().manual_seed(0)

    def put(self, key: str, tensor: Tensor, word: str = "FLOAT") -> None:
        """Add a tensor and its word."""
        self.tensors[key], self.words[key] = tensor, word

    def model(self) -> nn.Module:
        """The float model, whose values are not those of the files."""
        return tree(self.modules)

    def norm(self, name: str, size: int, bias: float | None = None) -> None:
        """A norm; with a bias in the files only, of about this size."""
        self.modules[name] = RMSNorm(size, self.dtype)
        self.put(f"{name}.weight", (self._normal(size) * 0.1 + 1).to(self.dtype))
        if bias is not None:
            self.put(f"{name}.bias", self._normal(size) * bias)

    def linear(self, name: str, n: int, k: int, word: str, bias: str = "") -> None:
        """A linear layer.

        Args:
            name, n, k: its name and sizes.
            word: of the description.
            bias: "" for none, "file" for one in the files only, "model" for one in both.
        """
        self.modules[name] = nn.Linear(k, n, bias=bias == "model", dtype=self.dtype)
        if word == "FLOAT":
            self.put(f"{name}.weight", self._normal(n, k).to(self.dtype))
        else:
            self._quantized(name, n, k, word)
        if bias:
            self.put(f"{name}.bias", self._normal(n).to(self.dtype))

    def _quantized(self, name: str, n: int, k: int, word: str) -> None:
        top = 8 if word.startswith("W4A4") else 128
        weight = torch.randint(-top, top, (n, k), dtype=I8, generator=self._random)
        self.put(f"{name}.weight", weight, word)
        shape = (1,) if self.one_scale else (n, 1)
        scale = (torch.rand(shape, generator=self._random) * 1e-2 + 1e-3).to(self.scales)
        if word != "W8A8S" and not (word == "W8A8" and self.scales == F32):
            self.put(f"{name}.weight_scale", scale, word)
            self.put(f"{name}.weight_offset", torch.zeros_like(scale), word)
        if word in ("W8A8", "W8A8S", "W8A8_MIX"):
            self.put(f"{name}.input_scale", torch.tensor([0.03125], dtype=self.scales), word)
            self.put(f"{name}.input_offset", torch.tensor([-7], dtype=self.scales), word)
            product = (scale.flatten() * 0.03125).float()
            word_of_chip = product.view(I32).to(I64) if self.dtype == F16 else product
            self.put(f"{name}.deq_scale", word_of_chip, word)
            steps = torch.randint(-3000, 3000, (n,), dtype=I32, generator=self._random)
            self.put(f"{name}.quant_bias", steps, word)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)

    def write(self, folder: Path, name: str = "quant_model_weight_w8a8", parts: int = 0) -> Path:
        """Write the folder.

        Args:
            folder: exists.
            name: of the weights' file or files.
            parts: number of files, with an index; 0 for one file without.
        """
        (folder / "quant_model_description.json").write_text(json.dumps(self.words))
        (folder / "config.json").write_text(json.dumps({"model_type": "test"}))
        keys = list(self.tensors)
        if not parts:
            save_file(self.tensors, folder / f"{name}.safetensors")
            return folder
        files = {
            key: f"{name}-{i % parts + 1:05d}-of-{parts:05d}.safetensors"
            for i, key in enumerate(keys)
        }
        for file in set(files.values()):
            save_file({k: t for k, t in self.tensors.items() if files[k] == file}, folder / file)
        index = {"metadata": {"total_size": 0}, "weight_map": files}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
        return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def layer_in_numpy(parts: Mapping[str, Tensor], x: Tensor, scheme: str) -> np.ndarray:
    """A layer of a folder, from its tensors by the names of their parts.

    Args:
        parts: the tensors.
        x: its input, (m, k).
        scheme: as a LoadReport has it.
    """
    output = str(x.dtype).removeprefix("torch.")
    rows, weight = x.float().numpy(), parts["weight"].numpy()
    if scheme.endswith("static"):
        reciprocal = rounded(1 / parts["input_scale"].float().numpy(), output)
        offset = float(parts["input_offset"])
        return golden.linear_quant(
            golden.static_quant(rows, reciprocal, offset), weight,
            parts["deq_scale"].numpy(), bias=parts["quant_bias"].numpy(), output_dtype=output,
            packed=parts["deq_scale"].dtype == I64,
        )  # fmt: skip
    bias = parts["bias"].float().numpy() if "bias" in parts else None
    values, step = golden.dynamic_quant(rows, 7 if scheme == "A4W4 dynamic" else 127)
    scale = parts["weight_scale"].float().numpy().flatten()
    return golden.linear_quant(
        values, weight, scale, pertoken_scale=step, bias=bias, output_dtype=output
    )


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of a dtype."""
    if dtype == "bfloat16":
        return golden.bfloat16(values)
    return values.astype(np.float16).astype(np.float32)


def norm_in_numpy(x: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    """An RMSNorm that adds a bias, each step rounded to the input's dtype."""
    dtype = str(x.dtype).removeprefix("torch.")
    rows = x.float().numpy()
    normed = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + np.float32(EPS))
    value = rounded(rounded(normed, dtype) * weight.float().numpy(), dtype)
    if bias is None:
        return value
    return rounded(value + rounded(bias.float().numpy(), dtype), dtype)
