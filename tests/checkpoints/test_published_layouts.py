"""Folders in the layouts that msmodelslim writes, rebuilt small: loaded with the files' values, or
refused in one sentence.

The Qwen layouts are those of folders that msmodelslim 26.1 made from small models; DeepSeek's and
MiniMax's follow its source, because their models could not be quantized small.
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
from torch import nn

from lq_graph import CheckpointError, QuantizedLinear, load_checkpoint
from support.injection import model_state
from support.published import (
    BF16,
    F16,
    F32,
    FusedExperts,
    Msmodelslim,
    layer_in_numpy,
    norm_in_numpy,
    rounded,
    tensors_in,
)

H, INNER, WORDS = 64, 96, 40  # hidden size, inner size, words


class Layout(NamedTuple):
    """A published layout.

    Attributes:
        write: writes the folder; returns the float model.
        schemes: how many layers of each scheme are loaded.
        left_out: what the names of the tensors that are not loaded end with.
    """

    write: Callable[[Path], nn.Module]
    schemes: dict[str, int]
    left_out: tuple[str, ...] = ()


def decoder(made: Msmodelslim, word: str, *, biases: str = "", inner: str = "") -> None:
    """The layers of a decoder without experts."""
    made.modules["model.embed_tokens"] = nn.Embedding(WORDS, H, dtype=made.dtype)
    made.put("model.embed_tokens.weight", torch.randn(WORDS, H).to(made.dtype))
    for name, n in (("q_proj", H), ("k_proj", 32), ("v_proj", 32)):
        made.linear(f"model.layers.0.self_attn.{name}", n, H, word, biases)
    made.linear("model.layers.0.self_attn.o_proj", H, H, word)
    for name in ("gate_proj", "up_proj"):
        made.linear(f"model.layers.0.mlp.{name}", INNER, H, inner or word)
    made.linear("model.layers.0.mlp.down_proj", H, INNER, word)
    made.linear("lm_head", WORDS, H, "FLOAT")


def qwen2(folder: Path, dtype: torch.dtype = BF16, word: str = "W8A8", **given) -> nn.Module:
    made = Msmodelslim(dtype, **given)
    decoder(made, word, biases="model")
    made.linear("model.layers.1.mlp.down_proj", H, INNER, "FLOAT")
    for name in ("input_layernorm", "post_attention_layernorm"):
        made.norm(f"model.layers.0.{name}", H)
    made.write(folder)
    return made.model()


def qwen3_mix(folder: Path) -> nn.Module:
    made = Msmodelslim()
    made.words["model_quant_type"] = "W8A8_MIX"
    decoder(made, "W8A8_MIX", biases="file")
    made.linear("model.layers.1.mlp.gate_proj", INNER, H, "FLOAT", "file")  # the bias of the norm's
    made.norm("model.layers.0.input_layernorm", H, bias=1.0)
    made.norm("model.layers.0.post_attention_layernorm", H, bias=0.2)
    for name in ("model.layers.0.self_attn.q_norm", "model.norm"):
        made.norm(name, H, bias=0.0)
    made.write(folder, "quant_model_weight_w8a8_mix", parts=2)
    return made.model()


def qwen3_w4a4(folder: Path) -> nn.Module:
    made = Msmodelslim(version=1)
    decoder(made, "W8A8_DYNAMIC", inner="W4A4_DYNAMIC")
    made.norm("model.norm", H)
    made.write(folder, "quant_model_weights", parts=1)
    return made.model()


def deepseek(folder: Path, mtp: bool = True) -> nn.Module:
    """Attention W8A8, experts W8A8_DYNAMIC, one more layer that the description does not have."""
    made = Msmodelslim(version=1)
    decoder(made, "W8A8")
    made.linear("model.layers.0.self_attn.kv_b_proj", H, 32, "FLOAT")
    for expert in range(2):
        for name, n, k in (("gate_proj", 32, H), ("up_proj", 32, H), ("down_proj", H, 32)):
            made.linear(f"model.layers.1.mlp.experts.{expert}.{name}", n, k, "W8A8_DYNAMIC")
    made.linear("model.layers.1.mlp.gate", 2, H, "FLOAT")
    described = dict(made.words)
    made.norm("model.layers.2.enorm", H)
    made.linear("model.layers.2.eh_proj", H, 2 * H, "FLOAT")
    made.words = described
    made.write(folder, "quant_model_weights", parts=3)
    if not mtp:
        made.modules = {k: m for k, m in made.modules.items() if "layers.2." not in k}
    return made.model()


def minimax_c8(folder: Path) -> nn.Module:
    """Rotated weights and an int8 KV cache; the rotation is in optional/."""
    made = Msmodelslim(version=1)
    decoder(made, "W8A8_DYNAMIC")
    for name in ("w1", "w3"):
        made.linear(f"model.layers.0.block_sparse_moe.experts.0.{name}", 32, H, "W8A8_DYNAMIC")
    for name in ("k_proj", "v_proj"):
        for part in ("kv_cache_scale", "kv_cache_offset"):
            made.put(f"model.layers.0.self_attn.{name}.{part}", torch.ones(32), "C8")
    made.put("model.layers.0.self_attn.fa_k.scale", torch.ones(2, 1), "FAQuant")
    made.words |= {"kv_cache_type": "C8", "kv_quant_type": "C8"}
    rotation = {"global_rotation": "optional/quarot.safetensors"}
    made.words["optional"] = {"quarot": {"rotation_map": rotation}}
    (folder / "optional").mkdir()
    save_file({"global_rotation": torch.eye(H)}, folder / "optional/quarot.safetensors")
    made.write(folder, "quant_model_weights", parts=1)
    return made.model()


def old_norms(folder: Path, change: float = 0.0, keep: bool = True) -> nn.Module:
    """Norms as older versions save them: under two names, with the word of the model."""
    made = Msmodelslim()
    decoder(made, "W8A8")
    made.norm("model.layers.0.input_layernorm", H, bias=0.5)
    for part in ("weight", "bias"):
        key = f"model.layers.0.input_layernorm.{part}"
        new = f"model.layers.0.input_layernorm.module.{part}"
        made.put(new, made.tensors[key] + change, "W8A8")
        if not keep:
            del made.tensors[key], made.words[key]
    made.write(folder)
    return made.model()


QWEN2 = {"A8W8 static": 7}
LAYOUTS = {
    "Qwen2.5 W8A8": Layout(qwen2, QWEN2),
    "Qwen2.5 W8A8, float16": Layout(lambda folder: qwen2(folder, F16), QWEN2),
    "one scale": Layout(lambda folder: qwen2(folder, one_scale=True), QWEN2),
    "one scale, float16": Layout(lambda folder: qwen2(folder, F16, one_scale=True), QWEN2),
    "one scale, dynamic": Layout(
        lambda folder: qwen2(folder, word="W8A8_DYNAMIC", one_scale=True), {"A8W8 dynamic": 7}
    ),
    "310P, W8A8S": Layout(lambda folder: qwen2(folder, F16, "W8A8S"), QWEN2),
    "Qwen3 W8A8_MIX": Layout(
        qwen3_mix,
        {"A8W8 dynamic": 7},
        ("input_scale", "input_offset", "deq_scale", "quant_bias", "q_norm.bias", "norm.bias"),
    ),
    "Qwen3 W4A4": Layout(qwen3_w4a4, {"A8W8 dynamic": 5, "A4W4 dynamic": 2}),
    "DeepSeek W8A8 with MTP": Layout(deepseek, {"A8W8 static": 7, "A8W8 dynamic": 6}),
    "MiniMax W8A8C8": Layout(
        minimax_c8,
        {"A8W8 dynamic": 9},
        ("kv_cache_scale", "kv_cache_offset", "fa_k.scale"),
    ),
    "anti-outlier": Layout(old_norms, QWEN2),
    "anti-outlier, module only": Layout(lambda folder: old_norms(folder, keep=False), QWEN2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_loads_with_the_values_of_the_files(layout, tmp_path) -> None:
    model = layout.write(tmp_path)
    report = load_checkpoint(model, tmp_path)
    assert Counter(line.scheme for line in report) == layout.schemes
    assert all(key.endswith(layout.left_out) for key in report.left_out)
    assert all(report.left_out.values())
    assert {end for end in layout.left_out if any(k.endswith(end) for k in report.left_out)} == set(
        layout.left_out
    )
    files = {key.replace("norm.module.", "norm."): t for key, t in tensors_in(tmp_path).items()}
    for line in report:
        check_layer(model.get_submodule(line.name), line.name, line.scheme, files)
    check_floats(model, {line.name for line in report}, files, set(report.left_out))


def check_layer(layer: nn.Module, name: str, scheme: str, files: dict[str, torch.Tensor]) -> None:
    """A loaded layer computes what its tensors in the files say."""
    assert isinstance(layer, QuantizedLinear)
    parts = {k.removeprefix(f"{name}."): t for k, t in files.items() if k.startswith(f"{name}.")}
    x = torch.randn(3, parts["weight"].shape[1], generator=torch.Generator().manual_seed(4))
    x = x.to(layer.input_dtype)
    want = layer_in_numpy(parts, x, scheme)
    got = layer(x).detach().float().numpy()
    np.testing.assert_array_equal(got, want.astype(np.float32), err_msg=name)


def check_floats(
    model: nn.Module, quantized: set[str], files: dict[str, torch.Tensor], left_out: set[str]
) -> None:
    """Everything else has the values of the files, and norms and float layers add their biases."""
    state = model.state_dict()
    for key, tensor in files.items():
        name = key.rpartition(".")[0]
        if name in quantized or key in left_out:
            continue
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
        if not key.endswith(".bias"):
            continue
        module, weight = model.get_submodule(name), files[f"{name}.weight"]
        x = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(5))
        x = x.to(weight.dtype)
        got = module(x).detach().float().numpy()
        if weight.dim() == 1:
            want = norm_in_numpy(x, weight, tensor)
        else:
            wide = x.double().numpy() @ weight.double().numpy().T + tensor.double().numpy()
            want = rounded(wide.astype(np.float32), "bfloat16")
        np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-6, err_msg=name)


def test_the_layer_of_several_tokens_may_be_ignored(tmp_path) -> None:
    model = deepseek(tmp_path, mtp=False)
    report = load_checkpoint(model, tmp_path, ignore=["model.layers.2.*"])
    assert Counter(line.scheme for line in report) == LAYOUTS["DeepSeek W8A8 with MTP"].schemes
    assert set(report.left_out) == {"model.layers.2.enorm.weight", "model.layers.2.eh_proj.weight"}


REFUSED = {
    "a layer that the model does not have": (
        lambda folder: deepseek(folder, mtp=False),
        "model.layers.2.enorm.weight: expected a tensor the model has",
    ),
    "two norms": (
        lambda folder: old_norms(folder, change=1.0),
        "module.bias: expected the values of model.layers.0.input_layernorm.bias",
    ),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_a_layout_is_refused(write, message, tmp_path) -> None:
    model = write(tmp_path)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


# ---- experts ----


def experts(folder: Path, kind: str, block: str = "mlp", word: str = "W8A8_DYNAMIC") -> None:
    """A folder with the layers of two experts."""
    made = Msmodelslim()
    made.modules["norm"] = nn.LayerNorm(H, dtype=BF16)
    made.put("norm.weight", torch.ones(H, dtype=BF16))
    made.put("norm.bias", torch.zeros(H, dtype=BF16))
    for expert in range(2):
        for name, n, k in (("gate_proj", 32, H), ("up_proj", 32, H), ("down_proj", H, 32)):
            made.linear(f"model.layers.0.{block}.experts.{expert}.{name}", n, k, word)
    if kind == "compressed-tensors":
        made.tensors = {k: t for k, t in made.tensors.items() if not k.endswith("offset")}
        int8 = {"num_bits": 8, "type": "int", "symmetric": True}
        group = {
            "targets": ["Linear"],
            "weights": {**int8, "strategy": "channel", "dynamic": False},
            "input_activations": {**int8, "strategy": "token", "dynamic": True},
        }
        config = {"quant_method": kind, "config_groups": {"group_0": group}, "ignore": []}
        made.write(folder)
        (folder / "quant_model_description.json").unlink()
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    else:
        made.write(folder)


KINDS = pytest.mark.parametrize("kind", ["msmodelslim", "compressed-tensors"])


@KINDS
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
@pytest.mark.parametrize("word", ["W8A8_DYNAMIC", "FLOAT"])
def test_experts_in_one_tensor_are_refused(kind, block, word, tmp_path) -> None:
    """Versions before 5 of transformers have a layer for each expert; see the next test."""
    experts(tmp_path, kind, block, word)
    model = Msmodelslim().model()
    model.add_module("norm", nn.LayerNorm(H, dtype=BF16))
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.experts = FusedExperts(2, 32, H, BF16)
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([layer])
    before = model_state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before
    for part in (
        f"model.layers.0.{block}.experts.0.",
        "expected an nn.Linear for each expert in the model",
        "found all experts in one tensor, model.layers.0.mlp.experts.gate_up_proj (2, 64, 64)",
        "What to do: make the model with a version of transformers that has an nn.Linear for each",
    ):
        assert part in str(caught.value)


@KINDS
def test_experts_with_a_layer_each_load(kind, tmp_path) -> None:
    experts(tmp_path, kind)
    layers = {
        f"model.layers.0.mlp.experts.{expert}.{name}": nn.Linear(k, n, bias=False, dtype=BF16)
        for expert in range(2)
        for name, n, k in (("gate_proj", 32, H), ("up_proj", 32, H), ("down_proj", H, 32))
    }
    made = Msmodelslim()
    made.modules = {"norm": nn.LayerNorm(H, dtype=BF16), **layers}
    model = made.model()
    report = load_checkpoint(model, tmp_path)
    assert {line.name for line in report} == set(layers)
    files = tensors_in(tmp_path)
    for line in report:
        check_layer(model.get_submodule(line.name), line.name, line.scheme, files)


def test_the_static_layers_of_a_mixed_folder_are_preferred_on_request(tmp_path) -> None:
    model = qwen3_mix(tmp_path)
    report = load_checkpoint(model, tmp_path, prefer="static")
    assert Counter(line.scheme for line in report) == {"A8W8 static": 7}
    assert {key.rpartition(".")[2] for key in report.left_out} == {"bias"}
    files = tensors_in(tmp_path)
    for line in report:
        check_layer(model.get_submodule(line.name), line.name, line.scheme, files)
    with pytest.raises(CheckpointError, match="prefer is 'fast'"):
        load_checkpoint(model, tmp_path, prefer="fast")


def test_float32_scales_of_int4_are_those_of_the_files(tmp_path) -> None:
    """The golden of an int4 layer reads the int8 values of the file, the layer has them packed."""
    model = qwen3_w4a4(tmp_path)
    load_checkpoint(model, tmp_path)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    files = tensors_in(tmp_path)
    assert layer.linear.weight.dtype == torch.int32
    want = files["model.layers.0.mlp.up_proj.weight_scale"].flatten()
    assert want.dtype == F32 and torch.equal(layer.linear.scale, want)
