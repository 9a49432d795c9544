"""Mutated folders of compressed-tensors with layers of every kind: refused or loaded, soon."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lq_graph import load_checkpoint
from support.checkpoint_files import BF16, I8, I32
from support.compressed import (
    ASYMMETRIC,
    CHANNEL,
    CHANNEL4,
    TENSOR,
    TOKEN,
    TOKEN4,
    config,
    group,
    layer,
)
from support.injection import model_state
from support.mutations import header_of, loads, mutated, put_header, spoiled

MUTATIONS = 200
LAYERS = {"0": (CHANNEL4, TOKEN4), "1": (CHANNEL, ASYMMETRIC), "2": (TENSOR, TOKEN)}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))).bfloat16()


def write(folder: Path) -> None:
    tensors = {
        f"3.{part}": value for part, value in nn.Linear(8, 8, dtype=BF16).state_dict().items()
    }
    for name, (weights, inputs) in LAYERS.items():
        for part, value in layer(weights, inputs, 8, 8, zero_point=9).items():
            tensors[f"{name}.{part}"] = value
    tensors |= {
        "0.weight_g_idx": torch.arange(8, dtype=I32),
        "1.weight_zero_point": torch.zeros(8, 1, dtype=I8),
        "2.weight_shape": torch.tensor([8, 8]),
        "k_scale": torch.ones(1),
    }
    save_file(tensors, folder / "model.safetensors")
    rotation = {"targets": ["re:.*"], "location": "weight_input", "inverse": True, "ignore": []}
    about = config(
        *(group(*schemes, f"re:{name}$") for name, schemes in LAYERS.items()),
        group(None, TOKEN, "Attention"),
        ignore=["re:.*lm_head", "3"],
        transform_config={"config_groups": {"R1": {"type": "hadamard", "apply": [rotation]}}},
        sparsity_config={"format": "dense"},
    )
    whole = {"text_config": {"quantization_config": about}, "quantization_config": about}
    (folder / "config.json").write_text(json.dumps(whole))


def test_a_mutated_checkpoint_is_refused_or_loaded(tmp_path: Path, tally) -> None:
    write(tmp_path)
    plain = model()
    assert len(load_checkpoint(plain, tmp_path)) == 3
    config_file, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    kept = {file: file.read_bytes() for file in (config_file, weights)}
    header, rest = header_of(weights)
    r, loaded = random.Random(0), 0
    plain = model()
    before = model_state(plain)
    for i in range(MUTATIONS):
        file = config_file if r.random() < 0.7 else weights
        if r.random() < 0.2:
            file.write_bytes(spoiled(r, kept[file]))
        elif file is weights:
            put_header(weights, mutated(r, header), rest)
        else:
            whole = json.loads(kept[file])
            if r.random() < 0.8:
                del whole["text_config"]
            file.write_bytes(mutated(r, whole))
        if loads(plain, tmp_path, torch.ones(2, 8).bfloat16(), r, before, i):
            loaded += 1
            plain = model()
        file.write_bytes(kept[file])
    assert MUTATIONS / 20 < loaded < MUTATIONS * 0.7
    tally("mutated folders of several kinds refused", MUTATIONS - loaded)
    tally("mutated folders of several kinds loaded", loaded)
