"""from_pretrained and save_pretrained of transformers with quantized models, beside
`lq_graph.quantize` in memory: equal bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, Config, QuantizedLinear
from support.hf_models import model_of, prompt

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

from lq_graph.integrations import transformers as ours  # noqa: E402
from lq_graph.integrations.quantizer import Quantizer  # noqa: E402
from lq_graph.integrations.saved import Loading  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16


def load(folder: Path, dtype: Any = "auto", **given: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)


SCHEMES: dict[str, Any] = {
    "A8W8 dynamic": A8W8Dynamic(),
    "A8W8 dynamic to float16": A8W8Dynamic(FP16),
    "A4W4 dynamic": A4W4Dynamic(),
    "A8W8 static": A8W8Static(),
}


def calibration() -> list[Tensor]:
    return [prompt()[0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of float models, each made once; nothing writes into them."""
    made: dict[str, Path] = {}

    def folder(name: str = "qwen2", dtype: torch.dtype = BF16, **changes: Any) -> Path:
        key = f"{name} {dtype} {changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("float")
            model = model_of(name, **changes).to(dtype)
            model.save_pretrained(made[key])
        return made[key]

    return folder


def quantized_in(model: nn.Module) -> list[str]:
    return sorted(n for n, m in model.named_modules() if isinstance(m, QuantizedLinear))


def config_of(scheme: Any) -> Config:
    return Config(scheme, calibration=calibration() if isinstance(scheme, A8W8Static) else None)


