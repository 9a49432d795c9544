"""use_internal_format_weight and what it promises: folded, FRACTAL_NZ, once, all or nothing, and
files that go from any model to any other."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch_npu
import torchair
from torch import nn

import lq_graph
from lq_graph import LinearQuant, LinearQuantTypeError, LinearQuantValueError
from lq_graph.backends.npu import format_of
from lq_graph.rules.tables import FRACTAL_NZ, ND
from support import cases, has
from support.cases import BF16, F16, F32, I8, I32, I64, ROW_CASES, Case
from support.layers import (
    LinearA8W8Quant,
    assert_same,
    module_for,
    snapshot,
    vendor_for,
)
from support.lowering import MATMUL, lower

prepare = lq_graph.use_internal_format_weight


@pytest.fixture(autouse=True)
def internal_formats():
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = True


# ---- what it does ----


@pytest.mark.parametrize("kind", ["ours", "vendor"])
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_outputs_before_and_after_are_equal(case: Case, kind: str) -> None:
    inputs = cases.make(case)
    layer = (module_for(inputs) if kind == "ours" else vendor_for(inputs)).npu()
    x1 = inputs["x1"].npu()
    cases.assert_equal(layer(x1), inputs)
    (prepared,) = prepare(layer)
    int4 = case.x == I32
    assert format_of(layer.weight) == (ND if int4 else FRACTAL_NZ)
    folds = case.scale == F32 and (case.output == I8 or (case.output == F16 and not case.pertoken))
    assert layer.scale.dtype == (I64 if folds else case.scale)
    assert prepared.changed == (folds or not int4)
    cases.assert_equal(layer(x1), inputs)


def test_a_weight_that_an_embedding_reads_stays_nd() -> None:
    """A head that is tied to the embedding; a Linear of two names is cast."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.again = nn.Linear(16, 16, bias=False)
            self.twice = nn.Linear(16, 16, bias=False)
            self.twice.weight = self.again.weight
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.twice(self.again(self.embed(ids))))

    model = Tied().half().npu()
    ids = torch.arange(32).npu()
    want = model(ids)
    for _ in range(2):
        (left,) = prepare(model)
        assert (left.name, left.changed) == ("head", False)
        assert left.note == "left: embed, no Linear, reads the weight too"
        assert format_of(model.head.weight) == format_of(model.embed.weight) == ND
        assert format_of(model.twice.weight) == FRACTAL_NZ
        assert torch.equal(model(ids), want)


@pytest.mark.parametrize(
    ("case", "int4_nz", "ops"),
    [
        (Case(offset=True, bias=I32), False, [MATMUL]),
        (Case(m=1, k=64, n=48, offset=True, bias=I32), False, [MATMUL]),
        (Case(output=F16), False, [MATMUL]),
        (Case(output=BF16, bias=BF16, pertoken=True), False, [MATMUL]),
        (Case(x=I32, output=F16), False, ["Bitcast", "Reshape"] * 2 + [MATMUL]),
        (Case(k=1), False, [MATMUL]),
        (Case(n=1), False, [MATMUL]),
    ],
    ids=str,
)
def test_prepared_graph(case: Case, int4_nz: bool, ops: list[str]) -> None:
    inputs = cases.make(case)
    layer = module_for(inputs).npu()
    prepare(layer, int4_nz=int4_nz)
    out, graph = lower(layer, inputs["x1"].npu())
    cases.assert_equal(out, inputs)
    assert graph.ops() == ops
    if case.x == I8 and 1 not in (case.n, case.k):
        weight = graph.compute[-1].inputs[1]
        assert (weight.format, weight.shape) == ("FRACTAL_NZ", (case.n, case.k))


def test_int4_in_fractal_nz_where_asked() -> None:
    if why := has.int4_nz():
        pytest.skip(why)
    inputs = cases.make(Case(x=I32, k=256, n=48, output=F16))
    layer = module_for(inputs).npu()
    x1 = inputs["x1"].npu()
    (prepared,) = prepare(layer, int4_nz=True)
    assert (format_of(layer.weight), prepared.note) == (FRACTAL_NZ, "")
    assert prepared.after == "int32 (int4) FRACTAL_NZ, scale int64"
    with pytest.raises(RuntimeError, match="aclnnQuantMatmulV5: int4 x2 is FRACTAL_NZ"):
        layer(x1)  # a graph takes it: test_prepared_graph
    (back,) = prepare(layer)
    assert format_of(layer.weight) == ND and "the CANN version has the kernels" in back.note
    assert torch.equal(layer.weight.cpu(), inputs["weight"])
    cases.assert_equal(layer(x1), inputs)


def test_int4_in_fractal_nz_is_refused_where_torch_npu_makes_other_blocks(monkeypatch) -> None:
    """Some versions refuse customize_dtype, some ignore it; here a cast that ignores it."""
    if not has.int4_nz():
        cast = torch_npu.npu_format_cast
        plain = lambda tensor, to, customize_dtype=None: cast(tensor, to)  # noqa: E731
        monkeypatch.setattr(torch_npu, "npu_format_cast", plain)
    model = Mixed().npu()
    before = snapshot(model)
    refused = r"weight: int4: int4_nz=True; torch_npu .* cannot cast int4 .*: leave int4_nz out"
    with pytest.raises(LinearQuantValueError, match=refused):
        prepare(model, int4_nz=True)
    assert_same(model, before)
    prepare(model)


