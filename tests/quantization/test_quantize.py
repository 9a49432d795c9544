"""quantize(): what each scheme computes, what is left alone, all or nothing."""

from __future__ import annotations

import copy
import signal
import threading
import weakref
from collections.abc import Iterator
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
    LinearQuant,
    LinearQuantTypeError,
    LinearQuantValueError,
    QuantizedLinear,
    quantize,
)
from lq_graph.kernels import numerics
from lq_graph.quantization.layer import Job
from support import golden
from support.processes import output_of, python, script

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CONFIGS = [A8W8Dynamic(), A8W8Static(), A8W8Static(symmetric=True), A4W4Dynamic()]


class Net(nn.Module):
    """Two layers with an activation between that no Sequential shows."""

    def __init__(self, k: int = 64, hidden: int = 32, n: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(k, hidden, bias=bias)
        self.down = nn.Linear(hidden, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def make(dtype: torch.dtype = F16, **sizes: Any) -> Net:
    torch.manual_seed(0)
    return Net(**sizes).to(dtype).eval()


def data(count: int = 4, m: int = 8, k: int = 64, dtype: torch.dtype = F16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(m, k, generator=generator) + 0.3).to(dtype) for _ in range(count)]


def run(model: nn.Module, config: Any, batches: list[Any] | None = None, **options: Any) -> Any:
    calibration = (batches or data()) if isinstance(config, A8W8Static) else None
    return quantize(model, config, calibration, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not isinstance(module, QuantizedLinear)


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
def test_static_layer_is_what_its_formula_says(dtype: torch.dtype, symmetric: bool) -> None:
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
    assert torch.equal(numerics.s19(layer.linear.scale), layer.linear.scale)
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


# ---- what is left alone ----


class Odd(nn.Module):
    """One of everything that must not be touched."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.embedding = nn.Embedding(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.attention = nn.MultiheadAttention(16, 2)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda *_: None)
        self.floats = nn.Linear(16, 16)
        self.odd = nn.Linear(12, 16)
        self.done = QuantizedLinear(LinearQuant(16, 16, pertoken_scale=True, output_dtype=F16))
        self.vendor_like = LinearQuant(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x)


def test_what_must_not_be_touched_is_told() -> None:
    model = Odd().half()
    model.floats.float()
    report = quantize(model, A4W4Dynamic())
    notes = {r.name: r.note for r in report}
    assert [r.name for r in report if r.changed] == ["plain"]
    for name, text in {
        "tied": "its weight is also that of embedding, which stays float",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, whose forward may differ",
        "encoder.linear1": "nn.TransformerEncoderLayer reads the weight itself",
        "hooked": "it has forward hooks",
        "floats": "its weight is float32, LinearQuant works in float16 and bfloat16: call model.h",
        "odd": "k = 12, n = 16: int4 needs multiples of 8",
    }.items():
        assert text in notes[name], name
    assert not any(name.startswith(("done", "vendor_like")) for name in notes)
    assert "left float" in str(report) and "1 of 9 layers quantized" in str(report)
    # the fast path of the encoder layer still finds what it reads
    model.eval()
    with torch.no_grad():
        assert model.encoder(torch.ones(2, 3, 16, dtype=F16)).shape == (2, 3, 16)


def test_filter_and_second_call() -> None:
    model = make()
    first = quantize(model, A8W8Dynamic(), filter_fn=lambda module, name: name == "up")
    assert [(r.name, r.note) for r in first if not r.changed] == [("down", "filter_fn leaves it")]
    up = model.up
    second = quantize(model, A4W4Dynamic())
    assert model.up is up and [r.name for r in second] == ["down"]
    assert model.down.linear.weight.dtype == torch.int32
    assert str(quantize(model, A8W8Dynamic())) == "no nn.Linear to quantize in this model"


def test_a_layer_that_calibration_never_reaches() -> None:
    model = make()
    model.unused = nn.Linear(16, 16).half()
    report = run(model, A8W8Static())
    assert report[-1].note == "calibration never reached it" and type(model.unused) is nn.Linear


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_shared_layers_and_weights_stay_shared(config: Any) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.same = self.a
            self.b = nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.same(self.a(x)).tanh())

    torch.manual_seed(0)
    model = Shares().half()
    with torch.no_grad():
        want = torch.cat([model(x) for x in data()]).float()
    run(model, config)
    assert model.a is model.same and model.a.linear.weight is model.b.linear.weight
    assert not torch.equal(model.a.linear.bias, model.b.linear.bias)
    got = torch.cat([model(x) for x in data()]).float()
    least = 0.95 if isinstance(config, A4W4Dynamic) else 0.999
    assert nn.functional.cosine_similarity(got.ravel(), want.ravel(), 0) > least


# ---- what runs of the model show ----


class Reads(nn.Module):
    """Layers of which something is read beside, or in place of, a call."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 32)
        self.read = nn.Linear(32, 32)
        self.read_and_called = nn.Linear(32, 32)
        self.tied = nn.Linear(32, 32)
        self.tied.weight = self.read.weight
        self.by_data = nn.Linear(32, 32)
        self.by_forward = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x.to(self.plain.weight.dtype))
        # Mamba's dt_proj: the product without the bias
        x = (self.read.weight @ x.transpose(0, 1)).transpose(0, 1) + self.read.bias
        x = nn.functional.linear(self.read_and_called(x), self.read_and_called.weight)
        x = nn.functional.linear(self.tied(x), self.by_data.weight.data.t())
        return self.by_data(self.by_forward.forward(input=x))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_weights_that_are_read_elsewhere_stay_float(config: Any) -> None:
    torch.manual_seed(0)
    model = Reads().half()
    x = data()[0]
    want = model(x)
    inputs = {} if isinstance(config, A8W8Static) else {"example_inputs": [x]}
    report = {r.name: r for r in run(model, config, [x], **inputs)}
    assert {name for name, r in report.items() if r.changed} == {"plain", "by_forward"}
    reached = "example_inputs" if inputs else "calibration"
    for name, text in {
        "read": "the model reads its weight outside its forward, by aten.",
        "read_and_called": "the model reads its weight outside its forward, by aten.",
        "tied": "the model reads its weight outside its forward, by aten.",
        "by_data": "the model reads its weight outside its forward, by aten.",
        "unused": f"{reached} never reached it",
    }.items():
        assert report[name].note.startswith(text), name
    assert not any("forward" in vars(module) for module in model.modules())
    scale = want.float().abs().max()
    assert (model(x).float() - want.float()).abs().max() < 0.2 * scale


@pytest.mark.parametrize("config", [A8W8Dynamic(), A4W4Dynamic()], ids=repr)
def test_weights_that_are_read_elsewhere_without_inputs(config: Any) -> None:
    torch.manual_seed(0)
    model = Reads().half()
    x = data()[0]
    want = model(x).float()
    assert all(r.changed for r in run(model, config))
    far = (model(x).float() - want).abs().max() / want.abs().max()
    assert far < (0.5 if isinstance(config, A4W4Dynamic) else 0.05)


def test_a_layer_tied_to_one_that_inputs_never_reach() -> None:
    model = make(hidden=64, n=64)
    model.unused = nn.Linear(64, 64).half()
    model.unused.weight = model.down.weight
    report = {r.name: r for r in quantize(model, A8W8Dynamic(), example_inputs=data())}
    assert report["up"].changed and report["unused"].note == "example_inputs never reached it"
    assert report["down"].note == "its weight is also that of unused, which stays float"
    assert model.unused.weight is model.down.weight


class AsList(nn.Module):
    """An nn.Sequential whose layers are called one by one."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.call(self.layers, x)
        return out


def _residual(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = x + layer(x)
    return x


@pytest.mark.parametrize(
    "call",
    [
        _residual,
        lambda layers, x: layers(x) + layers[0](x),
        lambda layers, x: layers(x) + layers[1](x),  # the ReLU would be gone
        lambda layers, x: layers(x) + layers[:2](x),
        lambda layers, x: layers(x) + layers[0].forward(x),
    ],
    ids=["residual", "first again", "relu again", "slice", "forward"],
)
def test_int8_is_not_kept_where_the_layers_are_called_one_by_one(call: Any) -> None:
    torch.manual_seed(0)
    model = AsList(call).half()
    x = data()[0]
    want = model(x).float()
    report = run(model, A8W8Static(), [x])
    assert {r.output for r in report} == {"float16"} and type(model.layers[1]) is nn.ReLU
    assert (model(x).float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model, "forward", lambda x: model[2](model[1](model[0](x))) + 1),
        lambda model: setattr(model[1], "forward", lambda x: x.relu() * 2),
    ],
    ids=["hook", "forward", "relu"],
)
def test_int8_is_not_kept_through_what_is_not_plain(change: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).half()
    change(model)
    x = data()[0]
    want = model(x).float()
    report = run(model, A8W8Static(), [x])
    assert {r.output for r in report} == {"float16"}
    assert (model(x).float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_model_that_is_compiled_already(config: Any) -> None:
    plain, model = make(), make()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    x = data()[0]
    compiled(x)
    run(plain, config)
    # through the compiled model: calibration sees its layers, though graphs of them exist
    report = run(compiled, config)
    assert [(r.name, r.changed) for r in report] == [
        ("_orig_mod.up", True),
        ("_orig_mod.down", True),
    ]
    assert torch.equal(compiled(x), plain(x)) and torch.equal(model(x), plain(x))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_threads_that_quantize_one_model(config: Any) -> None:
    plain, model = make(), make()
    run(plain, config)
    reports: list[Any] = []
    threads = [
        threading.Thread(target=lambda: reports.append(run(model, config))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(len, reports)) == [0, 0, 2]
    assert torch.equal(model(data()[0]), plain(data()[0]))


def test_lazy_layers_and_layers_without_a_weight_stay_float() -> None:
    class NoWeight(nn.Linear):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleList([nn.Linear(16, 16), nn.LazyLinear(8), NoWeight()]).half()
    report = quantize(model, A8W8Dynamic())
    assert [r.changed for r in report] == [True, False, False]
    assert "LazyLinear" in str(report)


class Mixture(nn.Module):
    """Fused experts: a float parameter of 3 dims that is no nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(64, 4)
        self.experts = nn.Parameter(torch.ones(4, 64, 64))


def test_what_holds_the_bytes_and_stays_float_is_named() -> None:
    model = nn.Sequential(nn.Embedding(16, 64), Mixture(), Mixture(), nn.Linear(64, 64)).half()
    report = quantize(model, A8W8Dynamic())
    assert all(r.changed for r in report)
    total = 2 * (16 * 64 + 2 * (4 * 64 * 64 + 4 * 64 + 4) + 64 * 64 + 64)
    experts, embedding = report.stays_float
    assert (experts.name, experts.kind, experts.shape) == ("*.experts", "Mixture", (4, 64, 64))
    assert experts.bytes == 2 * 2 * 4 * 64 * 64 and experts.share == experts.bytes / total
    assert (embedding.name, embedding.bytes) == ("*.weight", 2 * 16 * 64)
    text = str(report)
    assert "3 of 3 layers quantized" in text
    share = (experts.bytes + embedding.bytes) / total
    assert f"{share:.1%} of the model's bytes stay float, most of them in" in text
    assert f"*.experts  Mixture    4 x 64 x 64  65,536  {experts.share:.1%}" in text
    assert "stay float" in str(quantize(model, A8W8Dynamic()))  # no nn.Linear is left
    assert "stay float" not in str(run(make(), A8W8Dynamic()))


# ---- all or nothing ----


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["up.weight", "down.bias"])
def test_weights_that_are_no_numbers_are_refused(where: str, bad: float, config: Any) -> None:
    model = make()
    model.get_parameter(where).data.view(-1)[5] = bad
    before = {name: tensor.nan_to_num() for name, tensor in state(model).items()}
    with pytest.raises(LinearQuantValueError, match=f"quantize: {where} holds NaN or infinity"):
        run(model, config)
    model.get_parameter(where).data.nan_to_num_()
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [A8W8Dynamic(output_dtype=F16), A8W8Static(output_dtype=F16)])
@pytest.mark.parametrize("what", ["bias", "weight"])
def test_what_the_output_dtype_does_not_hold_is_refused(config: Any, what: str) -> None:
    model = make(BF16)
    getattr(model.down, what).data[1] = 1e8
    before = state(model)
    with pytest.raises(LinearQuantValueError, match=rf"down: output_dtype is float16, .*{what}.*"):
        run(model, config, data(dtype=BF16))
    assert_unchanged(model, before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("dtype", "size", "text"),
    [
        (F16, 1e-4, "up: its activations are too small for float16, from -"),
        (F16, 0.0, "up: calibration gave it only zeros"),
        (BF16, 1e-4, ""),
        (BF16, 1e-20, ""),
        (BF16, 1e-37, "up: its activations are too small for bfloat16, from -"),
        (BF16, 0.0, "up: calibration gave it only zeros"),
    ],
)
def test_small_activations(dtype: torch.dtype, size: float, text: str, symmetric: bool) -> None:
    model = make(dtype)
    model.up.bias.data.zero_()
    batches = [(batch.double() * size).to(dtype) for batch in data()]
    want = model.up(batches[0])
    other = model.down.bias.detach().new_ones(4, 32)
    up, down = model.up, model.down
    both = nn.ModuleDict({"up": up, "down": down})
    both.forward = lambda x: (both["up"](x), both["down"](other))  # type: ignore[method-assign]
    report = {r.name: r for r in run(both, A8W8Static(symmetric=symmetric), batches)}
    assert report["down"].changed and report["up"].changed == (not text)
    assert report["up"].note.startswith(text[4:])
    got = both["up"](batches[0])
    assert (got - want).abs().max() <= 0.03 * want.abs().max()


