"""Folders in the layouts that tools publish as compressed-tensors, rebuilt small.

The layouts are those of folders made with llmcompressor 0.14, and of its older versions' configs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lq_graph import QuantizedLinear, load_checkpoint
from support.checkpoint_files import BF16, I8
from support.compressed import (
    ASYMMETRIC,
    CHANNEL,
    CHANNEL4,
    STATIC,
    TENSOR,
    TOKEN,
    TOKEN4,
    Json,
    config,
    group,
    layer,
)
from support.compressed_golden import exact

H, INNER, WORDS = 64, 96, 40  # hidden size, inner size, words
ATTENTION = {"q_proj": (H, H), "k_proj": (32, H), "v_proj": (32, H), "o_proj": (H, H)}
MLP = {"gate_proj": (INNER, H), "up_proj": (INNER, H), "down_proj": (H, INNER)}
ZERO = torch.zeros(1, dtype=I8)
Schemes = tuple[Json, Json]


class Folder:
    """A folder in the making, and the float model that it is loaded into."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.quantized: dict[str, dict[str, Tensor]] = {}
        self.model = nn.Module()

    def module(self, name: str, made: nn.Module) -> None:
        """Add a module under its name."""
        parent, parts = self.model, name.split(".")
        for part in parts[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(parts[-1], made.to(BF16))

    def float(self, name: str, made: nn.Module, in_files: str = "") -> None:
        """Add a module whose tensors are in the files as they are."""
        self.module(name, made)
        for part, value in made.state_dict().items():
            self.tensors[f"{in_files or name}.{part}"] = torch.randn_like(value)

    def linear(
        self, name: str, size: tuple[int, int], schemes: Schemes, in_files: str = "", **more: object
    ) -> None:
        """Add a quantized layer."""
        n, k = size
        bias = bool(more.get("bias"))
        self.module(name, nn.Linear(k, n, bias=bias))
        seed = len(self.quantized)
        parts = layer(*schemes, n, k, bias=bias, zero_point=seed - 9, seed=seed)
        self.quantized[name] = parts
        kept = parts | {part: t.clone() for part, t in more.items() if isinstance(t, Tensor)}
        self.tensors |= {f"{in_files or name}.{part}": value for part, value in kept.items()}

    def decoder(self, schemes: Schemes, inner: Schemes | None = None, **more: object) -> None:
        """Add a decoder of one layer."""
        self.float("model.embed_tokens", nn.Embedding(WORDS, H))
        for name, size in ATTENTION.items():
            self.linear(f"model.layers.0.self_attn.{name}", size, schemes, **more)
        for name, size in MLP.items():
            own = schemes if name == "down_proj" or inner is None else inner
            self.linear(f"model.layers.0.mlp.{name}", size, own, **more)
        self.float("model.norm", nn.LayerNorm(H))
        self.float("lm_head", nn.Linear(H, WORDS, bias=False))

    def write(self, folder: Path, about: Json) -> nn.Module:
        """Write the files."""
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **about}))
        return self.model


def told(*groups: Json, **more: object) -> Json:
    return {"quantization_config": config(*groups, **{"ignore": ["lm_head"], **more})}


def w8a8(folder: Folder) -> Json:
    """Dynamic, with the words of versions before 0.8."""
    folder.decoder((CHANNEL, TOKEN), bias=True)
    sparse = {"format": "dense", "global_sparsity": 0.1, "ignore": [], "targets": []}
    weights = {key: value for key, value in CHANNEL.items() if not key.endswith("_dtype")}
    return told(
        {"targets": ["Linear"], "weights": weights, "input_activations": TOKEN},
        quantization_status="frozen",
        sparsity_config=sparse,
        global_compression_ratio=1.2,
    )


def tinyllama(folder: Folder) -> Json:
    """Static, one scale for a weight, in the first place of the config, with zero points."""
    folder.decoder((TENSOR, STATIC), input_zero_point=ZERO, weight_zero_point=ZERO)
    about = told(group(TENSOR, STATIC, format=None), quantization_status="frozen")
    said = about["quantization_config"]
    del said["quant_method"]
    return {"compression_config": said}


def asymmetric(folder: Folder) -> Json:
    folder.decoder((CHANNEL, ASYMMETRIC), bias=True)
    return told(group(CHANNEL, ASYMMETRIC))


def two_groups(folder: Folder) -> Json:
    """W4A4 on gate and up, W8A8 on the rest."""
    folder.decoder((CHANNEL, TOKEN), (CHANNEL4, TOKEN4))
    return told(
        group(CHANNEL, TOKEN, "re:.*self_attn.*", "re:.*down_proj"),
        group(CHANNEL4, TOKEN4, "re:.*gate_proj", "re:.*up_proj"),
    )


def overlapping(folder: Folder) -> Json:
    """The same by a pattern and the class."""
    folder.decoder((CHANNEL, TOKEN), (CHANNEL4, TOKEN4))
    return told(group(CHANNEL, TOKEN), group(CHANNEL4, TOKEN4, "re:.*gate_proj", "re:.*up_proj"))


