"""Folders of other tools through transformers, what a config.json holds, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, Config
from support.hf_quantized import assert_same, generated, in_memory, load, want_config

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from lq_graph.integrations import transformers as ours  # noqa: E402
from lq_graph.integrations.quantizer import Quantizer  # noqa: E402
from lq_graph.integrations.saved import Loading  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16


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
    assert torch.equal(generated(model), generated(want))
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
    assert torch.equal(generated(model), generated(want.npu()))


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
        (dict(scheme={3: None}), "Config: scheme has 3; allowed"),
        (dict(ignore=[3]), "Config: ignore has 3; allowed are patterns"),
        (dict(ignore="lm_head"), r"ignore is 'lm_head'; allowed .* What to do: pass \['lm_head'\]"),
    ],
)
def test_a_wrong_config(given: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Config(**given)


def test_a_pattern_that_is_no_regular_expression() -> None:
    with pytest.raises(ValueError, match=r"Config: scheme has 're:\(', which is no regular"):
        Config({"re:(": A8W8Dynamic()})


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
            "the folder is quantized already, .* What to do: leave them out",
            lambda: ours.from_pretrained(
                tmp_path / "ct", quantization_config=Config(ignore=["*.q_proj"])
            ),
        ),
        (
            "checkpoint is for load_checkpoint, .* What to do: leave it out",
            lambda: ours.from_pretrained(tmp_path, checkpoint={"prefer": "static"}),
        ),
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
            "there is no folder .*nosuch. What to do: check the path; for a model of a hub, pass",
            lambda: ours.from_pretrained(tmp_path / "nosuch"),
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
