"""Decoders of transformers whose folder has biases for norms, as msmodelslim's smoothing writes
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lq_graph
from support.hf_models import model_of, prompt

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from lq_graph.integrations import transformers as ours  # noqa: E402

BF16 = torch.bfloat16


def smoothed(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as msmodelslim writes it; returns its biases of norms and of a float layer."""
    model = model_of("qwen3").to(BF16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    lq_graph.quantize(model, {"*mlp.gate_proj": None, "*": lq_graph.A8W8Dynamic()})
    lq_graph.save_checkpoint(model, folder, "msmodelslim")
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.load_file(file)
    g = torch.Generator().manual_seed(3)
    biases = {
        "model.layers.0.input_layernorm.bias": torch.randn(64, generator=g),
        "model.layers.1.post_attention_layernorm.bias": torch.randn(64, generator=g),
        "model.layers.1.mlp.gate_proj.bias": torch.randn(96, generator=g).to(BF16),
        "model.norm.bias": torch.zeros(64),
    }
    safetensors.save_file({**tensors, **biases}, file)
    about = folder / "quant_model_description.json"
    words = json.loads(about.read_text()) | dict.fromkeys(biases, "FLOAT")
    about.write_text(json.dumps(words))
    return biases


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids, mask = prompt()
    out: torch.Tensor = model(ids, attention_mask=mask).logits
    return out


def test_biases_are_added_and_saved(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    biases = smoothed(tmp_path / "in")
    model = ours.from_pretrained(tmp_path / "in")
    assert set(model.hf_quantizer.report.left_out) == {"model.norm.bias"}
    for key, bias in biases.items():
        if key != "model.norm.bias":
            assert torch.equal(model.get_parameter(key), bias.to(BF16)), key
    want = logits(model)
    lq_graph.save_checkpoint(model, tmp_path / "out", "msmodelslim")
    (tmp_path / "out/config.json").write_bytes((tmp_path / "in/config.json").read_bytes())
    assert torch.equal(logits(ours.from_pretrained(tmp_path / "out")), want)
    model.save_pretrained(tmp_path / "again")  # its config.json names them
    assert torch.equal(logits(ours.from_pretrained(tmp_path / "again")), want)
    norm = model.model.layers[0].input_layernorm
    (hook,) = norm._forward_hooks
    norm._forward_hooks.pop(hook)
    assert not torch.equal(logits(model), want)
