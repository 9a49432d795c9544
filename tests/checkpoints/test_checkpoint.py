"""Checkpoints in the two published formats: loaded, refused, written back."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchair
from safetensors.torch import load_file, save_file
from torch import nn

import lq_graph
from lq_graph import (
    A8W8Static,
    CheckpointError,
    QuantizedLinear,
    load_checkpoint,
    save_checkpoint,
)
from lq_graph.checkpoints import load as loading
from lq_graph.checkpoints.folder import CheckpointFiles
from support import golden
from support.injection import folder_state, model_state

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
        save_file(tensors, folder / "quant_model_weight_w8a8.safetensors")
        return folder
    names = {key: f"part-{i % shards}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


ALL = [
    (kind, dynamic, dtype)
    for kind in ("msmodelslim", "compressed-tensors")
    for dynamic in (False, True)
    for dtype in (F16, BF16)
]
EVERY = pytest.mark.parametrize(("kind", "dynamic", "dtype"), ALL, ids=lambda v: str(v))


def expected(tensors: dict, x: torch.Tensor, dynamic: bool, dtype: torch.dtype) -> np.ndarray:
    """The layer in numpy, from the published tensors."""
    rows = x.float().numpy().reshape(-1, K)
    f32 = np.float32
    name = {F16: "float16", BF16: "bfloat16"}[dtype]
    bias = tensors.get("bias")
    if dynamic:
        step = np.abs(rows).max(-1) / f32(127)
        step[step == 0] = 1
        quantized = np.clip(np.rint(rows / step[:, None]), -128, 127).astype(np.int8)
        scale = tensors["weight_scale"].flatten().numpy()
        return golden.linear_quant(
            quantized, tensors["weight"].numpy(), scale, None, step, bias.float().numpy(), name
        )
    offset = tensors["input_offset"].float().numpy() if "input_offset" in tensors else f32(0)
    scaled = rows / tensors["input_scale"].float().numpy() + offset
    quantized = np.clip(np.rint(scaled), -128, 127).astype(np.int8)
    if "deq_scale" in tensors:
        scale, bias = tensors["deq_scale"].numpy(), tensors["quant_bias"].numpy()
    else:
        product = tensors["input_scale"].float() * tensors["weight_scale"].flatten()
        scale, bias = product.numpy(), bias.float().numpy()
        if dtype == F16:
            bias = np.rint(bias / scale).astype(np.int32)
    return golden.linear_quant(
        quantized, tensors["weight"].numpy(), scale, None, None, bias, name,
        packed=scale.dtype == np.int64,
    )  # fmt: skip


def example_input(dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0, 1] = 0  # a row of zeros has no scale of its own
    return x


@EVERY
@pytest.mark.parametrize("shards", [1, 3])
def test_loads_what_the_files_say(kind, dynamic, dtype, shards, tmp_path) -> None:
    model = Model(dtype)
    report = load_checkpoint(model, write(tmp_path, kind, dynamic, dtype, shards=shards))
    (loaded,) = report
    assert (loaded.name, loaded.n, loaded.k, loaded.output_dtype) == ("up", N, K, dtype)
    assert loaded.scheme == ("dynamic" if dynamic else "static") and "up" in str(report)
    assert isinstance(model.up, QuantizedLinear) and type(model.head) is nn.Linear
    x = example_input(dtype)
    out = model.up(x)
    want = expected(layer_tensors(kind, dynamic, dtype), x, dynamic, dtype)
    assert out.dtype == dtype and out.shape == (2, 3, N)
    np.testing.assert_array_equal(out.float().numpy().reshape(-1, N), want.astype(np.float32))
    torch.manual_seed(1)
    for key, tensor in Model(dtype).state_dict().items():
        if not key.startswith("up."):
            assert torch.equal(model.state_dict()[key], tensor), key


@EVERY
def test_runs_prepared_and_compiled(kind, dynamic, dtype, tmp_path) -> None:
    torch.npu.config.allow_internal_format = True
    torch._dynamo.reset()
    model = Model(dtype)
    load_checkpoint(model, write(tmp_path, kind, dynamic, dtype))
    layer, x = model.up, example_input(dtype)
    want = layer(x)
    layer = layer.npu()
    (prepared,) = lq_graph.use_internal_format_weight(layer)
    assert "FRACTAL_NZ" in prepared.after
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)
    assert torch.equal(layer(x.npu()).cpu(), want)
    assert torch.equal(compiled(x.npu()).cpu(), want)


@EVERY
def test_written_and_read_again_is_bit_equal(kind, dynamic, dtype, tmp_path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    model, again = Model(dtype), Model(dtype)
    load_checkpoint(model, write(first, kind, dynamic, dtype))
    save_checkpoint(model, second, kind)
    load_checkpoint(again, second, dtype=dtype)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    names = {path.name for path in second.iterdir()}
    assert names & {"quant_model_description.json", "config.json"}


def test_dynamic_layers_go_from_one_format_to_the_other(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    model, other = Model(), Model()
    load_checkpoint(model, write(tmp_path / "a", "msmodelslim", True, F16))
    save_checkpoint(model, tmp_path / "b", "compressed-tensors")
    load_checkpoint(other, tmp_path / "b")
    x = example_input(F16)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("msmodelslim", "compressed-tensors"),
        ("compressed-tensors", "msmodelslim"),
        ("msmodelslim", "gguf"),
    ],
)
def test_what_cannot_be_written_exactly_is_refused(kind, target, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    model = Model()
    load_checkpoint(model, write(tmp_path / "a", kind, False, F16))
    message = "format is 'gguf'; allowed" if target == "gguf" else "up is static, and"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model, tmp_path / "b", target)
    assert not (tmp_path / "b").exists()


def test_layers_of_both_formats_in_one_model(tmp_path) -> None:
    """What one format holds less exactly, but computes the same of, goes where all go."""
    (tmp_path / "a").mkdir()
    for dtype in (F16, BF16):
        model = Model(dtype)
        load_checkpoint(model, write(tmp_path / "a", "compressed-tensors", False, dtype))
        x = example_input(dtype)
        lq_graph.quantize(model, A8W8Static(), [x])
        with pytest.raises(
            CheckpointError, match="head is static, and compressed-tensors cannot hold it"
        ):
            save_checkpoint(model, tmp_path / "b", "compressed-tensors")
        if dtype == BF16:  # a float bias there, a zero point here
            with pytest.raises(CheckpointError, match=r"up is .* do: save model.state_dict\(\)"):
                save_checkpoint(model, tmp_path / "b")
            continue
        save_checkpoint(model, tmp_path / "b")
        other = Model(dtype)
        load_checkpoint(other, tmp_path / "b")
        assert torch.equal(other(x), model(x))
        shutil.rmtree(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_one_scale_for_all_channels(tmp_path) -> None:
    weight = torch.randint(-9, 9, (8, 16), dtype=I8)
    linear = lq_graph.LinearQuant(16, 8, bias=False, pertoken_scale=True, output_dtype=F16)
    linear.weight.data, linear.scale.data = weight, torch.tensor([0.5])
    source, model = nn.Sequential(QuantizedLinear(linear)), nn.Sequential(nn.Linear(16, 8, False))
    save_checkpoint(source, tmp_path)
    load_checkpoint(model.half(), tmp_path)
    x = torch.randn(3, 16).half()
    assert torch.equal(model(x), source(x))


def test_a_model_on_meta_gets_its_memory_from_the_file(tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, F16)
    with torch.device("meta"):
        model = Model()
    load_checkpoint(model, tmp_path)
    plain = Model()
    load_checkpoint(plain, tmp_path)
    x = example_input(F16)
    assert torch.equal(model(x), plain(x))


def test_half_leaves_the_scales_alone(tmp_path) -> None:
    model = Model()
    load_checkpoint(model, write(tmp_path, "msmodelslim", False, F16))
    before = copy.deepcopy(model.up.state_dict())
    model.half().bfloat16()
    for key, tensor in model.up.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])


# ---- refusals ----


def edit_file(change):
    """Rewrite the safetensors file after changing its tensors."""

    def edit(folder: Path) -> None:
        file = folder / "quant_model_weight_w8a8.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


def put(key: str, value: torch.Tensor):
    return edit_file(lambda tensors: tensors.__setitem__(key, value))


def drop(key: str):
    return edit_file(lambda tensors: tensors.pop(key))


def truncate(keep: float):
    def edit(folder: Path) -> None:
        file = folder / "quant_model_weight_w8a8.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return edit


def header(old: str, new: str):
    """Change the header's text, keeping its length."""

    def edit(folder: Path) -> None:
        file = folder / "quant_model_weight_w8a8.safetensors"
        data = file.read_bytes()
        assert data.count(old.encode()) and len(old) == len(new)
        file.write_bytes(data.replace(old.encode(), new.encode(), 1))

    return edit


