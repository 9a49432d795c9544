"""quantize(): what each scheme computes, int8 between layers, and afterwards."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuantTypeError,
    kernels,
    quantize,
)
from support import golden
from support.float_models import CONFIGS, data, make, run, state

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# ---- what the layers compute ----


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_close_to_float(config: Any, bias: bool, dtype: torch.dtype, device: str) -> None:
    model = make(dtype, bias=bias).to(device)
    batches = [x.to(device) for x in data(dtype=dtype)]
    with torch.no_grad():
        want = torch.cat([model(x) for x in batches]).cpu().float()
    report = run(model, config, batches)
    assert [r.changed for r in report] == [True, True]
    got = torch.cat([model(x) for x in batches]).cpu()
    assert got.dtype == dtype
    least = 0.97 if isinstance(config, A4W4Dynamic) else 0.9998
    assert nn.functional.cosine_similarity(got.float().ravel(), want.ravel(), 0) > least


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_npu_and_cpu_are_the_same(config: Any) -> None:
    models = [make(), make().npu()]
    for model in models:
        device = model.up.weight.device
        run(model, config, [x.to(device) for x in data()])
    ours, npus = (state(model.cpu()) for model in models)
    assert ours.keys() == npus.keys()
    for name in ours:
        assert torch.equal(ours[name], npus[name]), name


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_dynamic_weights(dtype: torch.dtype) -> None:
    model = make(dtype)
    weight = numpy(model.up.weight)
    bias = model.up.bias.detach().clone()
    run(model, A8W8Dynamic())
    layer = model.up.linear
    scale = np.abs(weight).max(1) / 127
    np.testing.assert_array_equal(numpy(layer.scale), scale.astype(np.float32))
    want = np.rint(weight.astype(np.float32) / scale.astype(np.float32)[:, None])
    np.testing.assert_array_equal(layer.weight.numpy(), want.astype(np.int8))
    assert torch.equal(layer.bias, bias) and layer.bias.dtype == dtype


def test_int4_weights_have_the_least_error_of_the_clips_tried() -> None:
    model = make()
    weight = numpy(model.up.weight)
    run(model, A4W4Dynamic())
    layer = model.up.linear
    scale = numpy(layer.scale)[:, None]
    error = ((golden.unpack_int4(layer.weight.numpy()) * scale - weight) ** 2).sum(1)
    plain = np.abs(weight).max(1, keepdims=True) / 7
    assert (error <= ((np.rint(weight / plain) * plain - weight) ** 2).sum(1) * 1.0001).all()
    assert (error < ((np.rint(weight / plain) * plain - weight) ** 2).sum(1) * 0.95).any()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_static_layer_computes_its_formula(dtype: torch.dtype, symmetric: bool) -> None:
    model = make(dtype)
    batches = data(dtype=dtype)
    weight, bias = numpy(model.up.weight), numpy(model.up.bias)
    run(model, A8W8Static(symmetric=symmetric), batches)
    layer = model.up
    low = min(0.0, *(x.min().item() for x in batches))
    high = max(0.0, *(x.max().item() for x in batches))
    width = max(-low, high) / 127 if symmetric else (high - low) / 255
    # what the chip multiplies by is the reciprocal, in the activation's dtype
    reciprocal = torch.tensor(1 / width, dtype=torch.float64).to(dtype).float()
    step = layer.input_scale.item()
    assert step == (1 / reciprocal).item() and step == pytest.approx(width, rel=1e-2)
    zero = int(layer.input_offset.item())
    assert zero == (0 if symmetric else round(-128 - low / step))

    scale = numpy(layer.linear.scale)
    # 10 mantissa bits, so folding loses nothing
    assert torch.equal(kernels.s19(layer.linear.scale), layer.linear.scale)
    peaks = np.abs(weight).max(1) / 127 * step
    assert (scale >= peaks * 0.999999).all() and (scale <= peaks * 1.001).all()
    own = scale / step
    values = np.rint(weight / own[:, None])
    assert np.abs(values - layer.linear.weight.numpy()).max() <= 1  # float32 beside float64
    assert (values == layer.linear.weight.numpy()).mean() > 0.999
    sums = layer.linear.weight.numpy().astype(np.int64).sum(1)
    want = np.rint(bias / scale).astype(np.int64) - zero * sums
    np.testing.assert_array_equal(layer.linear.bias.numpy(), want)


def test_a_zero_point_needs_no_float_bias() -> None:
    model = make(bias=False)
    run(model, A8W8Static())
    assert model.up.linear.bias is not None and model.up.linear.bias.dtype == torch.int32
    model = make(bias=False)
    run(model, A8W8Static(symmetric=True))
    assert model.up.linear.bias is None


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_odd_rows(config: Any) -> None:
    """Channels of zeros, of tiny weights with a large bias, and an input that is always 0."""
    model = make()
    with torch.no_grad():
        model.up.weight[0] = 0
        model.up.weight[1] = 6e-8
        model.up.bias[:2] = torch.tensor([3.0, -60.0])
    batches = data()
    with torch.no_grad():
        want = model.up(batches[0]).float()
    run(model, config, batches)
    got = model.up(batches[0]).float()
    assert got.isfinite().all()
    assert (got[:, :2] - want[:, :2]).abs().max() < 0.05
    for zeros in ([torch.zeros(4, 64, dtype=F16)],):
        model = make()
        with torch.no_grad():
            want = model(zeros[0]).float()
        run(model, config, zeros)
        assert (model(zeros[0]).float() - want).abs().max() < 0.05


@pytest.mark.parametrize("output", [F16, BF16])
def test_output_dtype(output: torch.dtype) -> None:
    layer = nn.Sequential(nn.Linear(16, 8)).half()
    report = quantize(layer, A8W8Dynamic(output_dtype=output))
    assert layer(data(1, 4, 16)[0]).dtype == output
    assert report[0].output == str(output).removeprefix("torch.")


# ---- int8 between layers ----


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_int8_between_neighbours(dtype: torch.dtype, relu: bool, prepared: bool) -> None:
    torch.manual_seed(0)
    middle = [nn.ReLU()] if relu else []
    float_model = nn.Sequential(nn.Linear(64, 32), *middle, nn.Linear(32, 16)).to(dtype)
    batches = data(dtype=dtype)
    apart, together = copy.deepcopy(float_model), copy.deepcopy(float_model)
    run(apart, A8W8Static(int8_between=False), batches)
    report = run(together, A8W8Static(), batches)
    assert together[0].linear.output_dtype == torch.int8 and report[0].output == "int8"
    assert "feeds" in report[0].note
    assert (type(together[1]) is nn.Identity) == relu
    if prepared:
        together.npu()
        lq_graph.use_internal_format_weight(together)
    device = together[0].weight.device
    with torch.no_grad():
        for x in batches:
            want = float_model(x).float()
            far = (apart(x).float() - want).abs().max()
            got = together(x.to(device)).cpu().float()
            assert (got - want).abs().max() <= 1.5 * far
    # the ReLU is the lower end of the int8 range
    if relu:
        assert together[-1].input_offset.item() == -128


def test_int8_is_not_kept_where_another_may_read_it() -> None:
    shared = nn.Linear(16, 16)
    torch.manual_seed(0)
    for model in (
        nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)),
        nn.Sequential(shared, shared, nn.Linear(16, 16)),
        nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]),
    ):
        model.half()
        if isinstance(model, nn.ModuleList):
            model.forward = lambda x, m=model: m[1](m[0](x)) + m[0](x)  # type: ignore[method-assign]
        report = run(model, A8W8Static(), data(k=16))
        assert {r.output for r in report} == {"float16"}


# ---- afterwards ----


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_state_dicts_and_copies(config: Any) -> None:
    model, other = make(), make()
    run(model, config)
    run(other, config, [x * 2 for x in data()])
    other.load_state_dict(state(model))
    x = data()[0]
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_static_layer_refuses_another_dtype() -> None:
    model = make()
    run(model, A8W8Static())
    with pytest.raises(LinearQuantTypeError, match="this static layer was made for float16"):
        model(data(dtype=BF16)[0])


def test_int8_outputs_have_no_checkpoint_format(tmp_path: Any) -> None:
    chain = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16)).half()
    run(chain, A8W8Static())
    with pytest.raises(lq_graph.CheckpointError, match="0 gives int8"):
        lq_graph.save_checkpoint(chain, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=repr)
def test_checkpoints(config: Any, dtype: torch.dtype, tmp_path: Any) -> None:
    model, other = make(dtype), make(dtype)
    run(model, config, data(dtype=dtype))
    lq_graph.save_checkpoint(model, tmp_path, "msmodelslim")
    lq_graph.load_checkpoint(other, tmp_path)
    x = data(dtype=dtype)[0]
    assert torch.equal(other(x), model(x))