@pytest.mark.parametrize(
    ("case", "note"),
    [
        (Case(n=1), "n or k is 1"),
        (Case(k=1), "n or k is 1"),
        (Case(x=I32, output=F16), "the CANN version has the kernels"),
    ],
    ids=str,
)
def test_weights_that_stay_nd(case: Case, note: str) -> None:
    inputs = cases.make(case)
    layer = module_for(inputs).npu()
    (prepared,) = prepare(layer)
    assert note in prepared.note and format_of(layer.weight) == ND
    cases.assert_equal(layer(inputs["x1"].npu()), inputs)


def test_batch_bias_says_that_the_input_has_a_batch() -> None:
    inputs = cases.make(Case(batch=(2,), weight_batch=(2,), bias=I32, batch_bias=True))
    inputs["weight"] = inputs["weight"][:1].contiguous()
    layer = module_for(inputs).npu()
    prepare(layer)
    assert layer.scale.dtype == I64
    cases.assert_equal(layer(inputs["x1"].npu()), inputs)


def test_without_internal_formats_it_warns_and_stays_nd() -> None:
    torch.npu.config.allow_internal_format = False
    inputs = cases.make(Case())
    layer = module_for(inputs).npu()
    with pytest.warns(UserWarning, match=r"allow_internal_format is off. What to do: set it to T"):
        (prepared,) = prepare(layer)
    assert format_of(layer.weight) == ND and "is off" in prepared.note
    cases.assert_equal(layer(inputs["x1"].npu()), inputs)