def text(name: str, content: object):
    def edit(folder: Path) -> None:
        written = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(written)

    return edit


def remove(name: str):
    return lambda folder: (folder / name).unlink()


NAN = torch.full((N,), float("nan"))
ABOUT, INDEX = "quant_model_description.json", "model.safetensors.index.json"
FILE = "quant_model_weight_w8a8.safetensors"

REFUSED = {
    "truncated data": (truncate(0.7), rf"{FILE}: expected a safetensors file, found"),
    "truncated header": (truncate(0.01), rf"{FILE}: expected a safetensors file, found"),
    "empty file": (truncate(0), rf"{FILE}: expected a safetensors file, found"),
    "negative k": (header("[24,40]", "[24,-9]"), rf"{FILE}: expected a safetensors file, found"),
    "wrong k": (
        header("[24,40]", "[40,24]"),
        r"up.weight: expected int8 \(24, 40\), found int8 \(40",
    ),
    "wrong dtype": (
        put("up.weight", torch.zeros(N, K)),
        r"up.weight: expected int8 .*found float32",
    ),
    "missing weight": (
        drop("up.weight"),
        r"up.weight: expected int8 \(24, 40\), found no such tenso",
    ),
    "missing scale": (
        drop("up.deq_scale"),
        r"up.deq_scale: expected int64 or float32 \(24,\), found",
    ),
    "missing float": (drop("head.bias"), r"head.bias: expected a tensor for every parameter"),
    "short scale": (put("up.deq_scale", torch.ones(3)), r"up.deq_scale: .* found float32 \(3,\)"),
    "nan scale": (put("up.deq_scale", NAN), r"up.deq_scale: expected finite scales above 0, found"),
    "nan bits": (
        put("up.deq_scale", NAN.view(I32).to(I64)),
        r"up.deq_scale: expected finite scales",
    ),
    "negative scale": (
        put("up.input_scale", torch.tensor([-1.0])),
        r"up.input_scale: expected finite",
    ),
    "asymmetric": (put("up.weight_offset", torch.ones(N, 1)), r"up.weight_offset: expected zeros"),
    "another shape": (
        put("head.weight", torch.zeros(8, 9).half()),
        r"head.weight: expected float16 ",
    ),
    "not in the model": (
        put("tail.weight", torch.zeros(2)),
        r"tail.weight: expected a tensor the mo",
    ),
    "int for float": (
        put("norm.weight", torch.zeros(N, dtype=I32)),
        r"norm.weight: .* found int32",
    ),
    "unknown scheme": (text(ABOUT, {"up.weight": "W4A4"}), r"up.weight: expected W8A8, .* 'W4A4'"),
    "unknown layer": (
        text(ABOUT, {"down.weight": "W8A8"}),
        r"down: expected an nn.Linear .* no modu",
    ),
    "not a linear": (
        text(ABOUT, {"norm.weight": "W8A8"}),
        r"norm: expected an nn.Linear .* LayerNo",
    ),
    "broken json": (text(ABOUT, "{"), rf"{ABOUT}: expected a JSON object, found Expecting"),
    "json list": (text(ABOUT, []), rf"{ABOUT}: expected a JSON object, found list"),
    "no description": (remove(ABOUT), r"expected quant_model_description\*.json .* found neither"),
    "no file": (remove(FILE), r"expected a folder with safetensors files, found none"),
    "missing shard": (
        text(INDEX, {"weight_map": {"a": "b.safetensors"}}),
        r"the file b.safetensors",
    ),
    "outside": (
        text(INDEX, {"weight_map": {"a": "../b.safetensors"}}),
        r"names of files in the same",
    ),
    "no map": (text(INDEX, {"weight_map": 3}), r"weight_map: expected a map from tensor to file"),
}


