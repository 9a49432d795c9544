"""Checkpoints in the two published formats: loaded, and written back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchair
from torch import nn

import lq_graph
from lq_graph import (
    A8W8Static,
    CheckpointError,
    QuantizedLinear,
    load_checkpoint,
    save_checkpoint,
)
from support import golden
from support.checkpoint_files import (
    Model,
    example_input,
    layer_tensors,
    write,
)

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
N, K = 24, 40

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
            # the operator reads 19 bits of the scale, so these are the bias's steps
            scale = (scale.view(np.int32) & ~0x1FFF).view(np.float32)
            bias = np.rint(bias / scale).astype(np.int32)
    return golden.linear_quant(
        quantized, tensors["weight"].numpy(), scale, None, None, bias, name,
        packed=scale.dtype == np.int64,
    )  # fmt: skip


@EVERY
@pytest.mark.parametrize("shards", [1, 3])
def test_loads_what_the_files_say(kind, dynamic, dtype, shards, tmp_path) -> None:
    model = Model(dtype)
    report = load_checkpoint(model, write(tmp_path, kind, dynamic, dtype, shards=shards))
    (loaded,) = report
    assert (loaded.name, loaded.n, loaded.k, loaded.output_dtype) == ("up", N, K, dtype)
    assert loaded.scheme == (f"A8W8 {'dynamic' if dynamic else 'static'}") and "up" in str(report)
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


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("kind", ["msmodelslim", "compressed-tensors"])
def test_a_static_layer_goes_to_the_other_format_bit_for_bit_or_not_at_all(
    kind, dtype, tmp_path
) -> None:
    (tmp_path / "a").mkdir()
    other = "msmodelslim" if kind == "compressed-tensors" else "compressed-tensors"
    model, again, x = Model(dtype), Model(dtype), example_input(dtype)
    load_checkpoint(model, write(tmp_path / "a", kind, False, dtype))
    if (dtype, other) == (BF16, "msmodelslim"):  # a float bias
        with pytest.raises(CheckpointError, match=r"up is static, and .* as compressed-tensors"):
            save_checkpoint(model, tmp_path / "b", other)
        assert not (tmp_path / "b").exists()
        return
    save_checkpoint(model, tmp_path / "b", other)
    load_checkpoint(again, tmp_path / "b")
    assert torch.equal(again(x), model(x))


def test_a_format_that_does_not_exist(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="format is 'gguf'; allowed"):
        save_checkpoint(Model(), tmp_path / "b", "gguf")
    assert not (tmp_path / "b").exists()


def test_layers_of_both_formats_in_one_model(tmp_path) -> None:
    for dtype in (F16, BF16):
        folder = tmp_path / str(dtype)
        (folder / "a").mkdir(parents=True)
        model = Model(dtype)
        load_checkpoint(model, write(folder / "a", "compressed-tensors", False, dtype))
        x = example_input(dtype)
        lq_graph.quantize(model, A8W8Static(), [x])
        if dtype == BF16:  # a float bias in one layer
            with pytest.raises(CheckpointError, match=r"up is .* as compressed-tensors"):
                save_checkpoint(model, folder / "b", "msmodelslim")
            assert not (folder / "b").exists()
        for kind in ("compressed-tensors", "msmodelslim")[: 1 if dtype == BF16 else 2]:
            save_checkpoint(model, folder / kind, kind)
            other = Model(dtype)
            load_checkpoint(other, folder / kind)
            assert torch.equal(other(x), model(x))


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
