"""quantize(): the layers that stay float, with the reason."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuant,
    LinearQuantValueError,
    QuantizedLinear,
    quantize,
)
from support.float_models import CONFIGS, data, make, run

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


# ---- layers that stay float ----


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


def test_a_float32_model_is_one_sentence_for_each_reason() -> None:
    model = nn.ModuleDict({"up": nn.Linear(16, 16), "lm_head": nn.Linear(16, 16)})
    with pytest.raises(LinearQuantValueError) as refused:
        quantize(model, A8W8Dynamic())
    assert "model.bfloat16() first; 1 x an output layer" in str(refused.value)


def test_layers_that_must_stay_float_are_named() -> None:
    model = Odd().half()
    model.floats.float()
    report = quantize(model, A4W4Dynamic())
    notes = {r.name: r.note for r in report}
    assert [r.name for r in report if r.changed] == ["plain"]
    for name, text in {
        "tied": "it shares its weight with embedding, which stays float",
        "attention.out_proj": "a NonDynamicallyQuantizableLinear, whose forward may differ",
        "encoder.linear1": "nn.TransformerEncoderLayer reads the weight itself",
        "hooked": "it has forward hooks",
        "floats": "its weight is float32, and LinearQuant takes float16 and bfloat16. What to do: "
        "call model.half() or model.bfloat16() first.",
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
    """Layers whose tensors are read in addition to a call, or instead of one."""

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
    assert report["down"].note == "it shares its weight with unused, which stays float"
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
def test_int8_between_needs_plain_modules(change: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).half()
    change(model)
    x = data()[0]
    want = model(x).float()
    report = run(model, A8W8Static(), [x])
    assert {r.output for r in report} == {"float16"}
    assert (model(x).float() - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.slow
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


def test_the_largest_float_tensors_are_named() -> None:
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
