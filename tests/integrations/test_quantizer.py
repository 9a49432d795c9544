"""from_pretrained and save_pretrained of transformers with quantized models, beside
`lq_graph.quantize` in memory: equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, Config, QuantizedLinear
from support.hf_models import prompt
from support.hf_quantized import (
    SCHEMES,
    assert_same,
    calibration,
    config_of,
    generated,
    in_memory,
    load,
    want_config,
)

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

from lq_graph.checkpoints.biases import add_bias  # noqa: E402
from lq_graph.integrations import transformers as ours  # noqa: E402
from lq_graph.integrations.quantizer import Quantizer  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16


# ---- quantize on load ----


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_what_from_pretrained_quantizes_is_what_quantize_does(
    name: str, scheme: str, folders: Callable[..., Path]
) -> None:
    folder = folders(name)
    model = load(folder, quantization_config=config_of(SCHEMES[scheme]))
    assert_same(model, in_memory(folder, SCHEMES[scheme]))
    assert model.is_quantized and not model.training
    assert sum(line.changed for line in model.hf_quantizer.report) >= 14
    assert isinstance(model.config.quantization_config, Config)
    assert model.config.quantization_config.calibration is None


@pytest.mark.parametrize("shards", ["1GB", "40KB"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_loads_again(
    scheme: str, shards: str, folders: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(folders(), quantization_config=config_of(SCHEMES[scheme]))
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len([*tmp_path.glob("*.safetensors")]) == 1) is (shards == "1GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)  # transformers 4: not as float32
    assert_same(again, model)
    assert again.config.quantization_config == model.config.quantization_config
    if SCHEMES[scheme].output_dtype is None:  # attention takes one dtype
        assert torch.equal(generated(again), generated(model))
    again.save_pretrained(tmp_path / "again")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)


def test_schemes_by_name(folders: Callable[..., Path], tmp_path: Path) -> None:
    """In the order of the mapping, as in quantize; it is saved and loaded again."""
    scheme = {"*.0.mlp.*": None, "*.mlp.up*": A8W8Static(), "*.mlp.*": A4W4Dynamic()}
    scheme |= {"lm_head": A8W8Dynamic(FP16), "*": A8W8Dynamic()}
    ignore = ["*.k_proj"]
    config = Config(scheme, ignore=ignore, calibration=calibration())
    model = load(folders(), quantization_config=config)
    want = load(folders())
    lq_graph.quantize(want, scheme, calibration(), ignore=ignore)
    assert_same(model, want)
    kinds = {
        name: "float" if isinstance(layer, nn.Linear) else layer.linear.weight_dtype
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | QuantizedLinear)
    }
    assert (
        kinds["model.layers.0.mlp.up_proj"] == kinds["model.layers.1.self_attn.k_proj"] == "float"
    )
    assert kinds["model.layers.1.mlp.down_proj"] == torch.int32
    assert not model.model.layers[1].mlp.up_proj.dynamic
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same(again, want)
    assert again.config.quantization_config.scheme == scheme
    assert list(again.config.quantization_config.scheme) == list(scheme)
    assert again.config.quantization_config.ignore == ignore


def test_the_head_stays_float(folders: Callable[..., Path]) -> None:
    model = load(folders(), quantization_config=Config())
    assert type(model.lm_head) is nn.Linear
    assert "float by default" in model.hf_quantizer.report[-1].note


def test_no_dtype_is_the_one_of_config_json(folders: Callable[..., Path]) -> None:
    """transformers 4 would load float32, which cannot be quantized."""
    model = AutoModelForCausalLM.from_pretrained(folders(), quantization_config=Config())
    assert_same(model, in_memory(folders(), A8W8Dynamic()))


def test_tied_weights_stay_tied(folders: Callable[..., Path], tmp_path: Path) -> None:
    folder = folders("llama", tie_word_embeddings=True)
    model = load(folder, quantization_config=Config())
    model.save_pretrained(tmp_path)
    for one in (model, load(tmp_path)):
        assert type(one.lm_head) is nn.Linear
        assert one.lm_head.weight is one.model.embed_tokens.weight
    assert_same(load(tmp_path), in_memory(folder, A8W8Dynamic()))


def test_the_model_without_its_head(folders: Callable[..., Path], tmp_path: Path) -> None:
    model = load(folders(), quantization_config=Config())
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert_same(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same(AutoModel.from_pretrained(tmp_path / "base"), base)


def test_a_model_that_quantize_changed(folders: Callable[..., Path], tmp_path: Path) -> None:
    model = in_memory(folders(), A8W8Dynamic())
    ours.attach(model)
    ours.attach(model)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)
    with pytest.raises(ValueError, match="attach: the model has no QuantizedLinear"):
        ours.attach(load(folders()))


def test_layers_that_were_quantized_later_are_saved_too(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    """config.json says what the model is when it is saved."""
    model = in_memory(folders(), A8W8Dynamic())
    ours.attach(model)
    model.model.layers[0].mlp = load(folders()).model.layers[0].mlp
    lq_graph.quantize(model, A4W4Dynamic())
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.model.layers[0].mlp.up_proj.linear.weight_dtype == torch.int32
    assert_same(again, model)


def test_biases_of_norms(folders: Callable[..., Path], tmp_path: Path) -> None:
    """msmodelslim's smoothing gives norms and float layers a bias that their class has not."""
    model = in_memory(folders("llama"), A8W8Dynamic())
    norm, head = model.model.layers[1].input_layernorm, model.lm_head
    for module, size in ((norm, 64), (head, 128)):
        module.register_parameter("bias", nn.Parameter(torch.randn(size).to(BF16), False))
    norm.register_forward_hook(add_bias)
    ours.attach(model)
    model.save_pretrained(tmp_path)
    names = ["lm_head.bias", "model.layers.1.input_layernorm.bias"]
    assert want_config(tmp_path)["biases"] == names
    again = load(tmp_path)
    assert_same(again, model)
    ids, mask = prompt()
    with torch.no_grad():
        assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)
    again.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), model)
    assert_same(AutoModel.from_pretrained(tmp_path), model.model)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    del state[names[1]]
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lq_graph: {names[1]} is not loaded"):
        load(tmp_path)


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
def test_a_process_that_did_not_import_us_refuses(
    auto_class: Any, folders: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers warns of an unknown quant_method, and fills what is missing at random."""
    scheme = {"model.layers.1.mlp.up_proj": A8W8Dynamic()}
    load(folders(), quantization_config=Config(scheme)).save_pretrained(tmp_path)
    from transformers.quantizers import auto

    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lq_graph")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lq_graph")
    with pytest.raises(RuntimeError, match="mismatch"):
        auto_class.from_pretrained(tmp_path)


def test_two_layers_with_one_weight(folders: Callable[..., Path], tmp_path: Path) -> None:
    model = load(folders())
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    lq_graph.quantize(model, A8W8Dynamic())
    ours.attach(model)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


_SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
_TEXT = dict(_SIZES, num_key_value_heads=2, vocab_size=128)
# what is special about them: class, sizes
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "two stacks, initialized by their parents": (
        "T5ForConditionalGeneration",
        dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=128),
    ),
    "experts that transformers 5 merges": (
        "MixtralForCausalLM",
        dict(_TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "names that transformers 5 changes": (
        "LlavaForConditionalGeneration",
        dict(
            text_config=dict(_TEXT, model_type="llama"),
            vision_config=dict(_SIZES, model_type="clip_vision_model", image_size=32, patch_size=8),
            image_token_index=100,
        ),
    ),
    "no decoder": ("BertForSequenceClassification", dict(_SIZES, vocab_size=128)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name: str, tmp_path: Path) -> None:
    kind, sizes = ARCHITECTURES[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**sizes)
    torch.manual_seed(0)
    model_class(config).to(BF16).save_pretrained(tmp_path / "float")
    want = model_class.from_pretrained(tmp_path / "float", dtype=BF16)
    lq_graph.quantize(want, A8W8Dynamic())
    model = model_class.from_pretrained(
        tmp_path / "float", dtype=BF16, quantization_config=Config()
    )
    assert_same(model, want)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    again = model_class.from_pretrained(tmp_path / "saved")
    assert_same(again, want)
    for (key, got), (_, wanted) in zip(again.named_buffers(), want.named_buffers(), strict=True):
        assert torch.equal(got, wanted), key


# ---- where the layers are ----


@pytest.mark.parametrize("device_map", ["cpu", "auto", "npu", {"": "npu:0"}, {"": 0}], ids=str)
def test_device_map(device_map: Any, folders: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    device = "cpu" if device_map == "cpu" else "npu"
    model = load(folders(), quantization_config=Config(), device_map=device_map)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    for one in (model, again):
        assert {tensor.device.type for tensor in one.state_dict().values()} == {device}
        assert_same(one, in_memory(folders(), A8W8Dynamic()))
        assert torch.equal(
            generated(one), generated(in_memory(folders(), A8W8Dynamic()).to(device))
        )


@pytest.mark.parametrize("scheme", [A8W8Dynamic(), A8W8Static()], ids=str)
def test_hooks_of_accelerate_are_kept(
    scheme: Any, folders: Callable[..., Path], tmp_path: Path
) -> None:
    """With several devices every layer has a hook, which moves its input, before the quantizer
    sees the model. A layer with a hook is not a plain one."""
    accelerate = pytest.importorskip("accelerate")
    load(folders(), quantization_config=config_of(scheme)).save_pretrained(tmp_path)
    want = in_memory(folders(), scheme)
    for config in (config_of(scheme), Config.from_dict(want_config(tmp_path))):
        quantizer = Quantizer(config, pre_quantized=config.layers is not None)
        model = load(folders())
        if config.layers is not None:
            quantizer.preprocess_model(model)
            state = safetensors.load_file(tmp_path / "model.safetensors")
            model.load_state_dict(state, assign=True)
        places = {f"model.{name}": "npu:0" for name, _ in model.model.named_children()}
        places["lm_head"] = "npu:0"
        accelerate.dispatch_model(model, places, main_device="npu:0", force_hooks=True)
        quantizer.postprocess_model(model)
        for layer in (one for one in model.modules() if isinstance(one, QuantizedLinear)):
            assert isinstance(layer._hf_hook, accelerate.hooks.AlignDevicesHook)
        assert torch.equal(generated(model), generated(want.npu()))
