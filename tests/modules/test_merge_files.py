"""A merged model's tensors: state dicts and checkpoints as before, reads computed, writes
refused."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuantTypeError,
    LinearQuantValueError,
)
from lq_graph.backends.npu import format_of
from support import has
from support.shared_input import Attention, inputs, pair, quantized

pytestmark = pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")

F16, BF16 = torch.float16, torch.bfloat16
CONFIGS = [A8W8Dynamic(), A4W4Dynamic(), A8W8Static(), A8W8Static(symmetric=True)]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=repr)
STATES = pytest.mark.parametrize("state", ["cpu", "npu", "prepared", "prepared before"])


@pytest.fixture(autouse=True)
def internal_formats() -> None:
    torch.npu.config.allow_internal_format = True


def merged(model: Any, state: str) -> Any:
    """A model merged, and on the device and prepared as a name says."""
    if state == "prepared before":
        lq_graph.use_internal_format_weight(model.npu())
        lq_graph.merge(model, inputs(dtype=model.q.input_dtype).npu())
        return model
    lq_graph.merge(model, inputs(dtype=model.q.input_dtype))
    if state != "cpu":
        model.npu()
    if state == "prepared":
        lq_graph.use_internal_format_weight(model)
    return model


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


def assert_states_equal(got: Any, want: Any) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and type(got[name]) is Tensor, name
        assert torch.equal(got[name].cpu(), tensor), name


# ---- state dicts ----


@STATES
@EACH
def test_state_dicts_go_both_ways(config: Any, state: str) -> None:
    plain, model = pair(config, bias=True)
    model = merged(model, state)
    assert_states_equal(model.state_dict(), plain.state_dict())
    assert_states_equal(through_a_file(model.state_dict()), plain.state_dict())
    other = quantized(Attention(bias=True), config, seed=3)
    formats = format_of(model.q.linear.merged.weight), model.q.linear.merged.scale.dtype
    for options in ({}, {"assign": True}):
        assert not any(model.load_state_dict(dict(other.state_dict()), **options))
        assert_states_equal(model.state_dict(), other.state_dict())
        assert (format_of(model.q.linear.merged.weight), formats[1]) == formats
        x = inputs().to(model.q.linear.merged.weight.device)
        if not (state != "cpu" and options):  # with assign, the other layers are on the CPU now
            assert torch.equal(model(x).cpu(), other(inputs()))
        # and back
        again = quantized(Attention(bias=True), config, seed=4)
        again.load_state_dict(through_a_file(model.state_dict()), **options)
        assert_states_equal(again.state_dict(), other.state_dict())
        assert torch.equal(again(inputs()), other(inputs()))


@pytest.mark.parametrize("state", ["cpu", "prepared"])
def test_one_layers_tensors_alone(state: str) -> None:
    plain, model = pair(A8W8Dynamic(), bias=True)
    model = merged(model, state)
    other = quantized(Attention(bias=True), A8W8Dynamic(), seed=3)
    for each in (plain, model):
        each.k.load_state_dict(other.k.state_dict())
    assert_states_equal(model.k.state_dict(), other.k.state_dict())
    assert_states_equal(model.state_dict(), plain.state_dict())


def test_a_packed_scale_that_another_program_folded() -> None:
    plain, model = pair(A8W8Static())
    state = dict(plain.state_dict())
    for name in "qkv":
        state[f"{name}.linear.scale"] = lq_graph.trans_quant_param(state[f"{name}.linear.scale"])
    with pytest.raises(RuntimeError, match=r"q.linear.scale is int64 \(40,\) .* merged with k an"):
        merged(copy.deepcopy(model), "cpu").load_state_dict(state)
    model = merged(model, "prepared")
    model.load_state_dict(state)
    assert_states_equal(model.state_dict(), state)
    assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__delitem__(name)


def with_value(name: str, value: Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.__setitem__(name, value)


REFUSED = [
    (without("k.linear.weight"), r'Missing key\(s\) in state_dict: "k.linear.weight"'),
    (without("v.linear.scale"), r'Missing key\(s\) in state_dict: "v.linear.scale"'),
    (
        with_value("k.linear.merged.weight", torch.ones(1)),
        r'Unexpected key\(s\) in state_dict: "k.linear.merged.weight"',
    ),
    (
        with_value("k.linear.bias", torch.ones(24)),
        r'Unexpected key\(s\) in state_dict: "k.linear.bias"',
    ),
    (
        with_value("k.linear.weight", torch.zeros(24, 8, dtype=torch.int32)),
        r"k.linear.weight is int32 \(24, 8\) in the state dict; this layer is merged with q and v, "
        r"so allowed is int8 \(24, 64\). What to do: load it before lq_graph.merge",
    ),
    (with_value("q.linear.scale", torch.ones(1)), r"q.linear.scale is float32 \(1,\) .* merged"),
    (with_value("q.linear.weight", torch.ones(40, 64)), r"q.linear.weight is float32 .* merged"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED, ids=[match[:30] for _, match in REFUSED])
def test_a_state_dict_that_does_not_fit(change: Any, match: str) -> None:
    plain, model = pair(A8W8Dynamic())
    model = merged(model, "cpu")
    state = dict(quantized(Attention(), A8W8Dynamic(), seed=3).state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state)
    if "merged with" in match:  # the layer keeps its own
        name = match[0]
        assert_states_equal(getattr(model, name).state_dict(), getattr(plain, name).state_dict())


# ---- checkpoints ----


@pytest.mark.parametrize("state", ["cpu", "prepared"])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=repr)
def test_checkpoints_are_the_same(config: Any, state: str, tmp_path: Path) -> None:
    plain, model = pair(config, bias=True)
    model = merged(model, state)
    lq_graph.save_checkpoint(plain, tmp_path / "plain")
    lq_graph.save_checkpoint(model, tmp_path / "merged")
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("plain", "merged")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("state", ["cpu", "prepared"])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=repr)
def test_a_checkpoint_is_loaded_into_a_merged_model(
    config: Any, state: str, tmp_path: Path
) -> None:
    other = quantized(Attention(bias=True), config, seed=3)
    lq_graph.save_checkpoint(other, tmp_path / "other")
    model = merged(pair(config, bias=True)[1], state)
    lq_graph.load_checkpoint(model, tmp_path / "other")
    assert model.q.linear.merged is None
    x = inputs().to(model.q.linear.weight.device)
    assert torch.equal(model(x).cpu(), other(inputs()))
    assert len(lq_graph.merge(model, x)) == 1
    assert torch.equal(model(x).cpu(), other(inputs()))


def test_a_checkpoint_without_a_layers_weight_is_refused(tmp_path: Path) -> None:
    """Tensors that are computed when they are read are not tied to each other."""
    from safetensors.torch import load_file, save_file

    sizes = {"q": 40, "k": 8, "v": 8}
    plain, model = pair(A8W8Dynamic(), sizes=sizes)
    lq_graph.save_checkpoint(plain, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["v.weight"]
    save_file(tensors, path)
    with pytest.raises(lq_graph.CheckpointError, match=r"v\.weight"):
        lq_graph.load_checkpoint(merged(model, "cpu"), tmp_path)


# ---- reads and writes ----


@STATES
@EACH
def test_what_is_read(config: Any, state: str) -> None:
    plain, model = pair(config, bias=True)
    model = merged(model, state)
    for name in ("q", "k", "v"):
        layer, want = getattr(model, name), getattr(plain, name)
        assert (layer.in_features, layer.out_features) == (want.in_features, want.out_features)
        assert torch.equal((layer.bias * 1).cpu(), want.bias * 1)
        if "prepared" not in state or layer.dynamic:  # a packed scale has fewer bits
            assert torch.equal((layer.weight * 1).cpu(), want.weight * 1)
        for attribute in ("weight", "scale", "bias", "pertoken_scale", "offset"):
            own, wanted = getattr(layer.linear, attribute), getattr(want.linear, attribute)
            if wanted is None or own.dtype != wanted.dtype:
                assert wanted is not None or own is None
                continue
            assert own.shape == wanted.shape and torch.equal((own * 1).cpu(), wanted * 1)
            assert repr(own)


WRITES: list[Callable[[Any], Any]] = [
    lambda linear: linear.weight.zero_(),
    lambda linear: linear.weight.data.zero_(),
    lambda linear: linear.weight[0].zero_(),
    lambda linear: linear.scale.mul_(2),
    lambda linear: linear.weight.__setitem__(0, 1),
    lambda linear: setattr(linear.weight, "data", torch.ones(24, 64, dtype=torch.int8)),
    lambda linear: setattr(linear, "weight", nn.Parameter(torch.ones(24, 64), False)),
    lambda linear: setattr(linear, "bias", None),
    lambda linear: setattr(linear, "output_dtype", BF16),
]


@pytest.mark.parametrize("state", ["cpu", "prepared"])
@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused(write: Callable[[Any], Any], state: str) -> None:
    plain, model = pair(A8W8Dynamic(), bias=True)
    model = merged(model, state)
    with pytest.raises(LinearQuantTypeError, match=r"rows of a merged weight.*What to do"):
        write(model.k.linear)
    assert_states_equal(model.state_dict(), plain.state_dict())


def test_a_parameter_held_from_before_is_the_same_memory() -> None:
    _, model = pair(A8W8Dynamic())
    weight = model.k.linear.weight
    merged(model, "cpu")
    weight.data.zero_()
    assert not (model.k.linear.weight * 1).any() and (model.q.linear.weight * 1).any()


# ---- beside other parts of lq_graph ----


def test_a_merged_layer_is_not_split(tmp_path: Path) -> None:
    from lq_graph.parallel import ColwiseLinearQuant

    model = merged(pair(A8W8Dynamic())[1], "cpu")
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        with pytest.raises(LinearQuantValueError, match="merged: q, k, v have one weight"):
            ColwiseLinearQuant()._apply(model.q, mesh)
    finally:
        dist.destroy_process_group()


def test_convert_compare_and_explain() -> None:
    plain, model = pair(A8W8Dynamic())
    model = merged(model, "cpu")
    assert [layer.name for layer in lq_graph.compare(plain, model, [inputs()])] == [*"qkv"]
    explanation = lq_graph.explain(model, [inputs()])
    assert [layer.name for layer in explanation.layers] == ["q.linear.merged", "out.linear"]
    with pytest.warns(UserWarning, match="a MergedLinear, whose forward may differ"):
        lq_graph.convert(nn.ModuleList([model.q]), to="torch_npu")