@pytest.mark.parametrize(("spoil", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_sentence_and_nothing_is_loaded(spoil, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, F16)
    spoil(tmp_path)
    model = Model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert type(model.up) is nn.Linear
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def config(**changes: object) -> dict:
    group = {
        "targets": ["Linear"],
        "weights": args("channel", False),
        "input_activations": args("token", True),
    }
    whole = {"quant_method": "compressed-tensors", "config_groups": {"g": {**group, **changes}}}
    return {"quantization_config": whole}  # fmt: skip


BAD_CONFIGS = {
    "per group": (config(weights=args("group", False)), "config_groups.g.weights: expected 8 bits"),
    "4 bits": (
        config(weights={**args("channel", False), "num_bits": 4}),
        "expected 8 bits, int, sym",
    ),
    "float8": (
        config(input_activations={**args("token", True), "type": "float"}),
        "input_activations",
    ),
    "asymmetric": (
        config(input_activations={**args("token", True), "symmetric": False}),
        "symmetric",
    ),
    "static token": (
        config(input_activations=args("token", False)),
        "dynamic with token, static with",
    ),
    "weight only": (config(input_activations=None), "config_groups.g.input_activations: expected"),
    "no target": (config(targets=["re:.*down"]), "a group whose targets contain up, found none"),
    "bad pattern": (config(targets=["re:("]), "a regular expression after re:"),
    "targets": (config(targets=3), "config_groups.g.targets: expected a list of names"),
    "group": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": 3}}},
        "config_groups.g.weights",
    ),
    "method": (
        {"quantization_config": {"quant_method": "gptq"}},
        "compressed-tensors with config_groups",
    ),
    "config": ({"quantization_config": []}, "compressed-tensors with config_groups"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configs_that_are_not_w8a8_are_refused(content, message, tmp_path) -> None:
    write(tmp_path, "compressed-tensors", True, F16)
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = Model()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path)
    assert message in str(caught.value) and type(model.up) is nn.Linear


def test_an_output_dtype_that_nothing_says_is_asked_for(tmp_path) -> None:
    write(tmp_path, "compressed-tensors", True, BF16)
    model = Model(F32)
    with pytest.raises(
        CheckpointError, match=r"up: .* found float32, .* pass dtype=torch.bfloat16"
    ):
        load_checkpoint(model, tmp_path)
    load_checkpoint(model, tmp_path, dtype=BF16)
    assert model.up.linear.output_dtype == BF16


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(
        CheckpointError, match="expected a folder or a safetensors file, found nothing"
    ):
        load_checkpoint(Model(), tmp_path / "absent")


# ---- layers that must not be replaced ----


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def with_up(change):
    """A Model whose layer "up" is changed."""

    def make() -> Model:
        model = Model()
        change(model)
        return model

    return make


def parametrized(model: Model) -> None:
    nn.utils.parametrizations.weight_norm(model.up)


def twin(model: Model) -> None:
    model.parts = [model.up]


IRREPLACEABLE = {
    "subclass": (
        with_up(lambda m: setattr(m, "up", Scaled(K, N, dtype=F16))),
        "a Scaled, whose forward may differ from nn.Linear's",
    ),
    "forward hook": (
        with_up(lambda m: m.up.register_forward_hook(lambda *a: a[2] * 2)),
        "it has forward hooks, which would be lost",
    ),
    "pre-hook": (
        with_up(lambda m: m.up.register_forward_pre_hook(lambda *a: (a[1][0] * 2,))),
        "it has forward hooks, which would be lost",
    ),
    "own forward": (
        with_up(lambda m: setattr(m.up, "forward", lambda x: x)),
        "it has a forward of its own, which would be lost",
    ),
    "parametrized": (with_up(parametrized), "a ParametrizedLinear, whose forward may differ"),
    "own buffer": (
        with_up(lambda m: m.up.register_buffer("mask", torch.ones(1))),
        "it holds a tensor of its own, mask, which would be lost",
    ),
    "held twice": (with_up(twin), "parts holds it too and would keep the old one"),
}


@pytest.mark.parametrize(("make", "why"), IRREPLACEABLE.values(), ids=IRREPLACEABLE)
def test_a_layer_that_does_more_than_nn_linear_is_refused(make, why, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = make()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=rf"up: expected a layer that can .*{why}"):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, dtype=F16), "linear1"),
        (lambda: nn.MultiheadAttention(8, 2, dtype=F16), "out_proj"),
    ],
)
def test_parents_that_read_the_weight_themselves(make, layer, tmp_path) -> None:
    source = nn.Sequential(make())
    linear = source[0].get_submodule(layer)
    k, n = linear.in_features, linear.out_features
    tensors = {f"0.{key}": value for key, value in source[0].state_dict().items()}
    about = dict.fromkeys(tensors, "FLOAT")
    tensors[f"0.{layer}.weight"] = torch.zeros(n, k, dtype=I8)
    tensors[f"0.{layer}.weight_scale"] = torch.ones(n, 1)
    about[f"0.{layer}.weight"] = "W8A8_DYNAMIC"
    (tmp_path / ABOUT).write_text(json.dumps(about))
    save_file(tensors, tmp_path / FILE)
    before = model_state(source)
    with pytest.raises(CheckpointError, match=rf"0.{layer}: expected a layer that can be"):
        load_checkpoint(source, tmp_path)
    assert model_state(source) == before