def in_memory(folder: Path, scheme: Any) -> Any:
    model = load(folder)
    lq_graph.quantize(model, scheme, calibration() if isinstance(scheme, A8W8Static) else None)
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Bit for bit, and the same classes under the same names."""
    got, want = one.state_dict(), other.state_dict()
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(got[key].cpu(), tensor.cpu()), key
    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (one, other)]
    assert kinds[0] == kinds[1]
    for name, module in other.named_modules():
        if isinstance(module, QuantizedLinear):
            new: Any = one.get_submodule(name)
            assert new.input_dtype == module.input_dtype
            assert new.linear.output_dtype == module.linear.output_dtype
            assert not any(p.requires_grad for p in new.parameters())
            assert new.training == module.training


@torch.no_grad()
def text(model: Any) -> Tensor:
    ids, mask = (tensor.to(model.device) for tensor in prompt())
    return model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False).cpu()


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
        assert torch.equal(text(again), text(model))
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
        assert torch.equal(text(one), text(in_memory(folders(), A8W8Dynamic()).to(device)))


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
        assert torch.equal(text(model), text(want.npu()))


def want_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


# ---- folders of other tools ----


def checkpoint(folder: Path, to: Path, scheme: Any, kind: str) -> Any:
    """A folder as a tool writes it; returns the model in it."""
    model = in_memory(folder, scheme)
    lq_graph.save_checkpoint(model, to, kind, copy_from=folder)
    return model


@pytest.mark.parametrize("kind", ["compressed-tensors", "msmodelslim"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_folder_of_another_tool(
    name: str, kind: str, folders: Callable[..., Path], tmp_path: Path
) -> None:
    want = checkpoint(folders(name), tmp_path / "in", A8W8Dynamic(), kind)
    model = ours.from_pretrained(tmp_path / "in")
    assert_same(model, want)
    for one in (model, want):  # buffers that no file holds
        assert torch.equal(one.model.rotary_emb.inv_freq, want.model.rotary_emb.inv_freq)
    assert torch.equal(text(model), text(want))
    assert (
        len(model.hf_quantizer.report) == len(want.state_dict()) // 3 or model.hf_quantizer.report
    )
    assert model.generation_config.eos_token_id == 2 and not model.training
    model.save_pretrained(tmp_path / "out")
    assert_same(load(tmp_path / "out"), model)
    assert_same(ours.from_pretrained(tmp_path / "out"), model)  # the door takes every folder


@pytest.mark.parametrize("place", ["checkpoint", "Config"])
def test_the_arguments_of_load_checkpoint(
    place: str, folders: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint(folders(), tmp_path / "in", A8W8Dynamic(), "compressed-tensors")

    def given(**arguments: Any) -> Any:
        if place == "Config":
            config = Config(checkpoint=arguments)
            return ours.from_pretrained(tmp_path / "in", quantization_config=config)
        return ours.from_pretrained(tmp_path / "in", checkpoint=arguments)

    model = given(dtype=FP16)
    assert model.model.layers[0].mlp.up_proj.linear.output_dtype == FP16
    with pytest.raises(TypeError, match="unexpected keyword argument 'nosuch'"):
        given(nosuch=1)


def test_msmodelslim_through_transformers(folders: Callable[..., Path], tmp_path: Path) -> None:
    """Its config.json says nothing of quantization: transformers would cast int8 to floats."""
    want = checkpoint(folders(), tmp_path / "in", A8W8Dynamic(), "msmodelslim")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    file.rename(file.with_name("model.safetensors"))
    assert_same(load(tmp_path / "in", quantization_config=Config()), want)


@pytest.mark.parametrize("device_map", ["npu", {"": "npu:0"}], ids=str)
def test_a_folder_of_another_tool_on_a_device(
    device_map: Any, folders: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    want = checkpoint(folders(), tmp_path / "in", A8W8Dynamic(), "compressed-tensors")
    model = ours.from_pretrained(tmp_path / "in", device_map=device_map)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"npu"}
    assert model.model.rotary_emb.inv_freq.device.type == "npu"
    assert_same(model, want)
    assert torch.equal(text(model), text(want.npu()))


def test_a_folder_of_another_tool_with_tied_weights(
    folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = folders("llama", tie_word_embeddings=True)
    want = checkpoint(folder, tmp_path / "in", A8W8Dynamic(), "compressed-tensors")
    model = ours.from_pretrained(tmp_path / "in")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, want)


def test_the_door_quantizes_float_folders(folders: Callable[..., Path]) -> None:
    model = ours.from_pretrained(folders(), quantization_config=Config(A4W4Dynamic()))
    assert_same(model, in_memory(folders(), A4W4Dynamic()))


# ---- what config.json holds ----

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "static": dict(scheme=A8W8Static(FP16, symmetric=True, int8_between=False)),
    "by name, in this order": dict(
        scheme={"z*": A4W4Dynamic(), "*.mlp.*": None, "a*": A8W8Dynamic(BF16), "*": A8W8Dynamic()}
    ),
    "ignore": dict(scheme=A4W4Dynamic(), ignore=["lm_head", "re:.*gate"]),
    "checkpoint": dict(checkpoint={"mmap": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_json(name: str) -> None:
    config = Config(**CONFIGS[name])
    found = json.loads(json.dumps(config.to_dict(), sort_keys=True))  # as transformers writes it
    again = transformers.quantizers.AutoQuantizationConfig.from_dict(found)
    for other in (
        again,
        copy.deepcopy(config),
        Config.from_dict(json.loads(config.to_json_string())),
    ):
        assert other == config and dict(other) == config.to_dict()
        assert other.scheme == config.scheme and other.ignore == config.ignore
        if isinstance(config.scheme, dict):
            assert list(other.scheme) == list(config.scheme)
    assert (name == "default") is (again == Config())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(scheme="w8a8"), "Config: scheme is 'w8a8'; allowed are A8W8Dynamic"),
        (dict(scheme=None), "Config: scheme is None; allowed"),
        (dict(scheme={"*": 8}), r"Config: scheme\['\*'\] is 8; allowed"),
        (dict(scheme={3: None}), r"Config: scheme\[3\] is None; allowed"),
        (dict(ignore="lm_head"), r"ignore is 'lm_head'; allowed .* What to do: pass \['lm_head'\]"),
    ],
)
def test_a_wrong_config(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Config(**given)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(version=2), "version is 2, and this lq_graph reads 1"),
    "scheme": (lambda c: c["scheme"].update(name="A2W2"), "'A2W2'. What to do: save the model"),
    "output": (lambda c: c["scheme"].update(output_dtype="int8"), "output_dtype is 'int8'"),
    "dtype": (lambda c: c.update(dtype="float32"), "dtype is 'float32'"),
    "no dtype": (lambda c: c.pop("dtype"), "'dtype'. What to do"),
    "layers": (lambda c: c.update(layers=3), "not iterable. What to do"),
    "tensors": (lambda c: c["layers"][0]["tensors"].update(x="int8"), "layers has"),
    "tensor's dtype": (
        lambda c: c["layers"][0]["tensors"].update({"linear.weight": "save"}),
        "layers has",
    ),
    "names": (lambda c: c["layers"][0].update(names=[3]), "names has 3"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_config_json(name: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    change, text = DAMAGE[name]
    load(folders(), quantization_config=Config()).save_pretrained(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match="lq_graph: quantization_config in config.json: .*" + text):
        load(tmp_path)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((folder / "config.json").read_text())
    change(found["quantization_config"])
    (folder / "config.json").write_text(json.dumps(found))


# ---- refusals ----


def test_refusals_before_the_files_are_read(folders: Callable[..., Path], tmp_path: Path) -> None:
    load(folders(), quantization_config=Config()).save_pretrained(tmp_path)
    checkpoint(folders(), tmp_path / "ct", A8W8Dynamic(), "compressed-tensors")
    cases: list[tuple[str, Callable[[], Any]]] = [
        (
            "the model's dtype is float32, .* What to do: pass dtype=torch.bfloat16",
            lambda: load(folders(dtype=torch.float32), quantization_config=Config()),
        ),
        (
            "A8W8Static needs the ranges of the activations. What to do: pass lq_graph.Config",
            lambda: load(folders(), quantization_config=Config({"*": A8W8Static()})),
        ),
        (
            "device_map offloads layers, to cpu, npu:0, and a quantized layer stays",
            lambda: load(
                folders(),
                quantization_config=Config(),
                device_map={"model": "npu:0", "lm_head": "cpu"},
            ),
        ),
        (
            "device_map offloads layers, to disk",
            lambda: load(tmp_path, device_map={"": "disk"}),
        ),
        (
            "device_map has npu:0, npu:1, and another tool's folder is loaded on one device. What",
            lambda: ours.from_pretrained(
                tmp_path / "ct", device_map={"model": "npu:0", "lm_head": "npu:1"}
            ),
        ),
        (
            r"from_pretrained: scheme has '\*.nosuch', which matches no nn.Linear layer",
            lambda: load(
                folders(), quantization_config=Config({"*.nosuch": None, "*": A8W8Dynamic()})
            ),
        ),
        (
            "dtype is float16, and the folder holds a model that was quantized in bfloat16. What",
            lambda: load(tmp_path, dtype=FP16),
        ),
        (
            "holds no quantized model. What to do: pass quantization_config",
            lambda: ours.from_pretrained(folders()),
        ),
    ]
    for text, call in cases:
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("key", ["weight", "scale", "bias", "pertoken_scale"])
def test_a_tensor_that_is_missing(key: str, folders: Callable[..., Path], tmp_path: Path) -> None:
    """transformers makes an empty one, and warns."""
    load(folders(), quantization_config=Config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.load_file(file)
    name = f"model.layers.0.self_attn.q_proj.linear.{key}"
    del state[name]
    safetensors.save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lq_graph: {name} is (not loaded|loaded as)"):
        load(tmp_path)


def test_a_layer_that_the_model_has_not(folders: Callable[..., Path], tmp_path: Path) -> None:
    load(folders(), quantization_config=Config()).save_pretrained(tmp_path)
    edit(tmp_path, lambda c: c["layers"][0]["names"].append("model.layers.7.mlp.up_proj"))
    with pytest.raises(
        ValueError, match=r"layers\.7\.mlp\.up_proj is quantized, and the model has no"
    ):
        load(tmp_path)


def test_hooks_of_tensor_parallelism(folders: Callable[..., Path], tmp_path: Path) -> None:
    load(folders(), quantization_config=Config()).save_pretrained(tmp_path)
    quantizer = Quantizer(Config.from_dict(want_config(tmp_path)))
    model = load(folders())
    quantizer.preprocess_model(model)
    for layer in (one for one in model.modules() if isinstance(one, Loading)):
        layer.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"has hooks, of tensor parallelism for example. What to"):
        quantizer.postprocess_model(model)


def test_a_layer_that_cannot_be_saved(folders: Callable[..., Path], tmp_path: Path) -> None:
    model = in_memory(folders(), A8W8Dynamic())
    ours.attach(model)
    model.model.layers[0].mlp.up_proj.takes_int8 = True
    with pytest.raises(
        ValueError, match=r"save_pretrained: .*up_proj takes or returns int8, .* What"
    ):
        model.save_pretrained(tmp_path)


def test_safetensors_only() -> None:
    assert Quantizer(Config()).is_serializable()
    assert not Quantizer(Config()).is_serializable(safe_serialization=False)