class Mixed(nn.Module):
    """Our layers, the vendor's, and what torchair prepares itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = module_for(cases.make(Case(offset=True, bias=I32)))
        self.int4 = module_for(cases.make(Case(x=I32, output=F16)))
        self.vendor = vendor_for(cases.make(Case(output=F16, bias=I32)))
        self.vendor_int4 = vendor_for(cases.make(Case(x=I32, output=F16)))
        self.rest = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48))
        self.rest.half()


def test_report_prints_as_a_table() -> None:
    report = prepare(Mixed().npu())
    lines = str(report).splitlines()
    text = " ".join(str(report).split())
    names = ["module", "ours", "int4", "vendor", "vendor_int4"]
    firsts = [line.split("  ")[0] for line in lines[:-1] if not line.startswith(" ")]
    assert firsts == names and max(map(len, lines)) <= 80
    total = 2 * 24 * 5 * 4 + 2 * 64 * 32  # int4 as it is; int8 padded to blocks of 16 by 32
    assert lines[-1] == f"4 layers, 4 changed, {total:,} bytes of weights"
    assert "ours int8 ND, scale float32 int8 FRACTAL_NZ, scale int64 " in text
    assert "int4_nz=True casts it, where the CANN version has the kernels" in text
    assert str(prepare(nn.Linear(4, 4).npu())) == "no LinearQuant in this model"


def test_torchair_prepares_the_rest() -> None:
    model = Mixed().npu()
    prepare(model)
    assert format_of(model.rest[0].weight) == FRACTAL_NZ
    assert format_of(model.rest[1].weight) == ND


# ---- once ----


def test_twice_is_once() -> None:
    model = Mixed().npu()
    prepare(model)
    once = snapshot(model)
    again = prepare(model)
    assert_same(model, once)
    assert not any(prepared.changed for prepared in again)


def test_with_torchairs_function_before_or_after() -> None:
    torchairs = torchair.experimental.inference.use_internal_format_weight
    plain, before, after = (Mixed().npu() for _ in range(3))
    for model, other in ((before, plain), (after, plain)):
        model.load_state_dict(other.state_dict())
    prepare(plain)
    torchairs(before)
    prepare(before)
    prepare(after)
    torchairs(after)
    prepare(after)  # torchair casts the vendor's int4 weight too; ours brings it back
    assert_same(before, snapshot(plain))
    assert_same(after, snapshot(plain))


def test_a8w8_module_is_folded_only_where_its_row_reads_a_packed_scale() -> None:
    with pytest.warns(FutureWarning):
        model = nn.ModuleList(
            vendor_for(cases.make(case), LinearA8W8Quant)
            for case in (Case(offset=True), Case(output=BF16), Case(output=F16, pertoken=True))
        ).npu()
    prepare(model)
    assert [layer.scale.dtype for layer in model] == [I64, F32, F32]
    for layer, case in zip(model, (Case(offset=True), Case(output=BF16)), strict=False):
        inputs = cases.make(case)
        cases.assert_equal(layer(inputs["x1"].npu()), inputs)


# ---- all or nothing ----


@pytest.mark.parametrize("step", range(7))  # 4 folds, 3 casts
def test_a_failure_at_any_step_is_undone(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed().npu()
    before = snapshot(model)
    x1 = cases.make(Case(offset=True, bias=I32))["x1"].npu()
    out = model.ours(x1)
    steps = 0

    def failing(function):
        def call(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == step + 1:
                raise RuntimeError("out of memory")
            return function(*args, **kwargs)

        return call

    # each cast and each fold is a step
    monkeypatch.setattr(torch_npu, "npu_format_cast", failing(torch_npu.npu_format_cast))
    folds = failing(lq_graph.trans_quant_param)
    monkeypatch.setattr("lq_graph.modules.prepare.trans_quant_param", folds)
    monkeypatch.setattr("lq_graph.modules.linear_quant.trans_quant_param", folds)
    with pytest.raises(RuntimeError, match="out of memory"):
        prepare(model)
    monkeypatch.undo()
    assert_same(model, before)
    assert torch.equal(model.ours(x1).cpu(), out.cpu())
    prepare(model)
    assert model.ours.scale.dtype == I64


def spoil_dtype(model: Mixed) -> None:
    model.vendor.scale.data = model.vendor.scale.data.half()


def spoil_shape(model: Mixed) -> None:
    model.int4.scale.data = torch.ones(3).npu()


def spoil_values(model: Mixed) -> None:
    model.vendor_int4.scale.data[2] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (spoil_dtype, LinearQuantTypeError, "weight: vendor: linear_quant: scale is float16"),
        (spoil_shape, LinearQuantValueError, "weight: int4: linear_quant: scale has 3 values"),
        (spoil_values, LinearQuantValueError, "weight: vendor_int4: .* scale holds NaN"),
        (nn.Module.cpu, LinearQuantValueError, r"ours is on cpu; .*call model\.npu\(\) first"),
    ],
    ids=["dtype", "shape", "nan", "device"],
)
def test_a_layer_that_cannot_be_prepared_leaves_the_model_unchanged(spoil, error, match) -> None:
    model = Mixed().npu()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        prepare(model)
    for name, (dtype, acl_format, values) in snapshot(model).items():
        assert (dtype, acl_format) == before[name][:2]
        assert torch.equal(values.nan_to_num(), before[name][2].nan_to_num())


def test_a_layers_memory_is_the_most_it_takes() -> None:
    # 24 weights of 1 MiB: what was allocated at the peak, beside the model
    layers = nn.Sequential(*(LinearQuant(1024, 1024, bias=False) for _ in range(24))).npu()
    torch.npu.synchronize()
    base = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    prepare(layers)
    assert torch.npu.max_memory_allocated() - base <= 1.5 * 2**20


# ---- files ----


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict through a file, as another machine reads it."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu")


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_state_dicts_go_from_any_model_to_any_other(case: Case) -> None:
    inputs = cases.make(case)
    x1 = inputs["x1"].npu()
    original = module_for(inputs)
    first = saved(original)
    plain, prepared = (module_for(inputs).npu() for _ in range(2))
    prepare(prepared)
    # what is written does not depend on the preparation
    for state in (saved(plain), saved(prepared)):
        assert state.keys() == first.keys()
        for name, tensor in first.items():
            assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    # a file of other values goes into either
    other = cases.make(case, seed=1)
    file = saved(module_for(other))
    other["x1"] = inputs["x1"]
    formats = format_of(prepared.weight), prepared.scale.dtype
    for layer in (plain, prepared, original):
        layer.load_state_dict(file)
        cases.assert_equal(layer(x1 if layer is not original else inputs["x1"]), other)
        for name, tensor in saved(layer).items():
            assert torch.equal(tensor, file[name]), name
    assert (format_of(prepared.weight), prepared.scale.dtype) == formats
    # and the state of a prepared model, from device to device
    plain.load_state_dict(prepared.state_dict())
    cases.assert_equal(plain(x1), other)


def test_a_scale_assigned_after_folding_is_saved() -> None:
    layer = module_for(cases.make(Case(offset=True))).npu()
    prepare(layer)
    words = lq_graph.trans_quant_param(torch.rand(24).npu())
    layer.scale.data = words
    assert torch.equal(saved(layer)["scale"], words.cpu())


def test_loading_what_cannot_be_folded_is_refused_unchanged() -> None:
    layer = module_for(cases.make(Case(offset=True))).npu()
    prepare(layer)
    before, state = snapshot(layer), saved(layer)
    state["scale"] = torch.full((24,), float("nan"))
    with pytest.raises(RuntimeError, match="scale: trans_quant_param: scale holds NaN"):
        layer.load_state_dict(state)
    assert_same(layer, before)


def test_copies_of_a_prepared_layer_are_prepared() -> None:
    inputs = cases.make(Case(offset=True, bias=I32))
    layer = module_for(inputs).npu()
    prepare(layer)
    for other in (copy.deepcopy(layer), layer.cpu()):
        device = other.weight.device
        cases.assert_equal(other(inputs["x1"].to(device)), inputs)
        assert torch.equal(saved(other)["scale"], inputs["scale"])