def test_a_quantized_layer_is_replaced_unless_it_does_more(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    load_checkpoint(model, tmp_path)
    first = model.up
    load_checkpoint(model, tmp_path)
    assert model.up is not first and isinstance(model.up, QuantizedLinear)
    model.up.register_forward_hook(lambda *args: args[2] * 2)
    with pytest.raises(CheckpointError, match=r"up: expected a layer that can .* forward hooks"):
        load_checkpoint(model, tmp_path)


def test_layers_between_which_int8_stays_are_not_loaded_over(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K)).half()
    plain = copy.deepcopy(model)
    x = torch.randn(4, K).half()
    lq_graph.quantize(plain, A8W8Static(int8_between=False), [x])
    save_checkpoint(plain, tmp_path)
    lq_graph.quantize(model, A8W8Static(), [x])
    with pytest.raises(CheckpointError, match=r"0: expected a layer with float input and output"):
        load_checkpoint(model, tmp_path)


# ---- values that do not fit ----


BIG, SMALL = torch.full((N,), 1e30), torch.full((N,), 1e-9)
NARROW = {
    "bfloat16 to float16": (
        put("norm.bias", BIG.bfloat16()),
        F16,
        r"norm.bias: .* found 1.0\d*e\+30",
    ),
    "float32 to float16": (put("norm.bias", BIG / 1e25), F16, r"norm.bias: .* float16 holds"),
    "float64 to bfloat16": (put("norm.bias", BIG.double() * 1e10), BF16, r"norm.bias: .* bfloat16"),
    "rounds to infinity": (put("norm.bias", BIG.double() * 3.4028235e8), BF16, "norm.bias"),
    "buffer": (put("steps", torch.tensor([2**40])), F16, r"steps: .* int32 holds.* 1099511627776"),
    "bool": (put("mask", torch.tensor([2], dtype=I8)), F16, r"mask: .* bool holds.* found 2"),
    "all become 0": (put("norm.weight", SMALL), F16, r"norm.weight: .* float16 holds"),
    "bfloat16, all 0": (
        put("norm.weight", SMALL.bfloat16()),
        F16,
        r"norm.weight: .* float16",
    ),
}


class Buffers(Model):
    """With an int32 and a bool buffer."""

    def __init__(self, dtype: torch.dtype = F16) -> None:
        super().__init__(dtype)
        self.register_buffer("steps", torch.zeros(1, dtype=I32))
        self.register_buffer("mask", torch.zeros(1, dtype=torch.bool))


