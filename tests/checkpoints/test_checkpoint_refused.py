"""Files, configs and layers that are refused in one sentence, and nothing is loaded."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lq_graph
from lq_graph import (
    A8W8Static,
    CheckpointError,
    QuantizedLinear,
    load_checkpoint,
    save_checkpoint,
)
from support.checkpoint_files import (
    ABOUT,
    FILE,
    INDEX,
    Model,
    config,
    edit_file,
    put,
    write,
)
from support.injection import model_state

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N, K = 24, 40


def drop(key: str):
    return edit_file(lambda tensors: tensors.pop(key))


def truncate(keep: float):
    def edit(folder: Path) -> None:
        file = folder / "quant_model_weights.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return edit


def header(old: str, new: str):
    """Change the header's text, keeping its length."""

    def edit(folder: Path) -> None:
        file = folder / "quant_model_weights.safetensors"
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


WHAT_TO_DO = re.compile(r"\. What to do: \w[^\n]+\.$")
OF_VALUES = re.compile("expected (finite scales|zeros)")  # which inspect does not read
NAN = torch.full((N,), float("nan"))

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
    "nan scale": (
        put("up.input_scale", NAN[:1]),
        r"up.input_scale: expected finite scales above 0",
    ),
    "scale of another dtype": (
        put("up.deq_scale", NAN),
        r"up.deq_scale: expected int64, of a layer",
    ),
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
    assert "\n" not in str(caught.value) and WHAT_TO_DO.search(str(caught.value))
    problems = lq_graph.inspect(tmp_path, model).problems
    assert str(caught.value) in problems or OF_VALUES.search(str(caught.value))
    assert type(model.up) is nn.Linear
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


BAD_CONFIGS = {
    "no target": (config(targets=["re:.*down"]), "a group whose targets contain up, found none"),
    "bad pattern": (config(targets=["re:("]), "a regular expression after re:"),
    "targets": (config(targets=3), "config_groups.g.targets: expected a list of names"),
    "group": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"g": 3}}},
        "a group whose targets contain up",
    ),
    "method": ({"quantization_config": {"quant_method": "gptq"}}, "found quant_method 'gptq'"),
    "config": ({"quantization_config": []}, "compressed-tensors with config_groups"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configs_that_say_nothing_of_the_layer_are_refused(content, message, tmp_path) -> None:
    write(tmp_path, "compressed-tensors", True, F16)
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = Model()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path)
    assert message in str(caught.value) and type(model.up) is nn.Linear
    assert str(caught.value) in lq_graph.inspect(tmp_path, model).problems
    assert WHAT_TO_DO.search(str(caught.value))


def test_an_output_dtype_that_files_do_not_have_must_be_given(tmp_path) -> None:
    write(tmp_path, "compressed-tensors", True, BF16)
    model = Model(F32)
    with pytest.raises(CheckpointError, match=r"up: .* found float32, .* call model.bfloat16"):
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
        "it has its own forward, which would be lost",
    ),
    "parametrized": (with_up(parametrized), "a ParametrizedLinear, whose forward may differ"),
    "own buffer": (
        with_up(lambda m: m.up.register_buffer("mask", torch.ones(1))),
        "it holds an additional tensor, mask, which would be lost",
    ),
    "held twice": (with_up(twin), "parts holds it too and would keep the old one"),
}


@pytest.mark.parametrize(("make", "why"), IRREPLACEABLE.values(), ids=IRREPLACEABLE)
def test_a_layer_that_does_more_than_nn_linear_is_refused(make, why, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = make()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=rf"up: expected a layer that can .*{why}") as caught:
        load_checkpoint(model, tmp_path)
    assert WHAT_TO_DO.search(str(caught.value))
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


# these pass on the text of another error, which says what to do
PASSED_ON = {"layers.py": 1, "tensor_parallel.py": 1}
FOLDER = Path(lq_graph.__file__).parent / "checkpoints"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_every_refusal_says_what_to_do(file) -> None:
    """`refuse` takes it as an argument; the others have it in their text."""
    texts = [
        "".join(
            part.value
            for part in ast.walk(node)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
        )
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "CheckpointError"
    ]
    without = [text for text in texts if "What to do: " not in text]
    assert len(without) == PASSED_ON.get(file.name, 0), without
