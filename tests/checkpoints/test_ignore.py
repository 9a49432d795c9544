"""load_checkpoint(ignore=): what the model has not is left out and told; nothing is left out that
the model has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lq_graph import CheckpointError, QuantizedLinear, load_checkpoint
from support.checkpoint_files import ABOUT, FILE, Model, layer_tensors, write
from support.injection import model_state

F16 = torch.float16

# What folders have beside the model: (tensors, words of the description, patterns that ignore them)
BESIDE = {
    "layers that predict several tokens": (
        {f"layers.61.up.{k}": v for k, v in layer_tensors("msmodelslim", True, F16).items()}
        | {"layers.61.norm.weight": torch.ones(4)},
        {"layers.61.up.weight": "W8A8_DYNAMIC", "layers.61.norm.weight": "FLOAT"},
        [["layers.61.*"], ["layers.61"], ["*.61.*"], ["re:layers\\.61"], ["layers.61.[nu]*"]],
    ),
    "a layer of a scheme that is not known": (
        {"visual.0.weight": torch.zeros(2, 2)},
        {"visual.0.weight": "W4A16"},
        [["visual.*"], ["visual"], ["re:.*\\.0\\."]],
    ),
    "scales of the cache": (
        {"up.kv_cache_scale": torch.ones(1), "head.kv_cache_scale": torch.ones(1)},
        {"up.kv_cache_scale": "FLOAT"},
        [["*.kv_cache_scale"], ["up.kv_*", "head.kv_*"]],
    ),
}
CASES = {
    f"{name}: {' '.join(patterns)}": (tensors, words, patterns)
    for name, (tensors, words, several) in BESIDE.items()
    for patterns in several
}


def add(folder: Path, tensors: dict, words: dict | None = None) -> None:
    """Put tensors into a folder's file, and words into its description."""
    save_file({**load_file(folder / FILE), **tensors}, folder / FILE)
    about = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**about, **(words or {})}))


