"""Checkpoints in the two published formats: loaded, refused, written back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import torchair
from safetensors.torch import load_file, save_file
from torch import nn

import lq_graph
from lq_graph import CheckpointError, QuantizedLinear, load_checkpoint, save_checkpoint

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
    message = "format is 'gguf'; allowed" if target == "gguf" else "up is static and holds"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(model, tmp_path / "b", target)
    assert not (tmp_path / "b").exists()


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
    "no target": (config(targets=["re:.*down"]), "a group whose targets take up, found none"),
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
