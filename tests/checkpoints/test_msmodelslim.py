"""msmodelslim's words, the biases of its smoothing, and the names of its files."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import CheckpointError, load_checkpoint, save_checkpoint
from support.fusing import run
from support.injection import model_state
from support.published import BF16, F16, F32, Msmodelslim, RMSNorm, norm_in_numpy, tensors_in

H, N = 64, 32
AGAIN = "What to do: quantize again as W8A8, W8A8_DYNAMIC or W4A4_DYNAMIC"


def small(word: str = "W8A8_DYNAMIC", bias: float | None = 0.5, dtype: torch.dtype = BF16):
    """A norm with a bias in the files, and a quantized layer."""
    made = Msmodelslim(dtype)
    made.norm("norm", H, bias)
    made.linear("up", N, H, word)
    return made


# ---- words ----

WORDS = {
    "W8A16": "int8 weights with float inputs",
    "W4A16": "int4 weights with float inputs",
    "NF4": "NormalFloat4",
    "W4A8_DYNAMIC": "int4 weights with int8 inputs",
    "W8A8SC": "compressed weights",
    "W16A16SC": "compressed weights",
    "W8A8_TIMESTEP": "scales for each time step",
    "W8A8_MXFP8": "a scale for every 32 values",
    "W4A8_MXFP": "a scale for every 32 values",
    "W4A4_MXFP4_DUALSCALE": "a scale for every 32 values",
    "WFP8AFP8_DYNAMIC": "float8 weights",
    "W4A4_FLATQUANT_DYNAMIC": "left_trans and right_trans",
    "W8A8_FLATQUANT_DYNAMIC": "left_trans and right_trans",
    "W4A4_MXFP4_FLATQUANT": "left_trans and right_trans",
    "W4A4_MXFP4_SVD": "svd_lowrank_l1",
    "W2A2": "found 'W2A2'. ",
    "UNKNOWN": "found 'UNKNOWN'. ",
    7: "found 7. ",
    None: "found None. ",
}


@pytest.mark.parametrize(("word", "what"), WORDS.items(), ids=map(str, WORDS))
@pytest.mark.parametrize("part", ["weight", "weight_packed"])
def test_a_word_that_linear_quant_cannot_run_is_refused(word, what, part, tmp_path) -> None:
    made = small()
    made.words[f"up.{part}"] = word
    made.write(tmp_path)
    model = made.model()
    before = model_state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path)
    text = str(caught.value)
    assert f"quant_model_description.json: up.{part}: expected W8A8, " in text
    assert repr(word) in text and what in text and AGAIN in text
    assert model_state(model) == before


@pytest.mark.parametrize("word", ["FLOAT", "W16A16S"])
def test_sparse_float_weights_are_float(word, tmp_path) -> None:
    made = small()
    made.linear("head", 8, N, "FLOAT")
    made.words["head.weight"] = word
    made.write(tmp_path)
    model = made.model()
    (line,) = load_checkpoint(model, tmp_path)
    assert line.name == "up" and type(model.head) is nn.Linear
    assert torch.equal(model.head.weight, tensors_in(tmp_path)["head.weight"])


@pytest.mark.parametrize("word", ["W8A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_scales_of_groups_are_refused(word, tmp_path) -> None:
    """The word is the same as without groups."""
    made = small(word)
    made.put("up.weight_scale", torch.ones(N, 4), word)
    made.write(tmp_path)
    with pytest.raises(CheckpointError, match=r"found float32 \(32, 4\). What to do: .* no groups"):
        load_checkpoint(made.model(), tmp_path)


CHANGED = {
    "heads": ("up.heads_rotation", "rotated while the model runs", "online: false"),
    "kronecker": ("up.kronecker_rotation_m", "rotated while the model runs", "online: false"),
    "smoothed": ("up.div.mul_scale", "scaled while the model runs", "changes only weights"),
}


@pytest.mark.parametrize(("key", "what", "todo"), CHANGED.values(), ids=CHANGED)
def test_an_input_that_is_changed_while_the_model_runs_is_refused(
    key, what, todo, tmp_path
) -> None:
    made = small()
    made.tensors[key] = torch.eye(4)  # some of them have no word
    made.write(tmp_path)
    with pytest.raises(CheckpointError, match=f"{key}: expected .*{what}.* What to do: .*{todo}"):
        load_checkpoint(made.model(), tmp_path)


@pytest.mark.parametrize("kind", ["heads_rotation", "kronecker_rotation"])
def test_a_rotation_cannot_be_ignored(kind, tmp_path) -> None:
    made = small()
    name = "up.heads_rotation" if kind == "heads_rotation" else "up.kronecker_rotation_m"
    made.tensors[name] = torch.eye(4)
    made.words["metadata"] = {"quarot": {"max_tp_size": 4, kind: {"layers": ["up"]}}}
    made.write(tmp_path)
    message = rf"metadata.quarot: expected .*{kind} of \['up'\]. What to do: .*online: false"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(made.model(), tmp_path, ignore=[name])


# ---- biases of norms ----


def test_the_bias_of_a_norm_is_added(tmp_path) -> None:
    made = small()
    made.write(tmp_path)
    model, files = made.model(), tensors_in(tmp_path)
    with torch.no_grad():
        report = load_checkpoint(model, tmp_path)
    assert not report.left_out and report.added == ("norm.bias",)
    assert "biases that the model had not: 1, norm.bias" in str(report)
    assert list(model.state_dict())[:2] == ["norm.weight", "norm.bias"]
    assert model.norm.bias.dtype == BF16 and files["norm.bias"].dtype == F32
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(1)).to(BF16)
    want = torch.from_numpy(norm_in_numpy(x, files["norm.weight"], files["norm.bias"]))
    assert (files["norm.bias"].abs() > 0.1).any()
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(one.norm(x).float(), want, rtol=2**-7, atol=0)
    assert torch.equal(model.to(F32).norm(x.float()), copy.deepcopy(model).norm(x.float()))


def test_a_bias_is_kept_by_a_second_load_and_by_a_save(tmp_path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    made = small()
    made.write(first)
    model, again = made.model(), made.model()
    load_checkpoint(model, first)
    x = torch.randn(5, H).to(BF16)
    want = model.norm(x)
    load_checkpoint(model, first)
    assert torch.equal(model.norm(x), want)  # added once
    save_checkpoint(model, second, "msmodelslim")
    load_checkpoint(again, second)
    assert torch.equal(again.norm(x), want)


def test_biases_of_zeros_are_left_out(tmp_path) -> None:
    made = small(bias=0.0)
    made.write(tmp_path)
    model = made.model()
    report = load_checkpoint(model, tmp_path)
    assert report.left_out == {"norm.bias": "a bias of zeros, and the model's module has none"}
    assert report.added == ()
    assert "norm.bias" not in model.state_dict() and not model.norm._forward_hooks


def test_a_norm_with_a_place_for_a_bias_adds_it_once(tmp_path) -> None:
    made = small()
    made.write(tmp_path)
    model = made.model()
    model.norm = nn.LayerNorm(H, bias=False, dtype=BF16)
    load_checkpoint(model, tmp_path)
    files = tensors_in(tmp_path)
    x = torch.randn(5, H).to(BF16)
    want = nn.functional.layer_norm(x, (H,), files["norm.weight"], files["norm.bias"].to(BF16))
    assert torch.equal(model.norm(x), want)


@pytest.mark.parametrize("made_on", ["cpu", "meta"])
def test_the_model_may_be_on_meta(made_on, tmp_path) -> None:
    made = small()
    made.write(tmp_path)
    model = made.model().to(made_on)
    load_checkpoint(model, tmp_path)
    assert not any(t.is_meta for t in model.state_dict().values())
    assert torch.equal(model.norm.bias, tensors_in(tmp_path)["norm.bias"].to(BF16))


class Gated(nn.Module):
    """Not a norm by its name or class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(H, dtype=BF16))