def test_a_weight_whose_memory_was_freed_is_told() -> None:
    model = make()
    model.down.weight.untyped_storage().resize_(0)
    report = quantize(model, A8W8Dynamic())
    assert [r.changed for r in report] == [True, False]
    assert report[1].note == "the memory of its weight was freed: gather or load the model first"


def test_tensors_in_plain_attributes_count_as_float() -> None:
    model = make()
    model.w, model.v = [torch.ones(64, 64, dtype=F16)], torch.ones(64, 32, dtype=F16)
    model.ints, model.again = torch.ones(4, dtype=torch.int64), model.v
    report = quantize(model, A8W8Dynamic())
    floats = 2 * sum(t.numel() for t in make().parameters())
    total = floats + 2 * (64 * 64 + 64 * 32) + 32
    assert [(left.name, left.kind, left.shape, left.bytes) for left in report.stays_float] == [
        ("w", "Net", (64, 64), 2 * 64 * 64),
        ("v", "Net", (64, 32), 2 * 64 * 32),
    ]
    assert [left.share * total for left in report.stays_float] == pytest.approx([8192, 4096])


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["quantization.quantize _LOCK", "modules.prepare _ONE_AT_A_TIME"])
def test_a_fork_while_another_thread_holds_the_lock(lock: str) -> None:
    output_of(python(*script(f"locks.py fork lq_graph.{lock}"), TORCH_DEVICE_BACKEND_AUTOLOAD="0"))


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_ctrl_c_ends_a_process_that_has_no_handler(inside: bool) -> None:
    done = python(*script(f"locks.py ctrl_c {inside}"), TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "waited\n"), done.stderr


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = make()
    before = state(model)
    batches = data()
    batches[1][0, 0] = float("inf")
    with pytest.raises(LinearQuantValueError, match="the input of up holds NaN or infinity"):
        quantize(model, A8W8Static(), batches)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_calibration_leaves_the_model(error: type[BaseException]) -> None:
    model = make().train()
    before = state(model)

    def batches() -> Iterator[Tensor]:
        yield data()[0]
        assert not model.training
        raise error

    with pytest.raises(error):
        quantize(model, A8W8Static(), batches())
    assert_unchanged(model, before)
    assert model.training and model.up.training


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("at", [0, 1])
def test_failure_while_building_leaves_the_model(
    at: int, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    before = state(model)
    built = []
    build = Job.build

    def failing(job: Job, kept: Any) -> Any:
        built.append(job.name)
        if len(built) == at + 1:
            raise MemoryError
        return build(job, kept)

    monkeypatch.setattr(Job, "build", failing)
    with pytest.raises(MemoryError):
        run(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_failure_while_replacing_is_made_up_for(
    config: Any, at: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = make(), make()
    run(plain, config)
    build, built = Job.build, []

    def failing(job: Job, kept: Any) -> Any:
        built.append(job.name)
        if len(built) == 2 + at + 1:  # each is built once before the first is put in place
            raise error
        return build(job, kept)

    monkeypatch.setattr(Job, "build", failing)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            run(model, config)
    else:
        run(model, config)
    assert torch.equal(model(data()[0]), plain(data()[0]))


def test_ctrl_c_while_replacing_waits_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    put = Job.put_in_place

    def interrupted(job: Job, kept: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        put(job, kept)

    monkeypatch.setattr(Job, "put_in_place", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # torchair has its own
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize(model, A8W8Dynamic())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert isinstance(model.up, QuantizedLinear) and isinstance(model.down, QuantizedLinear)


def test_off_the_main_thread() -> None:
    model = make()
    thread = threading.Thread(target=lambda: quantize(model, A8W8Dynamic()))
    thread.start()
    thread.join()
    assert isinstance(model.down, QuantizedLinear)


def test_memory_peak_is_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the model: one int8 weight, and what one slice of its rows needs."""
    width, layers = 2048, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).half()
    peak = _PeakOfAllocations()
    for layer in model:
        weakref.finalize(layer.weight.untyped_storage(), peak.gone, layer.weight.nbytes)
    del layer
    with peak:
        quantize(model, A8W8Dynamic())
    one = width * width
    # 8 MiB a float weight, 4 MiB an int8 one; a slice is 2**20 values in a few float32 copies
    assert peak.bytes <= one + 16 * 2**20
    assert all(isinstance(layer, QuantizedLinear) for layer in model)


class _PeakOfAllocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes alive at once of the tensors made inside, less those that went."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() in inputs:
                    continue
                size = storage.nbytes()
                self.alive += size
                self.bytes = max(self.bytes, self.alive)
                weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size: int) -> None:
        self.alive -= size


# ---- refusals ----


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (("int8",), LinearQuantTypeError, "config is 'int8'; allowed are A8W8Dynamic"),
        ((A8W8Static(),), LinearQuantValueError, "calibration is absent; A8W8Static needs"),
        ((A8W8Static(), []), LinearQuantValueError, "calibration has no inputs"),
        ((A8W8Static(), torch.ones(2, 64)), LinearQuantTypeError, "calibration is a Tensor; allow"),
        ((A8W8Static(), {"x": 1}), LinearQuantTypeError, "calibration is a dict; allowed is"),
        ((A8W8Static(), 3), LinearQuantTypeError, "calibration is a int; allowed is"),
        ((A8W8Static(), ["text"]), LinearQuantTypeError, "inputs hold a str; allowed are"),
        (
            (A8W8Dynamic(), None, {"example_inputs": torch.ones(2, 64)}),
            LinearQuantTypeError,
            r"example_inputs is a Tensor; allowed is an iterable.*pass \[inputs\]",
        ),
        (
            (A8W8Dynamic(), None, {"example_inputs": []}),
            LinearQuantValueError,
            "example_inputs has no inputs",
        ),
        (
            (A8W8Dynamic(), [1]),
            LinearQuantValueError,
            "calibration is given; A8W8 dynamic",
        ),
        (
            (A8W8Dynamic(output_dtype=F32),),
            LinearQuantValueError,
            "none of the 2 nn.Linear layers can be quantized: 2 x linear_quant: output_dtype is f",
        ),
    ],
)
def test_refusals(args: tuple[Any, ...], error: type[Exception], text: str) -> None:
    model = make()
    before = state(model)
    options = args[2] if len(args) > 2 else {}
    with pytest.raises(error, match=text):
        quantize(model, *args[:2], **options)
    assert_unchanged(model, before)


def test_float32_models_and_lone_layers_are_told_what_to_do() -> None:
    with pytest.raises(LinearQuantValueError, match=r"2 x its weight is float32.*call model.half"):
        quantize(make(F32), A8W8Dynamic())
    with pytest.raises(LinearQuantValueError, match=r"put it in an nn\.Sequential"):
        quantize(nn.Linear(8, 8).half(), A8W8Dynamic())
    with torch.device("meta"):
        model = Net().half()
    with pytest.raises(LinearQuantValueError, match="its weight is on meta"):
        quantize(model, A8W8Dynamic())


@pytest.mark.parametrize(
    ("config", "dtype", "text"),
    [
        (A8W8Dynamic(), F16, "pertoken_scale"),
        (A4W4Dynamic(), F16, "dtype is int32; Atlas inference"),
        (A8W8Static(), BF16, "x is bfloat16; Atlas inference"),
    ],
)
def test_the_product_decides(config: Any, dtype: torch.dtype, text: str) -> None:
    lq_graph.set_product("310P")
    try:
        with pytest.raises(LinearQuantValueError, match=text):
            run(make(dtype), config, data(dtype=dtype))
        run(make(), A8W8Static())
    finally:
        lq_graph.set_product(None)


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


def test_int4_and_int8_outputs_have_no_checkpoint_format(tmp_path: Any) -> None:
    model = make()
    run(model, A4W4Dynamic())
    with pytest.raises(lq_graph.CheckpointError, match="up is int4"):
        lq_graph.save_checkpoint(model, tmp_path)
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