@pytest.mark.parametrize(("tensors", "words", "patterns"), CASES.values(), ids=CASES)
def test_what_the_model_has_not_is_left_out(tensors, words, patterns, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    plain = Model()
    read = load_checkpoint(plain, tmp_path).bytes_read
    add(tmp_path, tensors, words)
    with pytest.raises(CheckpointError):
        load_checkpoint(Model(), tmp_path)
    model = Model()
    report = load_checkpoint(model, tmp_path, ignore=patterns)
    assert model_state(model) == model_state(plain)
    assert report.bytes_read == read
    assert report.left_out.keys() == tensors.keys()
    assert set(report.left_out.values()) == {f"ignore has {pattern!r}" for pattern in patterns}
    assert report.bytes_left_out == {name: tensor.nbytes for name, tensor in tensors.items()}
    counts = [int(n) for n in re.findall(r"^left out: (\d+) tensor", str(report), re.MULTILINE)]
    assert sum(counts) == len(tensors)


REFUSED = {
    "matches nothing": (
        ["layer.up.*"],
        r"ignore has 'layer.up.\*', which matches no tensor .* near are .*'up",
    ),
    "one of two": (["norm", "visual.*"], r"ignore has 'visual.\*', which matches no tensor"),
    "a layer of the model": (
        ["up.*"],
        r"up.bias: expected a tensor for every .*ignore has 'up.\*'",
    ),
    "a module of the model": (["norm"], r"norm.bias: .* nor norm.weight: ignore has 'norm'"),
    "everything": (["*"], r"expected a tensor for every parameter .*ignore has '\*'"),
    "the bias of a quantized layer": (["up.bias"], r"up.bias: expected a tensor that is loaded"),
    "a scale": (["*.weight_scale"], r"up.weight_scale: expected a tensor that is loaded, because"),
    "an offset": (["*.weight_offset"], r"up.weight_offset: expected a tensor that is loaded, beca"),
    "a text": ("up.*", r"ignore is 'up.\*'. What to do: pass a list of patterns"),
    "no text": ([3], r"ignore has 3. What to do: give patterns of names"),
    "nothing iterable": (3, r"ignore is 3. What to do: pass a list"),
    "no regular expression": (["re:("], r"'re:\(', which is no regular expression: .* to do: "),
}


@pytest.mark.parametrize(("patterns", "message"), REFUSED.values(), ids=REFUSED)
def test_nothing_is_left_out_that_the_model_has(patterns, message, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(model, tmp_path, ignore=patterns)
    assert "What to do: " in str(caught.value)
    assert model_state(model) == before


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


def with_rotary(model: Model) -> Model:
    model.rotary_emb = Rotary()
    return model


def with_list(model: Model, *patterns: str) -> Model:
    """A model whose class, as those of transformers, lists what its files may have."""
    model._keys_to_ignore_on_load_unexpected = list(patterns)
    return model


UNNEEDED = {
    "a computed buffer": (
        with_rotary(Model()),
        "rotary_emb.inv_freq",
        "computes rotary_emb.inv_fr",
    ),
    "where it was": (with_rotary(Model()), "layers.0.rotary_emb.inv_freq", "computes rotary_emb"),
    "listed": (with_list(Model(), r"layers\.61.*"), "layers.61.up.weight", "Model says that it"),
}


@pytest.mark.parametrize(("model", "key", "why"), UNNEEDED.values(), ids=UNNEEDED)
def test_what_the_models_code_does_not_need_is_left_out(model, key, why, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    add(tmp_path, {key: torch.ones(4)})
    report = load_checkpoint(model, tmp_path)
    assert list(report.left_out) == [key] and why in report.left_out[key]
    assert isinstance(model.up, QuantizedLinear)


KEPT = {
    "another buffer": (with_rotary(Model()), "rotary_emb.scale"),
    "another module's": (with_rotary(Model()), "rope.inv_freq"),
    "a tensor beside those of a module": (with_list(Model(), "up"), "up.more"),
}


@pytest.mark.parametrize(("model", "key"), KEPT.values(), ids=KEPT)
def test_nothing_else_is_left_out_by_itself(model, key, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    add(tmp_path, {key: torch.ones(4)})
    with pytest.raises(CheckpointError, match=f"{key}: expected a tensor the model has"):
        load_checkpoint(model, tmp_path)


def test_a_list_of_patterns_does_not_hide_a_tensor_of_the_model(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = with_list(Model(), ".*")
    assert not load_checkpoint(model, tmp_path).left_out
    assert isinstance(model.up, QuantizedLinear)


# (keys beside the model's, the patterns that the message proposes)
PROPOSED = [
    (["layers.61.up.weight", "layers.61.norm.weight", "layers.62.x"], '"layers.*"'),
    (["visual.a.weight", "extra"], '"visual.*", "extra"'),
    (["up.k_scale", "head.k_scale"], '"*.k_scale"'),
    (["norm.bias2", "norm.0.weight"], '"*.bias2", "norm.0.*"'),
]


@pytest.mark.parametrize(("keys", "line"), PROPOSED)
def test_the_message_has_a_line_to_paste(keys, line, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    add(tmp_path, {key: torch.ones(2) for key in keys})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Model(), tmp_path)
    found = re.search(r"if the model needs none of them, pass ignore=(\[.*\])", str(caught.value))
    assert found
    assert sorted(json.loads(found[1])) == sorted(json.loads(f"[{line}]"))
    report = load_checkpoint(Model(), tmp_path, ignore=json.loads(found[1]))
    assert report.left_out.keys() == set(keys)


def test_missing_tensors_are_told_together(tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    tensors = load_file(tmp_path / FILE)
    save_file({k: v for k, v in tensors.items() if not k.startswith("norm")}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"norm.bias: .* no such tensor, nor norm.weight\."):
        load_checkpoint(Model(), tmp_path)
    save_file({k.replace("norm", "ln"): v for k, v in tensors.items()}, tmp_path / FILE)
    message = r"ln.bias: .*, nor ln.weight. .*It has norm.bias, norm.weight, which the files have n"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Model(), tmp_path)


# (tensors beside a dynamic layer's, the layer's word, the tensor that has no place then)
OF_A_LAYER = {
    "a scale that a dynamic layer has not": (
        {"up.input_scale": torch.ones(1)},
        "W8A8_DYNAMIC",
        "up.input_scale",
    ),
    "a quantized layer that is called float": ({}, "FLOAT", r"up.weight_\w+"),
}


@pytest.mark.parametrize(("tensors", "word", "key"), OF_A_LAYER.values(), ids=OF_A_LAYER)
def test_a_part_of_a_layer_is_not_proposed(tensors, word, key, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    add(tmp_path, {"extra": torch.ones(2), **tensors}, {"up.weight": word})
    with pytest.raises(CheckpointError, match=f"{key}: .*do: use the JSON that was saved with"):
        load_checkpoint(Model(), tmp_path)


@pytest.mark.parametrize("ignore", [[], ["head.bias"], ["*d.bias"]])
def test_the_bias_of_a_float_layer_is_not_ignored(ignore, tmp_path) -> None:
    write(tmp_path, "msmodelslim", True, F16)
    model = Model()
    model.head = nn.Linear(24, 8, bias=False, dtype=F16)
    if ignore:
        with pytest.raises(CheckpointError, match=r"head.bias: expected a tensor that is loaded"):
            load_checkpoint(model, tmp_path, ignore=ignore)
    else:
        assert load_checkpoint(model, tmp_path).added == ("head.bias",)
    model.head = nn.Identity()  # a module that the model has not
    assert load_checkpoint(model, tmp_path, ignore=["head"]).left_out.keys() == {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("kind", ["msmodelslim", "compressed-tensors"])
@pytest.mark.parametrize("again", [False, True])
def test_a_bias_that_the_models_layer_has_is_not_dropped(again, kind, tmp_path) -> None:
    write(tmp_path, kind, True, F16)
    model = Model()
    if again:
        load_checkpoint(model, tmp_path)
    before = model_state(model)
    (file,) = tmp_path.glob("*.safetensors")
    save_file({k: v for k, v in load_file(file).items() if k != "up.bias"}, file)
    with pytest.raises(CheckpointError, match="up: expected the bias that the model's layer has"):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before
    model.up = nn.Linear(40, 24, bias=False, dtype=F16)
    load_checkpoint(model, tmp_path)