def spinquant(folder: Folder) -> Json:
    folder.decoder((CHANNEL, TOKEN))

    def rotation(size: int | None, output: list[str], inputs: list[str]) -> Json:
        applied = [
            {"ignore": [], "inverse": False, "location": "weight_output", "targets": output},
            {"ignore": [], "inverse": True, "location": "weight_input", "targets": inputs},
        ]
        return {
            "apply": applied, "head_dim": size, "precision": "torch.float64",
            "randomize": False, "requires_grad": False, "type": "hadamard",
        }  # fmt: skip

    first = rotation(None, ["re:.*embed_tokens$", "re:.*o_proj$"], ["re:.*q_proj$", "lm_head"])
    second = rotation(32, ["re:.*v_proj$"], ["re:.*o_proj$"])
    transforms = {"config_groups": {"R1": first, "R2": second}}
    return told(group(CHANNEL, TOKEN), transform_config=transforms)


def cache(folder: Folder) -> Json:
    """An FP8 cache, and GPTQ with its order of columns."""
    folder.decoder((CHANNEL, TOKEN))
    for name, (n, k) in ATTENTION.items():
        order = torch.arange(k, dtype=torch.int32)
        folder.tensors[f"model.layers.0.self_attn.{name}.weight_g_idx"] = order
        shape = torch.tensor([n, k])
        folder.tensors[f"model.layers.0.self_attn.{name}.weight_shape"] = shape
    for part in ("k_scale", "v_scale"):
        folder.tensors[f"model.layers.0.self_attn.{part}"] = torch.ones(1, dtype=BF16)
    kv = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    return told(group({**CHANNEL, "actorder": "weight"}, TOKEN), kv_cache_scheme=kv)


def experts(folder: Folder) -> Json:
    """A model whose experts are linear layers, each with its own name."""
    folder.decoder((CHANNEL, TOKEN))
    for i in range(3):
        for name, size in MLP.items():
            folder.linear(f"model.layers.1.mlp.experts.{i}.{name}", size, (CHANNEL, TOKEN))
    folder.float("model.layers.1.mlp.gate", nn.Linear(H, 3, bias=False))
    return told(group(CHANNEL, TOKEN), ignore=["lm_head", "re:.*mlp.gate$"])


def images(folder: Folder) -> Json:
    """A model that sees images: older names in the files, the model's names in the config."""
    for name, size in ATTENTION.items():
        new, old = f"model.language_model.layers.0.{name}", f"model.layers.0.{name}"
        folder.linear(new, size, (CHANNEL, TOKEN), old)
    folder.float("model.visual.blocks.0.qkv", nn.Linear(H, H), "visual.blocks.0.qkv")
    folder.float("model.language_model.norm", nn.LayerNorm(H), "model.norm")
    folder.float("lm_head", nn.Linear(H, WORDS, bias=False))
    about = told(group(CHANNEL, TOKEN), ignore=["model.visual.blocks.0.qkv", "lm_head"])
    return {"text_config": about}


class Layout(NamedTuple):
    """A published layout.

    Attributes:
        make: fills a folder; returns the JSON.
        schemes: how many layers of each scheme are loaded.
        left_out: what the names of the tensors that are not loaded end with.
    """

    make: Callable[[Folder], Json]
    schemes: dict[str, int]
    left_out: tuple[str, ...] = ()


INT8, INT4, FIXED = "A8W8 dynamic", "A4W4 dynamic", "A8W8 static"
LAYOUTS = {
    "W8A8": Layout(w8a8, {INT8: 7}),
    "TinyLlama W8A8 static": Layout(tinyllama, {FIXED: 7}, ("zero_point",)),
    "W8A8 static, asymmetric": Layout(asymmetric, {FIXED: 7}),
    "W4A4 and W8A8": Layout(two_groups, {INT8: 5, INT4: 2}),
    "W4A4 and W8A8, overlapping": Layout(overlapping, {INT8: 5, INT4: 2}),
    "SpinQuant": Layout(spinquant, {INT8: 7}),
    "GPTQ and a cache": Layout(cache, {INT8: 7}, ("_g_idx", "_shape", "k_scale", "v_scale")),
    "experts": Layout(experts, {INT8: 16}),
    "images": Layout(images, {INT8: 4}),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout(layout: Layout, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = Folder()
    about = layout.make(folder)
    model = folder.write(tmp_path, about)
    report = load_checkpoint(model, tmp_path)
    assert Counter(loaded.scheme for loaded in report) == layout.schemes
    assert all(name.endswith(layout.left_out) for name in report.left_out)
    assert bool(report.left_out) == bool(layout.left_out)
    for loaded in report:
        made = model.get_submodule(loaded.name)
        assert isinstance(made, QuantizedLinear)
        x = torch.randn(5, loaded.k).to(BF16)
        with torch.no_grad():
            out = made(x).float().numpy()
        want = exact(folder.quantized[loaded.name], x, BF16, loaded.scheme == INT4)
        np.testing.assert_array_equal(out, want.astype(np.float32))
    state = model.state_dict()
    for name, tensor in folder.tensors.items():
        new = report.renamed.get(name, name)
        own = new.rpartition(".")[0]
        if own not in folder.quantized and new not in report.left_out:
            assert torch.equal(state[new], tensor), name
