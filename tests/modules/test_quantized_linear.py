"""QuantizedLinear where nn.Linear was: its weight is read, its input cast, its rows none."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import symbolic_shapes

import lq_graph
from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    LinearQuant,
    LinearQuantTypeError,
    QuantizedLinear,
    quantize,
)
from support import has

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CONFIGS = [A8W8Dynamic(), A4W4Dynamic(), A8W8Static(), A8W8Static(symmetric=True)]


def data(m: int = 8, k: int = 64, dtype: torch.dtype = F16) -> Tensor:
    return (torch.randn(m, k, generator=torch.Generator().manual_seed(1)) + 0.3).to(dtype)


def chain(dtype: torch.dtype = F16, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 32, bias=bias), nn.ReLU(), nn.Linear(32, 16, bias=bias)
    return nn.Sequential(*layers).to(dtype).eval()


def run(model: nn.Module, config: Any, x: Tensor | None = None, **options: Any) -> Any:
    calibration = [data() if x is None else x] if isinstance(config, A8W8Static) else None
    return quantize(model, config, calibration, **options)


def far(config: Any) -> float:
    """How far an output or a weight may be off, of its largest value."""
    return 0.25 if isinstance(config, A4W4Dynamic) else 0.03


def assert_close(got: Tensor, want: Tensor, config: Any) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.detach().cpu().float(), want.detach().cpu().float()
    if want.numel():
        assert (got - want).abs().max() <= far(config) * want.abs().max()


# ---- what is read as weight and bias ----


@pytest.mark.parametrize(("device", "prepared"), [("cpu", False), ("npu", False), ("npu", True)])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_weight_and_bias_are_the_floats(
    config: Any, dtype: torch.dtype, device: str, prepared: bool
) -> None:
    torch.npu.config.allow_internal_format = True
    float_model, model = chain(dtype), chain(dtype).to(device)
    run(model, config, data(dtype=dtype).to(device))
    if prepared:
        lq_graph.use_internal_format_weight(model, int4_nz=not has.int4_nz())
    for old, new in ((float_model[0], model[0]), (float_model[2], model[2])):
        assert (new.in_features, new.out_features) == (old.in_features, old.out_features)
        for name in ("weight", "bias"):
            want, got = getattr(old, name), getattr(new, name)
            assert got.device.type == device and not got.requires_grad
            assert_close(got * 1, want, config)
        new.float_bias = None  # as in a file that does not hold it
        assert_close(new.bias * 1, old.bias, config)
        x = data(3, old.in_features, dtype).to(device)
        assert_close(
            F.linear(x, new.weight, new.bias), F.linear(x.cpu(), old.weight, old.bias), config
        )


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_layer_without_bias(config: Any) -> None:
    model = chain(bias=False)
    run(model, config)
    bias = model[0].bias
    assert bias is None or not bias.any()  # a zero point makes one, which stands for 0


def test_questions_compute_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain()
    run(model, A8W8Dynamic())
    monkeypatch.setattr(QuantizedLinear, "_float_weight", lambda _: pytest.fail("computed"))
    weight = model[0].weight
    assert (weight.dtype, weight.shape, weight.device.type) == (F16, (32, 64), "cpu")
    assert weight.is_floating_point() and weight.numel() == 32 * 64 and hasattr(model[0], "weight")
    assert data().to(weight.dtype).dtype == F16


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.zero_(),
        lambda layer: layer.weight.data.zero_(),
        lambda layer: layer.weight.detach().mul_(2),
        lambda layer: layer.weight[0].zero_(),
        lambda layer: layer.weight.t().fill_(1),
        lambda layer: layer.weight.chunk(2)[0].add_(1),
        lambda layer: layer.weight.__setitem__(0, 1),
        lambda layer: layer.bias.copy_(torch.ones(32)),
        lambda layer: nn.init.normal_(layer.weight),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: setattr(layer.weight, "data", torch.ones(32, 64)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(32, 64))),
        lambda layer: setattr(layer, "bias", None),
    ],
)
def test_writing_is_refused(write: Callable[[Any], Any]) -> None:
    model = chain()
    run(model, A8W8Dynamic())
    before = model[0].weight * 1
    with pytest.raises(LinearQuantTypeError, match=r"was (written to|assigned to).*What to do"):
        write(model[0])
    assert torch.equal(model[0].weight * 1, before)


def test_copies_of_a_weight_are_plain_tensors() -> None:
    model = chain()
    run(model, A8W8Dynamic())
    weight = model[0].weight
    want = weight * 1
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for copied in (copy.deepcopy(weight), torch.load(file), weight.clone(), weight.float().half()):
        assert type(copied) is Tensor and torch.equal(copied, want)
    assert torch.equal(torch.from_numpy(weight.numpy()), want) and weight.tolist() == want.tolist()


class Reads(nn.Module):
    """Multiplies by the weight of a layer that it also calls, and casts to its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x.to(self.a.weight.dtype)), self.a.weight.t())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A4W4Dynamic()], ids=repr)