@pytest.mark.parametrize(("spoil", "dtype", "message"), NARROW.values(), ids=NARROW)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_values_beyond_the_models_dtype_are_refused(
    spoil, dtype, message, device, tmp_path
) -> None:
    write(tmp_path, "msmodelslim", True, dtype)
    put("steps", torch.ones(1, dtype=I64))(tmp_path)
    put("mask", torch.ones(1, dtype=torch.uint8))(tmp_path)
    with torch.device(device):
        model = Buffers(dtype)
    load_checkpoint(model, tmp_path)
    assert model.steps.item() == 1 and model.mask.item() is True
    spoil(tmp_path)
    with torch.device(device):
        model = Buffers(dtype)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def test_what_is_not_finite_in_the_files_stays_what_it_is(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    values = torch.zeros(N, dtype=BF16)
    values[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    put("norm.bias", values)(tmp_path)
    model = Model()
    load_checkpoint(model, tmp_path)
    assert model.norm.bias.isnan().tolist()[:3] == [True, False, False]
    assert torch.equal(model.norm.bias[1:], values[1:].half())


SCALES = {
    "reciprocal overflows": (False, put("up.input_scale", torch.tensor([1e-6])), "input_scale"),
    "reciprocal is 0": (False, put("up.input_scale", torch.tensor([1e9])), "input_scale"),
    "offset is nan": (False, put("up.input_offset", torch.tensor([float("nan")])), "-128 to 127"),
    "offset beyond int8": (False, put("up.input_offset", torch.tensor([300.0])), "-128 to 127"),
    "product is 0": (True, put("up.weight_scale", torch.full((N, 1), 1e-45)), "times input_scale"),
    "bias beyond int32": (True, put("up.bias", torch.full((N,), 1e30)), "steps of input_scale"),
    "bias is nan": (True, put("up.bias", torch.full((N,), torch.nan)), "steps of input_scale"),
}


@pytest.mark.parametrize(("compressed", "spoil", "message"), SCALES.values(), ids=SCALES)
def test_scales_that_would_be_lost_are_refused(compressed, spoil, message, tmp_path) -> None:
    write(tmp_path, "compressed-tensors" if compressed else "msmodelslim", False, F16)
    spoil(tmp_path)
    model = Model()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def fill(key: str, value: float, dtype: torch.dtype = F32):
    """All values of a tensor of "up"."""
    return edit_file(lambda t: t.update({key: torch.full_like(t[key], value, dtype=dtype)}))


BEYOND = {
    "bias": ("msmodelslim", True, F16, "bias", 1e6, "up.bias: .*float16 holds.* 1000000"),
    "bias, bfloat16": ("msmodelslim", True, BF16, "bias", 3.4e38, "up.bias: .*bfloat16 holds"),
    "bias is nan": ("msmodelslim", True, BF16, "bias", torch.nan, "up.bias: .*finite"),
    "bias is infinite": ("compressed-tensors", True, F16, "bias", -torch.inf, "up.bias: .*finite"),
    "static bias": ("compressed-tensors", False, BF16, "bias", 3.4e38, "up.bias: .*bfloat16"),
    "static bias is nan": ("compressed-tensors", False, BF16, "bias", torch.nan, "up.bias: .*fini"),
    "weights": ("msmodelslim", True, F16, "weight_scale", 520, "weight_scale: .* 127 . 520"),
    "weights, bfloat16": ("msmodelslim", True, BF16, "weight_scale", 3e36, "up.weight_scale: .*bf"),
    "static weights": (
        "compressed-tensors",
        False,
        F16,
        "weight_scale",
        520,
        "weight_scale: .*127",
    ),
    "deq_scale": ("msmodelslim", False, BF16, "deq_scale", 1e36, "up.deq_scale"),
}


@pytest.mark.parametrize(
    ("kind", "dynamic", "dtype", "part", "value", "message"), BEYOND.values(), ids=BEYOND
)
def test_layers_beyond_their_dtype_are_refused(
    kind, dynamic, dtype, part, value, message, tmp_path
) -> None:
    write(tmp_path, kind, dynamic, dtype)
    fill(f"up.{part}", value)(tmp_path)
    model = Model(dtype)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


def test_an_int32_bias_beyond_float16_is_refused(tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, F16)
    word = torch.full((N,), 0.03125).view(I32).to(I64)
    put("up.deq_scale", word)(tmp_path)
    load_checkpoint(Model(), tmp_path)
    put("up.quant_bias", torch.full((N,), 2**22, dtype=I32))(tmp_path)  # 131072, or less by
    with pytest.raises(CheckpointError, match=r"up.quant_bias: expected a bias that float16"):
        load_checkpoint(Model(), tmp_path)  # 5 * 128 * K * 0.03125 for the zero point


def test_weights_up_to_the_dtypes_limit_are_loaded(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    fill("up.weight_scale", 65504 / 127)(tmp_path)
    fill("up.bias", -65504)(tmp_path)
    load_checkpoint(Model(), tmp_path)


@pytest.mark.parametrize(("part", "value"), [("bias", 1e6), ("bias", torch.nan), ("scale", 520)])
def test_a_layer_that_could_not_be_loaded_is_not_saved(part, value, tmp_path) -> None:
    model = Model()
    load_checkpoint(model, write(tmp_path, "msmodelslim", True, F16))
    held = getattr(model.up.linear, part)
    held.data = torch.full_like(held, value, dtype=F32)
    with pytest.raises(CheckpointError, match=rf"up.linear.{part} holds NaN, .* beyond float16"):
        save_checkpoint(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# ---- what the model or the product cannot run ----


@pytest.mark.parametrize(
    ("files", "model", "dtype", "message"),
    [
        (F16, BF16, None, r"up.deq_scale: expected float32, .* do: call model.to\(torch.float16"),
        (BF16, F16, None, r"up.deq_scale: expected int64, .* found float32, of one in bfloat16"),
        (F16, F16, BF16, r"up.deq_scale: .* What to do: leave dtype= out, or pass torch.float16"),
        (F16, F32, None, r"up: .* found float32, .* pass dtype=torch"),
        (F16, F32, BF16, r"up.deq_scale: expected float32"),
    ],
)  # fmt: skip
def test_static_files_of_another_dtype(files, model, dtype, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", False, files)
    target = Model(model)
    before = model_state(target)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(target, tmp_path, dtype=dtype)
    assert model_state(target) == before


def test_a_static_layer_takes_the_models_dtype(tmp_path) -> None:
    write(tmp_path, "compressed-tensors", False, F16)
    with pytest.raises(CheckpointError, match=r"up: .* found bfloat16 in the model"):
        load_checkpoint(Model(BF16), tmp_path, dtype=F16)
    with pytest.raises(CheckpointError, match=r"dtype is int8; allowed are torch.float16 and"):
        load_checkpoint(Model(), tmp_path, dtype=I8)
    model = Model(F32)
    load_checkpoint(model, tmp_path, dtype=F16)
    model.half()
    assert model(example_input(F16)).dtype == F16


@pytest.mark.parametrize(
    ("kind", "dynamic", "dtype"),
    [("msmodelslim", True, F16), ("compressed-tensors", True, F16), ("msmodelslim", False, BF16)],
)
def test_a_layer_without_a_row_in_the_products_table(kind, dynamic, dtype, tmp_path) -> None:
    write(tmp_path, kind, dynamic, dtype)
    model = Model(dtype)
    before = model_state(model)
    lq_graph.set_product("310P")
    try:
        with pytest.raises(CheckpointError, match=r"up: expected a layer that .* \(310P\)"):
            load_checkpoint(model, tmp_path)
    finally:
        lq_graph.set_product(None)
    assert model_state(model) == before


# ---- memory ----


def test_tied_weights_are_saved_once_and_loaded_tied(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(N, K, dtype=F16)
            self.up = nn.Linear(K, K, dtype=F16)
            self.same = self.up  # one layer, two names
            self.left = nn.Linear(K, N, dtype=F16)
            self.right = nn.Linear(K, N, bias=False, dtype=F16)  # two layers, one weight
            self.right.weight = self.left.weight
            self.head = nn.Linear(K, N, bias=False, dtype=F16)
            self.head.weight = self.embed.weight

    source = Tied()
    lq_graph.quantize(source, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name != "head")
    assert source.left.linear.weight is source.right.linear.weight
    for kind in ("msmodelslim", "compressed-tensors"):
        save_checkpoint(source, tmp_path / kind, kind)
        (file,) = (tmp_path / kind).glob("*.safetensors")
        keys = set(load_file(file))
        assert {"embed.weight", "up.weight", "left.weight", "right.weight_scale"} <= keys
        assert not keys & {"head.weight", "same.weight", "right.weight"}
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = Tied()
            load_checkpoint(model, tmp_path / kind)
            assert model.head.weight is model.embed.weight and model.up is model.same
            assert model.left.linear.weight is model.right.linear.weight
            for key, tensor in source.state_dict().items():
                assert torch.equal(model.state_dict()[key], tensor), key


def test_two_values_for_one_tensor_are_refused(tmp_path) -> None:
    class Tied(Model):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.LayerNorm(N, dtype=F16)
            self.twin.weight = self.norm.weight
            self.flat = nn.Parameter(torch.zeros(4, dtype=F16))
            self.piece = nn.Parameter(self.flat.data[:2])

    write(tmp_path, "msmodelslim", True, F16)
    values = {"twin.weight": torch.ones(N), "twin.bias": torch.zeros(N), "flat": torch.ones(4)}
    for key, value in {**values, "piece": torch.ones(2)}.items():
        put(key, value.half())(tmp_path)
    model = Tied()
    load_checkpoint(model, tmp_path)
    assert model.piece.tolist() == [1, 1] and model.twin.weight is model.norm.weight
    for key, message in (
        ("twin.weight", "the same tensor in the model"),
        ("piece", "shares memory"),
    ):
        put(key, torch.full_like(values.get(key, torch.ones(2)), 2).half())(tmp_path)
        model = Tied()
        before = model_state(model)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(model, tmp_path)
        assert model_state(model) == before
        put(key, values.get(key, torch.ones(2)).half())(tmp_path)


def test_buffers_that_would_stay_on_meta_are_named_first(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    source = transformers.LlamaForCausalLM(config).half().eval()
    lq_graph.quantize(source, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name != "lm_head")
    folder = tmp_path / "model"
    folder.mkdir()
    config.save_pretrained(folder)
    save_checkpoint(source, folder, "compressed-tensors")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).half().eval()
    before = model_state(model)
    with pytest.raises(
        CheckpointError, match=r"model.rotary_emb.\w*inv_freq and 1 more would stay"
    ):
        load_checkpoint(model, folder)
    assert model_state(model) == before
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    assert len(load_checkpoint(model, folder)) == 14
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(12).reshape(2, 6)
    source.model.rotary_emb = LlamaRotaryEmbedding(config)  # not that of .half()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, source(tokens).logits)


@pytest.mark.parametrize("mmap", [False, True])
def test_loaded_weights_are_the_files_only_if_asked(mmap, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    with torch.device("meta"):
        model = Model()
    load_checkpoint(model, tmp_path, mmap=mmap)
    x = example_input(F16)
    want = model(x)
    save_checkpoint(model, tmp_path)  # over the files it was loaded from
    assert torch.equal(model(x), want)
    again = Model()
    load_checkpoint(again, tmp_path, mmap=mmap)
    assert torch.equal(again(x), want)
    with torch.no_grad():
        again.up.linear.weight.zero_()  # the file is not written to
    data = (tmp_path / FILE).read_bytes()
    load_checkpoint(again, tmp_path, mmap=mmap)
    assert torch.equal(again(x), want)
    with open(tmp_path / FILE, "r+b") as file:  # in place
        file.seek(-len(data) // 2, 2)
        file.write(bytes(len(data) // 2))
    assert torch.equal(again(x), want) is not mmap
    if not mmap:
        (tmp_path / FILE).write_bytes(b"")  # would be SIGBUS
        assert torch.equal(again(x), want)


@pytest.mark.parametrize("kind", ["msmodelslim", "compressed-tensors"])
def test_defaults_that_others_have_set(kind, tmp_path) -> None:
    write(tmp_path, kind, False, F16)
    plain, model = Model(), Model()
    load_checkpoint(plain, tmp_path)
    torch.set_default_dtype(BF16)
    try:
        with torch.device("meta"), torch.inference_mode():
            load_checkpoint(model, tmp_path)
            save_checkpoint(model, tmp_path / "again", kind)
    finally:
        torch.set_default_dtype(F32)
    assert model_state(model) == model_state(plain)
    assert not model.up.linear.scale.is_inference()
    again = Model()
    load_checkpoint(again, tmp_path / "again")
    assert model_state(again) == model_state(plain)


def test_tensors_keep_their_memory_and_hooks_that_rename_are_refused(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    view, parameter = model.norm.weight.data.view(2, -1), model.head.weight
    model.norm.weight.data.zero_()
    load_checkpoint(model, tmp_path)
    assert view.flatten().tolist() == [1.0] * N and model.head.weight is parameter

    def rename(module, state, prefix, local) -> None:
        state[prefix + "gain"] = state.pop(prefix + "weight")

    model = Model()
    model.norm.register_state_dict_post_hook(rename)
    before = model_state(model)
    with pytest.raises(CheckpointError, match=r"norm.gain: model.state_dict\(\) and the model"):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before


class Told(nn.Module):
    def get_extra_state(self) -> dict:
        return {"a": 1}

    def set_extra_state(self, state: dict) -> None:
        raise AssertionError(state)


UNUSUAL = {
    "lazy": (lambda m: setattr(m, "lazy", nn.LazyLinear(3)), {}, r"lazy.bias: expected a tensor f"),
    "lazy, given": (
        lambda m: setattr(m, "lazy", nn.LazyLinear(3)),
        {"lazy.weight": torch.ones(3, 3), "lazy.bias": torch.ones(3)},
        r"lazy.bias: expected a plain tensor in the model, found one without a size",
    ),
    "sparse": (
        lambda m: m.register_buffer("b", torch.eye(2).to_sparse()),
        {"b": torch.ones(2, 2)},
        r"b: expected a plain tensor in the model, found one of layout torch.sparse_coo",
    ),
    "extra state": (
        lambda m: setattr(m, "told", Told()),
        {},
        r"told._extra_state: expected a tensor for every",
    ),
}


@pytest.mark.parametrize(("change", "tensors", "message"), UNUSUAL.values(), ids=UNUSUAL)
def test_tensors_that_cannot_be_loaded_are_named(change, tensors, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    for key, tensor in tensors.items():
        put(key, tensor)(tmp_path)
    model = Model()
    change(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert type(model.up) is nn.Linear


def test_models_that_are_none(tmp_path) -> None:
    for act in (load_checkpoint, save_checkpoint):
        with pytest.raises(CheckpointError, match=r"model is a int, not an nn.Module"):
            act(3, tmp_path)


# ---- saving ----


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bias", [False, True])
def test_symmetric_static_layers_are_saved_and_read_back(dtype, bias, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(32, 32, bias=bias, dtype=dtype) for _ in range(3)])
    plain, x = copy.deepcopy(model), torch.randn(16, 32).to(dtype)
    config = A8W8Static(symmetric=True, int8_between=False)
    lq_graph.quantize(model, config, [x])
    save_checkpoint(model, tmp_path)
    load_checkpoint(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    state = model.state_dict()
    for key, tensor in plain.state_dict().items():
        if key.endswith("scale") and tensor.dtype == I64:
            tensor = (tensor & 0xFFFFFFFF).to(torch.uint32).view(F32)
        if key in state:  # a bias of zeros in the place of none
            assert torch.equal(tensor, state[key]), key
    assert set(state) <= set(plain.state_dict())


def test_only_quantization_config_changes(tmp_path) -> None:
    about = {"model_type": "llama", "hidden_size": 24, "eps": 1e-06, "limit": [0.0, float("inf")]}
    (tmp_path / "config.json").write_text(json.dumps({**about, "quantization_config": 3}))
    (tmp_path / "config.json").chmod(0o640)
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic(), filter_fn=lambda _, name: name == "up")
    save_checkpoint(model, tmp_path, "compressed-tensors")
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == about and list(written) == list(about)
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o640
    load_checkpoint(Model(), tmp_path)


OTHERS = {
    "index": {INDEX: '{"weight_map": {"a": "b.safetensors"}}'},
    "shard": {"model-00001-of-00002.safetensors": ""},
    "other format's weights": {"model.safetensors": ""},
    "other description": {"quant_model_description_w8a8.json": "{}"},
    "quantization_config": {"config.json": '{"quantization_config": {"quant_method": "fp8"}}'},
    "broken config": {"config.json": "{"},
}


@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_a_folder_with_other_weights_is_refused(files, tmp_path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    before = folder_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"empty folder|remove the key|a JSON object"):
        save_checkpoint(model, tmp_path)
    assert folder_state(tmp_path) == before


def unsaved(key: str, value: torch.Tensor):
    return lambda m: m.register_buffer(key, value)


UNSAVED = {
    "meta": (unsaved("b", torch.zeros(2, device="meta")), "b is on meta and has no values"),
    "sparse": (unsaved("b", torch.eye(2).to_sparse()), "b has layout torch.sparse_coo"),
    "complex128": (unsaved("b", torch.zeros(2, dtype=torch.complex128)), "b is complex128"),
    "extra state": (lambda m: setattr(m, "told", Told()), "told._extra_state is a dict"),
    "name": (unsaved("b\ud800", torch.zeros(2)), r"b\\ud800' has a name that files cannot"),
    "metadata": (unsaved("__metadata__", torch.zeros(2)), "name that the files use themselves"),
    "no name": (
        lambda m: m.register_state_dict_post_hook(lambda *a: a[1].update({3: torch.ones(1)})),
        "save_checkpoint: 3 has a name that files cannot hold",
    ),
    "scale": (lambda m: m.up.linear.scale.data.fill_(torch.nan), "up.linear.scale holds NaN"),
    "itself": (None, "the model itself is a layer"),
}


@pytest.mark.parametrize(("change", "message"), UNSAVED.values(), ids=UNSAVED)
def test_what_files_cannot_hold_is_refused_by_name(change, message, tmp_path) -> None:
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    if change is not None:
        change(model)
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model if change is not None else model.up, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_any_plain_tensor_is_saved_as_it_is(tmp_path) -> None:
    wide = torch.arange(12.0).reshape(3, 4)
    given = {
        "transposed": wide.t(), "expanded": torch.ones(1).expand(5), "slice": wide[:, 1:3],
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(3.0), "conj": torch.ones(2) * 1j,
        "flags": torch.tensor([True, False]), "u16": torch.tensor([7], dtype=torch.uint16),
        "f8": torch.ones(1).to(torch.float8_e4m3fn), "f64": torch.ones(1, dtype=torch.float64),
    }  # fmt: skip
    given["conj"] = given["conj"].conj()
    models = [Model(), Model()]
    for i, model in enumerate(models):
        for key, tensor in given.items():
            model.register_buffer(key, torch.zeros_like(tensor) if i else tensor)
    lq_graph.quantize(models[0], lq_graph.A8W8Dynamic())
    save_checkpoint(models[0], tmp_path)
    load_checkpoint(models[1], tmp_path)
    read = load_file(tmp_path / FILE)  # by the format's own package
    for key, tensor in given.items():
        for found in (models[1].get_buffer(key), read[key]):
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, key
            assert found.tolist() == tensor.tolist(), key


def test_links_and_files_in_the_way(tmp_path) -> None:
    model, other = Model(), Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_checkpoint(model, tmp_path / "link")
    # a cache holds its files elsewhere, under other names
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "real").iterdir():
        file.rename(tmp_path / "blobs" / file.name[::-1])
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name[::-1]}")
    load_checkpoint(other, tmp_path / "snapshot")
    blobs = folder_state(tmp_path / "blobs")
    save_checkpoint(other, tmp_path / "snapshot")
    assert folder_state(tmp_path / "blobs") == blobs
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"save_checkpoint: .*file: Not a directory"):
        save_checkpoint(model, tmp_path / "file")
    (tmp_path / "real" / FILE).mkdir()
    with pytest.raises(CheckpointError, match=f"has something named {FILE} that is no file"):
        save_checkpoint(model, tmp_path / "real")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path) -> None:
    old, new = nn.Sequential(nn.Linear(8, 8)).half(), nn.Sequential(nn.Linear(512, 512)).half()
    for model in (old, new):
        lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    save_checkpoint(old, tmp_path)
    before = folder_state(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large. The folder is unchanged"):
            save_checkpoint(new, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder_state(tmp_path) == before


def test_one_save_at_a_time(tmp_path) -> None:
    model = Model()
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another save_checkpoint is writing"):
            save_checkpoint(model, tmp_path)
    finally:
        os.close(descriptor)
    save_checkpoint(model, tmp_path)


def test_names_that_mean_more_in_a_config(tmp_path) -> None:
    """A layer named as a class, one named as a pattern, and a float tensor named as a scale."""

    def make() -> nn.Module:
        model = nn.Module()
        model.add_module("Linear", nn.Linear(16, 16, dtype=F16))
        model.add_module("re:", nn.Linear(16, 16, dtype=F16))
        model.add_module("norm", nn.LayerNorm(16, dtype=F16))
        model.norm.register_buffer("weight_scale", torch.ones(1))
        model.forward = lambda x: getattr(model, "re:")(model.Linear(x))
        return model

    source, model, x = make(), make(), torch.randn(3, 16).half()
    config = A8W8Static(symmetric=True, int8_between=False)
    lq_graph.quantize(source, config, [x], filter_fn=lambda _, name: name == "Linear")
    lq_graph.quantize(source, lq_graph.A8W8Dynamic())
    save_checkpoint(source, tmp_path, "compressed-tensors")
    report = load_checkpoint(model, tmp_path)
    assert {x.name: x.scheme for x in report} == {"Linear": "static", "re:": "dynamic"}
    assert torch.equal(model(x), source(x))


def test_a_model_without_quantized_layers_is_saved_with_a_warning(tmp_path) -> None:
    source, model = Model(), Model()
    with pytest.warns(UserWarning, match=r"no QuantizedLinear; .*quantize it first") as caught:
        save_checkpoint(source, tmp_path)
    assert [w.filename for w in caught] == [__file__]
    assert load_checkpoint(model, tmp_path) == []
    assert torch.equal(model.up.weight, source.up.weight)


def test_a_path_in_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    model = Model()
    load_checkpoint(model, write(tmp_path / "a", "msmodelslim", True, F16))
    for folder in ("~/b", "~no such user/b"):  # the second is a name as any other
        save_checkpoint(model, folder)
        load_checkpoint(Model(), folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "~no such user"]


class Strict(Model):
    """A model that lets nobody set its modules."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self).get("_modules", {}):
            raise TypeError("frozen")
        super().__setattr__(name, value)


def test_a_parent_with_a_setattr_of_its_own(tmp_path) -> None:
    model = Strict()
    load_checkpoint(model, write(tmp_path, "msmodelslim", True, F16))
    assert isinstance(model.up, QuantizedLinear)


# ---- at the same time ----


def test_threads_load_one_model(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model, errors = Model(), []

    def load() -> None:
        try:
            for _ in range(5):
                load_checkpoint(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and isinstance(model.up, QuantizedLinear)


@pytest.mark.parametrize("same", [False, True])
def test_a_signal_handler_loads_in_the_middle_of_a_load(same, tmp_path, monkeypatch) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model, other = Model(), Model()
    before = model_state(model)
    read, loads = CheckpointFiles.read, []

    def handler(*_: object) -> None:
        loads.append(1)
        load_checkpoint(model if same else other, tmp_path)

    def read_and_signal(files: Any, key: str) -> torch.Tensor:
        if not loads and key == "norm.weight":
            signal.raise_signal(signal.SIGUSR1)
        return read(files, key)

    monkeypatch.setattr(CheckpointFiles, "read", read_and_signal)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        if same:
            with pytest.raises(CheckpointError, match=r"changed by something else while"):
                load_checkpoint(model, tmp_path)
        else:
            load_checkpoint(model, tmp_path)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert len(loads) == 1 and model_state(model) != before
    assert isinstance((model if same else other).up, QuantizedLinear)


def test_a_child_does_not_wait_for_a_thread_of_its_parent(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    has, done = threading.Event(), threading.Event()

    def hold() -> None:
        with loading._LOCK:
            has.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    has.wait(60)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        torch.set_num_threads(1)
        with contextlib.suppress(BaseException):
            load_checkpoint(model, tmp_path)
            os._exit(0)
        os._exit(1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
