"""What save_checkpoint writes is what other programs read.

The programs themselves open the folders if there is a Python that has them, in
LQ_INTEROP_LLMCOMPRESSOR, or this one. The fields of the configuration are compared with recorded
ones everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static
from support.processes import script

SCHEMES: dict[str, Any] = {
    "dynamic": A8W8Dynamic(),
    "static": A8W8Static(symmetric=True, int8_between=False),
    "asymmetric": A8W8Static(int8_between=False),
    "int4": A4W4Dynamic(),
}

# ---- the fields, recorded from llmcompressor 0.14 with compressed-tensors 0.19 ----

ARGUMENTS = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
    "observer_kwargs": {}, "scale_dtype": None, "strategy": "channel", "symmetric": True,
    "type": "int", "zp_dtype": None,
}  # fmt: skip
INPUTS: dict[str, dict[str, Any]] = {
    "dynamic": {"dynamic": True, "strategy": "token"},
    "static": {"strategy": "tensor"},
    "asymmetric": {"strategy": "tensor", "symmetric": False, "zp_dtype": "torch.int8"},
    "int4": {"dynamic": True, "strategy": "token", "num_bits": 4},
}


def recorded(name: str) -> dict[str, Any]:
    group = {
        "format": "int-quantized",
        "input_activations": {**ARGUMENTS, **INPUTS[name]},
        "output_activations": None,
        "targets": ["Linear"],
        "weights": {**ARGUMENTS, "num_bits": INPUTS[name].get("num_bits", 8)},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "int-quantized",
        "global_compression_ratio": None,
        "ignore": ["head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


# name, dtype and shape of each tensor of a layer of n = 16, k = 32 with a bias
TENSORS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "dynamic": {"weight": ("int8", (16, 32)), "weight_scale": ("float32", (16, 1))},
    "static": {
        "weight": ("int8", (16, 32)), "weight_scale": ("float32", (16, 1)),
        "input_scale": ("float32", (1,)),
    },
    "asymmetric": {
        "weight": ("int8", (16, 32)), "weight_scale": ("float32", (16, 1)),
        "input_scale": ("float32", (1,)), "input_zero_point": ("int8", (1,)),
    },
    "int4": {"weight": ("int8", (16, 32)), "weight_scale": ("float32", (16, 1))},
}  # fmt: skip


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.up(x))


def saved(name: str, folder: Path, format: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON and the tensors of a model whose `up` is quantized."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model, data = Model().bfloat16(), [torch.rand(4, 32).bfloat16()]
    batches = data if isinstance(SCHEMES[name], A8W8Static) else None
    lq_graph.quantize(model, SCHEMES[name], batches, filter_fn=lambda _, name: name == "up")
    lq_graph.save_checkpoint(model, folder, format)
    about = "config.json" if format == "compressed-tensors" else "quant_model_description.json"
    (weights,) = folder.glob("*.safetensors")
    return json.loads((folder / about).read_text()), load_file(weights)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_fields_of_compressed_tensors(name: str, tmp_path: Path) -> None:
    config, tensors = saved(name, tmp_path, "compressed-tensors")
    found = config["quantization_config"]
    for arguments in found["config_groups"]["group_0"].values():
        if isinstance(arguments, dict):  # it is told how the scales were found, in free words
            assert arguments.pop("observer") in ("minmax", None)
    assert found == recorded(name)
    layer = {
        key.removeprefix("up."): (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in tensors.items()
        if key.startswith("up.")
    }
    assert layer == {**TENSORS[name], "bias": ("bfloat16", (16,))}
    if name == "int4":
        assert int(tensors["up.weight"].min()) >= -8 and int(tensors["up.weight"].max()) <= 7


def test_the_groups_of_several_schemes_name_their_layers(tmp_path: Path) -> None:
    model = Model().bfloat16()
    lq_graph.quantize(model, A4W4Dynamic(), filter_fn=lambda _, name: name == "up")
    lq_graph.quantize(model, A8W8Dynamic())
    lq_graph.save_checkpoint(model, tmp_path, "compressed-tensors")
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = found["config_groups"].values()
    assert {(group["weights"]["num_bits"], *group["targets"]) for group in groups} == {
        (4, "up"),
        (8, "head"),
    }
    assert found["ignore"] == []


WORDS = {"dynamic": "W8A8_DYNAMIC", "static": "W8A8", "asymmetric": "W8A8", "int4": "W4A4_DYNAMIC"}


@pytest.mark.parametrize("name", SCHEMES)
def test_the_fields_of_msmodelslim(name: str, tmp_path: Path) -> None:
    """As msmodelslim 26.1 writes them, and what vllm-ascend reads of them."""
    found, tensors = saved(name, tmp_path, "msmodelslim")
    word, static = WORDS[name], WORDS[name] == "W8A8"
    parts = ["weight", "weight_scale"]
    parts += ["quant_bias", "input_scale", "input_offset", "deq_scale"] if static else []
    parts += [] if static else ["weight_offset"]
    assert found == {
        **{f"up.{part}": word for part in parts},
        "up.bias": "FLOAT", "head.weight": "FLOAT", "head.bias": "FLOAT",
        "version": "1.0.0", "model_quant_type": word, "metadata": {}, "group_size": 0,
        "optional": {},
    }  # fmt: skip
    assert {key for key in found if "." in key} == tensors.keys()
    dtypes = {
        "weight": torch.int8, "quant_bias": torch.int32, "bias": torch.bfloat16,
    }  # fmt: skip
    for part in parts:
        assert tensors[f"up.{part}"].dtype == dtypes.get(part, torch.float32), part


# ---- opened by the programs themselves ----


def other_python() -> str:
    """A Python that has compressed-tensors and transformers; empty for none."""
    if given := os.environ.get("LQ_INTEROP_LLMCOMPRESSOR", ""):
        return given
    wanted = ("compressed_tensors", "transformers")
    return sys.executable if all(map(importlib.util.find_spec, wanted)) else ""


VOCABULARY = 64


def trained(folder: Path, tied: bool) -> None:
    """A small float model that has learned a rule, so that each next token has a margin; with a
    tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64,
        tie_word_embeddings=tied, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        rows = [torch.randint(VOCABULARY, (16, 1))]
        for _ in range(15):
            rows.append((5 * rows[-1] + 7) % VOCABULARY)
        batch = torch.cat(rows, 1)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_transformers_opens_it_and_generates_the_same_tokens(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if not (python := other_python()):
        pytest.skip("no Python that has compressed_tensors")
    trained(tmp_path / "float", tied)
    data = [torch.randint(VOCABULARY, (8, 16)) for _ in range(2)]
    ids, ours = torch.randint(VOCABULARY, (2, 12)), {}
    for name, config in SCHEMES.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", dtype=torch.bfloat16
        )
        batches = data if isinstance(config, A8W8Static) else None
        lq_graph.quantize(model, config, batches, filter_fn=lambda _, name: name != "lm_head")
        with torch.no_grad():
            logits = model(ids).logits.float()
            tokens = model.generate(ids[:1], max_new_tokens=16, do_sample=False)
        for size in ("5GB", "30kB"):
            folder = tmp_path / f"{name} {size}"
            lq_graph.save_checkpoint(
                model, folder, "compressed-tensors", copy_from=tmp_path / "float",
                max_shard_size=size,
            )  # fmt: skip
            assert (len(list(folder.glob("*.safetensors"))) > 2) == (size != "5GB")
            torch.save(ids, f"{folder}.ids.pt")
            ours[str(folder)] = name, logits, tokens
    command = [python, *script("open_saved.py")[:1], *ours]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, (name, logits, tokens) in ours.items():
        for found in torch.load(f"{folder}.out.pt"):
            assert (found["wrong"], found["dtype"], found["word"]) == ({}, "torch.bfloat16", "w5")
            assert found["tied"] == tied
            assert torch.equal(found["tokens"], tokens), name
            # int4 activations: the package's range is 7.5 steps, the chip's is 7
            limit = 0.25 if name == "int4" else 0.03
            assert (found["logits"] - logits).abs().max() < limit * logits.abs().max(), name