def test_weights_are_read_in_graphs(config: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = Reads().half()
    want = model(data())
    run(model, config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_close(model(data()), want, config)
    assert torch.equal(compiled(data().float()), model(data()))


# ---- int8 inputs ----


class Cast(nn.Module):
    """A model that casts its input to a dtype before a layer."""

    def __init__(self, dtype_of: Callable[[nn.Module], torch.dtype]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(32, 16)
        self.dtype_of = dtype_of

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.to(self.dtype_of(self.a))).to(self.dtype_of(self.b)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_casts_to_the_dtype_of_a_weight(config: Any, compiled: bool) -> None:
    torch.manual_seed(0)
    model = Cast(lambda layer: layer.weight.dtype).half()
    want = model(data())
    assert all(r.changed for r in run(model, config))
    torch._dynamo.reset()
    called = torch.compile(model, backend="eager") if compiled else model
    assert_close(called(data().float()), want, config)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_casts_to_int8_are_refused(config: Any, compiled: bool) -> None:
    model = Cast(lambda layer: next(layer.parameters()).dtype).half()
    run(model, config)
    torch._dynamo.reset()
    called = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(
        Exception, match=r"x is int(8, but this layer does not|32; Atlas A2 allows)"
    ):
        called(data())


def _state_dict(model: nn.Module) -> nn.Module:
    other = chain()
    run(other, A8W8Static(), data() * 2)
    other.load_state_dict(model.state_dict())
    return other


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _state_dict, _saved],
    ids=["deepcopy", "pickle", "state dict", "torch.save"],
)
def test_a_layer_that_is_fed_int8_knows_it(way: Callable[[nn.Module], Any]) -> None:
    model = chain()
    run(model, A8W8Static())
    assert [model[0].takes_int8, model[2].takes_int8] == [False, True]
    other = way(model)
    assert torch.equal(other(data()), model(data()))
    torch._dynamo.reset()
    assert torch.equal(torch.compile(other, backend="eager")(data()), model(data()))
    with pytest.raises(LinearQuantTypeError, match="x is int8, but this layer does not take int8"):
        other(data().to(torch.int8))


def test_a_chain_made_by_hand_says_that_it_takes_int8() -> None:
    linear = LinearQuant(16, 16, output_dtype=F16)
    one = torch.ones(1, dtype=F32)
    x = torch.ones(2, 16, dtype=torch.int8)
    with pytest.raises(LinearQuantTypeError, match="takes_int8=True"):
        QuantizedLinear(linear, one)(x)
    layer = QuantizedLinear(linear, one, takes_int8=True)
    assert torch.equal(layer(x), linear(x))


# ---- rows ----


class Experts(nn.Module):
    """Each of two layers takes the rows that it is given; perhaps none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        out = x.new_zeros(x.shape[0], 32)
        for layer, rows in ((self.a, chosen), (self.b, ~chosen)):
            index = rows.nonzero().squeeze(-1)
            out = out.index_add(0, index, layer(x[index]))
        return out


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64), (64,), (1, 64), (2, 3, 64)])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_shapes_are_those_of_linear(config: Any, shape: tuple[int, ...], device: str) -> None:
    float_model, model = chain(), chain()
    run(model, config)
    x = torch.full(shape, 0.5, dtype=F16)
    got = model.to(device)(x.to(device))
    assert got.device.type == device and got.shape == float_model(x).shape and got.dtype == F16
    if x.numel():
        assert_close(got, float_model(x), config)
    else:
        with pytest.raises(lq_graph.LinearQuantError):  # no rows of another k are none either
            model(torch.ones(0, 60, dtype=F16, device=device))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "backend", "unbacked"),
    [
        (A8W8Dynamic(), "eager", False),
        (A8W8Dynamic(), "inductor", True),
        (A8W8Static(), "eager", True),
        (A4W4Dynamic(), "aot_eager", True),
    ],
    ids=str,
)
def test_experts_without_a_token(config: Any, backend: str, unbacked: bool) -> None:
    has.need_inductor(backend)
    torch.manual_seed(0)
    model = Experts().half()
    inputs = [data(), data().abs(), -data().abs(), data()[:1], data()[:0]]
    want = [model(x) for x in inputs]
    run(model, config)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=unbacked), torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=unbacked)
        for x, wanted in zip(inputs, want, strict=True):
            assert_close(model(x), wanted, A4W4Dynamic())  # static: beyond what calibration saw
            assert torch.equal(compiled(x), model(x))


def test_no_rows_in_a_dynamic_graph_on_the_npu() -> None:
    import torchair

    model = chain().npu()
    run(model, A8W8Dynamic())
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for m in (5, 0, 3):
            x = data(m).npu()
            assert torch.equal(compiled(x), model(x))


# ---- autocast ----


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_static_layer_under_autocast(dtype: torch.dtype) -> None:
    model = chain(dtype)
    run(model, A8W8Static(), data(dtype=dtype))
    x = data(dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model(x.float()), model(x))
    with pytest.raises(LinearQuantTypeError, match="x is float32; this static layer was made for"):
        model(x.float())


# ---- defaults of the process ----


@pytest.mark.parametrize("config", [*CONFIGS, A8W8Static(int8_between=False)], ids=repr)
@pytest.mark.parametrize("default", [BF16, F16, torch.float64, "meta", "npu", "inference"], ids=str)
def test_defaults_change_nothing(default: Any, config: Any) -> None:
    plain, model, x = chain(), chain(), data()
    run(plain, config)
    if isinstance(default, torch.dtype):
        torch.set_default_dtype(default)
    try:
        with (
            torch.inference_mode(default == "inference"),
            torch.device(default if default in ("meta", "npu") else "cpu"),
        ):
            run(model, config, x)
            got = model(x)
            weight = model[0].weight * 1
    finally:
        torch.set_default_dtype(F32)
    assert torch.equal(got, plain(x)) and torch.equal(weight, plain[0].weight * 1)
    state, wanted = model.state_dict(), plain.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name
        assert not tensor.is_inference()


# ---- what is written after construction ----


def _assign(layer: QuantizedLinear, scale: Tensor, offset: Tensor) -> None:
    layer.input_scale, layer.input_offset = scale, offset


def _data(layer: QuantizedLinear, scale: Tensor, offset: Tensor) -> None:
    for _ in range(3):  # freed memory is not treated as the old tensor
        layer.input_scale.data, layer.input_offset.data = scale.clone(), offset.clone()


def _copy(layer: QuantizedLinear, scale: Tensor, offset: Tensor) -> None:
    layer.input_scale.copy_(scale)
    layer.input_offset.copy_(offset)


def _load(layer: QuantizedLinear, scale: Tensor, offset: Tensor) -> None:
    layer.load_state_dict({"input_scale": scale, "input_offset": offset}, strict=False)


@pytest.mark.parametrize("write", [_assign, _data, _copy, _load])
@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: m.npu().cpu()], ids=["copied", "moved"]
)
def test_a_scale_written_afterwards_is_the_one_read(write: Any, change: Any) -> None:
    model, x = chain(), data()
    run(model, A8W8Static(int8_between=False))
    layer = change(model)[0]
    scale, offset = layer.input_scale * 2, layer.input_offset + 3
    old = layer(x)
    write(layer, scale, offset)
    want = QuantizedLinear(layer.linear, scale, offset, input_dtype=F16)(x)
    assert torch.equal(layer(x), want) and not torch.equal(old, want)


@pytest.mark.parametrize("write", [_assign, _load])
def test_a_scale_written_after_compiling_is_the_one_read(write: Any) -> None:
    model, x = chain(), data()
    run(model, A8W8Static())
    compiled = torch.compile(model, backend="eager")
    old = compiled(x)
    write(model[0], model[0].input_scale * 2, model[0].input_offset + 3)
    assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), old)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_state_dict_with_a_scale_that_is_none_is_refused(bad: float) -> None:
    model, x = chain(), data()
    run(model, A8W8Static())
    want, state = model(x), model.state_dict()
    state["0.input_scale"] = torch.tensor([bad])
    with pytest.raises(RuntimeError, match=r"0\.input_scale is \[.*a scale is finite and above 0"):
        model.load_state_dict(state)
    assert torch.equal(model(x), want)


def test_a_weight_counts_as_a_parameter() -> None:
    model = chain()
    run(model, A8W8Dynamic())
    assert isinstance(model[0].weight, nn.Parameter) and isinstance(model[0].bias, nn.Parameter)
    names = {name for name, _ in model.named_parameters()} | set(model.state_dict())
    assert "0.linear.weight" in names and names.isdisjoint({"0.weight", "0.bias"})
    copied = copy.deepcopy(model[0].weight)
    assert type(copied) is Tensor and torch.equal(copied, model[0].weight)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_graph_has_no_row_of_zeros(dynamic: bool) -> None:
    """Only an export, or a call without rows, needs the row that forward appends."""
    if not hasattr(symbolic_shapes, "guard_or_false"):
        pytest.skip("torch 2.7 does not tell a strict export from another trace of Dynamo")
    model, x = chain(), data()
    run(model, A8W8Dynamic())
    codes = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        codes.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=backend, dynamic=dynamic)(x), model(x))
    assert codes and not [code for code in codes if "cat(" in code]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(config: Any, strict: bool) -> None:
    model, x = chain(), data()
    run(model, config)
    shapes = ({0: torch.export.Dim("batch", max=64) if strict else torch.export.Dim.AUTO},)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict).module()
        for rows in (x, torch.cat([x, x]), x[:1], x[:0]):
            assert torch.equal(exported(rows), model(rows))


def test_autocast_leaves_float64() -> None:
    model, x = chain(), data()
    run(model, A8W8Static())
    with torch.autocast("cpu", F16), pytest.raises(LinearQuantTypeError, match="x is float64"):
        model(x.double())