NO_PLACE = {
    "shape": (
        lambda made: made.put("norm.bias", torch.ones(H + 1)),
        r"norm.bias: expected bfloat16 \(64,\), found float32 \(65,\)",
    ),
    "dtype": (
        lambda made: made.put("norm.bias", torch.ones(H, dtype=torch.int32)),
        r"norm.bias: expected bfloat16 \(64,\), found int32 \(64,\)",
    ),
    "value": (
        lambda made: made.put("norm.bias", torch.full((H,), 3.4e38)),
        "norm.bias: expected values that bfloat16 holds",
    ),
    "another module": (
        lambda made: made.modules.update(gate=Gated())
        or made.put("gate.bias", torch.ones(H)) or made.put("gate.weight", torch.ones(H)),
        "gate.bias: expected a tensor the model has",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), NO_PLACE.values(), ids=NO_PLACE)
def test_a_bias_without_a_place_is_refused(spoil, message, tmp_path) -> None:
    made = small()
    spoil(made)
    made.write(tmp_path)
    model = made.model()
    before = model_state(model)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before and not model.norm._forward_hooks


class Closed(RMSNorm):
    """Takes no more parameters."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "bias":
            raise TypeError(name)
        super().register_parameter(name, param)


def test_a_failed_load_adds_nothing(tmp_path) -> None:
    made = small()
    made.norm("first_norm", H, 0.5)  # gets its bias before the other one fails
    made.modules["norm"] = Closed(H, BF16)
    made.write(tmp_path)
    model = made.model()
    before = model_state(model)
    with pytest.raises(TypeError, match="bias"):
        load_checkpoint(model, tmp_path)
    assert model_state(model) == before
    assert not model.norm._forward_hooks and not model.first_norm._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["GE", "npugraph_ex"])
def test_a_compiled_model_adds_the_bias(mode, tmp_path) -> None:
    """Also where the sum of a residual, the norm and the quantization are one operator."""
    made = small(dtype=F16)
    made.write(tmp_path)
    model = made.model()
    load_checkpoint(model, tmp_path)
    x = torch.randn(5, H, generator=torch.Generator().manual_seed(1)).to(F16)

    def step(a: Tensor, b: Tensor) -> Tensor:
        return model.up(model.norm(a + b))

    with torch.no_grad():
        want = step(x, x.flip(0))
    model.npu()
    found = run(step, mode, x, x.flip(0))
    assert torch.equal(found.results, want)
    with torch.no_grad():
        model.norm.bias.zero_()
        assert not torch.equal(step(x.npu(), x.flip(0).npu()).cpu(), want)


# ---- names ----


@pytest.mark.parametrize("old", [True, False], ids=["norm.module", "norm"])
def test_biases_follow_the_names_of_the_model(old, tmp_path) -> None:
    made = Msmodelslim()
    made.norm("model.layers.0.norm", H, 0.5)
    made.linear("model.layers.0.up", N, H, "W8A8_MIX")
    if old:
        for part in ("weight", "bias"):
            tensor = made.tensors.pop(f"model.layers.0.norm.{part}")
            made.put(f"model.layers.0.norm.module.{part}", tensor, "W8A8_MIX")
    made.write(tmp_path)
    made.modules = {
        name.replace("model.", "model.language_model."): module
        for name, module in made.modules.items()
    }
    model = made.model()
    report = load_checkpoint(model, tmp_path)
    norm, files = model.model.language_model.layers.get_submodule("0.norm"), tensors_in(tmp_path)
    end = "module." if old else ""
    for part in ("weight", "bias"):
        wanted = files[f"model.layers.0.norm.{end}{part}"].to(BF16)
        assert torch.equal(norm.get_parameter(part), wanted)
    assert {key.rpartition(".")[0] for key in report.left_out} == {
        "model.language_model.layers.0.up"
    }


# ---- files ----


def test_a_missing_file_is_named(tmp_path) -> None:
    made = small()
    made.write(tmp_path, "quant_model_weight_w8a8_dynamic", parts=3)
    lost = "quant_model_weight_w8a8_dynamic-00002-of-00003.safetensors"
    (tmp_path / lost).unlink()
    message = f"expected the file {lost}, found no such file. What to do: copy it"
    with pytest.raises(CheckpointError, match=f"index.json: weight_map: {message}"):
        load_checkpoint(made.model(), tmp_path)
    (tmp_path / "quant_model_weight_w8a8_dynamic.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(made.model(), tmp_path)


def test_files_in_parts_load_without_their_index(tmp_path) -> None:
    made = small()
    made.write(tmp_path, "quant_model_weights", parts=3)
    (tmp_path / "quant_model_weights.safetensors.index.json").unlink()
    assert len(load_checkpoint(made.model(), tmp_path)) == 1


OTHER_FILES = ("generation_config.json", "tokenizer.json", "Qwen3-32B_best_practice.yaml")


def test_other_files_of_the_folder_are_not_read(tmp_path: Path) -> None:
    made = small()
    made.write(tmp_path)
    for name in OTHER_FILES:
        (tmp_path / name).write_text("{")
    (tmp_path / "optional").mkdir()
    (tmp_path / "optional/quarot.safetensors").write_bytes(b"")
    assert len(load_checkpoint(made.model(), tmp_path)) == 1


def test_the_description_has_keys_that_are_no_tensors(tmp_path) -> None:
    made = small()
    made.words |= {
        "model_quant_type": "W4A8_DYNAMIC",  # of the lowest precision, not of every layer
        "kv_cache_type": "C8",
        "fa_quant_type": "FAKQuant",
        "reduce_quant_type": "per_channel",
        "group_size": 256,
        "metadata": {"quarot": {}},
        "model.layers.0.self_attn.quant_type": "INT8_DYNAMIC",
        "absent.kv_cache_scale": "C8",
    }
    made.write(tmp_path)
    report = load_checkpoint(made.model(), tmp_path)
    assert len(report) == 1 and not report.left_out
    about = json.loads((tmp_path / "quant_model_description.json").read_text())
    assert about["group_size"] == 256


def test_a_layer_of_the_description_that_the_files_do_not_have_is_refused(tmp_path) -> None:
    made = small()
    made.words["down.weight"] = "W8A8"
    made.write(tmp_path)
    model = made.model()
    with pytest.raises(CheckpointError, match="down: expected an nn"):
        load_checkpoint(model, tmp_path)
    model.down = nn.Linear(8, 8, dtype=BF16)
    with pytest.raises(CheckpointError, match=r"down.weight: expected int8 .* no such tensor"):
        load_checkpoint(model, tmp_path)


def test_quantize_and_the_files_agree_on_a_norm_with_a_bias(tmp_path) -> None:
    """A loaded norm is no reason to leave the layer after it."""
    made = small("FLOAT")
    made.write(tmp_path)
    model = made.model()
    load_checkpoint(model, tmp_path)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    assert isinstance(model.up, lq_graph.QuantizedLinear)


def test_a_format_whose_readers_would_leave_the_bias_out_is_refused(tmp_path) -> None:
    made = small()
    first = tmp_path / "a"
    first.mkdir()
    made.write(first)
    model = made.model()
    load_checkpoint(model, first)
    with pytest.raises(CheckpointError, match="norm has a bias, which its class does not"):
        save_checkpoint(model, tmp_path / "b", "compressed-tensors")
    assert not (tmp_path / "b").exists()
