"""use_internal_format_weight with an example: merged and prepared in one call."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

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
)
from lq_graph.backends.npu import format_of
from lq_graph.modules import prepare as preparing
from lq_graph.modules.fusion_options import FusionOptions, fusion
from lq_graph.rules.tables import FRACTAL_NZ, ND
from support import has
from support.lowering import MATMUL, lower
from support.shared_input import Attention, inputs, pair, quantized

prepare = lq_graph.use_internal_format_weight
merges = pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")


@pytest.fixture(autouse=True)
def internal_formats() -> None:
    torch.npu.config.allow_internal_format = True
    torch._dynamo.reset()


def from_a_checkpoint(model: Any, folder: Path) -> Any:
    """A model of other weights into which those of `model` were loaded."""
    lq_graph.save_checkpoint(model, folder)
    other = Attention(bias=True).half()
    lq_graph.load_checkpoint(other, folder)
    return other


@merges
@pytest.mark.parametrize(
    ("source", "config"),
    [
        *(("quantize", config) for config in (A8W8Dynamic(), A8W8Static(), A4W4Dynamic())),
        *(("load_checkpoint", config) for config in (A8W8Dynamic(), A8W8Static())),
    ],
    ids=str,
)
def test_one_call(source: str, config: Any, tmp_path: Path) -> None:
    plain, model = pair(config, bias=True)
    if source == "load_checkpoint":
        model = from_a_checkpoint(model, tmp_path)
    report = prepare(model.npu(), example=inputs())
    assert [group.names for group in report.merged] == [("q", "k", "v")]
    assert [one.name for one in report] == ["q.linear.merged", "out.linear"]
    assert all(one.changed or one.note for one in report)
    int4 = config == A4W4Dynamic()
    assert format_of(model.q.linear.merged.weight) == (ND if int4 else FRACTAL_NZ)
    with torch.no_grad():
        want = plain(inputs())
        assert torch.equal(model(inputs().npu()).cpu(), want)
        got, graph = lower(model, inputs().npu())
    assert torch.equal(got.cpu(), want)
    assert Counter(graph.ops())[MATMUL] == 2


@merges
@pytest.mark.parametrize(
    "example",
    [inputs(), (inputs(),), [inputs()], {"x": inputs()}, {"x": inputs().npu()}],
    ids=["tensor", "tuple", "list", "dict", "on npu"],
)
def test_examples(example: Any) -> None:
    """On the CPU too, for a model on npu."""
    plain, model = pair(A8W8Dynamic())
    report = prepare(model.npu(), example=example)
    assert len(report.merged) == 1
    assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))


@merges
def test_twice_before_and_after() -> None:
    plain, model = pair(A8W8Static())
    model.npu()
    assert prepare(model).merged is None
    first = prepare(model, example=inputs())
    assert [group.changed for group in first.merged] == [True]
    again = prepare(model, example=inputs())
    assert [group.changed for group in again.merged] == [False]
    assert not any(one.changed for one in again)
    assert model.q.linear.merged.scale.dtype == torch.int64
    assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))


@merges
@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (FusionOptions(enabled=False), True),
        (FusionOptions(off=frozenset({"equal_quantizations", "equal_calls"})), True),
        (FusionOptions(off=frozenset({"equal_quantizations"})), False),
        (FusionOptions(exact=True), False),
    ],
    ids=str,
)
def test_a_graph_with_the_product_for_each_layer_is_not_silent(
    options: FusionOptions, warned: bool
) -> None:
    plain, model = pair(A8W8Dynamic())
    prepare(model.npu(), example=inputs())
    match = "1 products of merged layers are computed once for each layer, because equal_q"
    expected = pytest.warns(UserWarning, match=match) if warned else nullcontext()
    with expected, fusion(options), torch.no_grad():
        got, graph = lower(model, inputs().npu())
    assert Counter(graph.ops())[MATMUL] == (4 if warned else 2)
    assert torch.equal(got.cpu(), plain(inputs()))


@merges
def test_report() -> None:
    model = quantized(Attention(), A8W8Dynamic()).npu()
    model.v.register_forward_hook(lambda *_: None)
    assert str(prepare(model, example=inputs())).splitlines() == [
        "layers                 k  n",
        "q, k    A8W8 dynamic  64  40 + 24",
        "left alone  why",
        "v           it has forward hooks, which would be lost",
        "layers merged: 2 into 1; left alone: 1",
        "module           before                  after                           bytes",
        "q.linear.merged  int8 ND, scale float32  int8 FRACTAL_NZ, scale float32  4,096",
        "v.linear         int8 ND, scale float32  int8 FRACTAL_NZ, scale float32  1,024",
        "out.linear       int8 ND, scale float32  int8 FRACTAL_NZ, scale float32  6,144",
        "3 layers, 3 changed, 11,264 bytes of weights",
    ]


def state_of(model: nn.Module) -> list[Any]:
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.dtype, format_of(p)) for name, p in model.named_parameters()]
    return [modules, parameters, {n: t.cpu().tolist() for n, t in model.state_dict().items()}]


@pytest.mark.parametrize(
    ("example", "error", "match"),
    [
        ("text", LinearQuantTypeError, "use_internal_format_weight: example is a str; allowed are"),
        (torch.ones(2, 3).half(), LinearQuantValueError, "differ in k"),
    ],
    ids=["str", "other k"],
)
def test_an_example_that_does_not_fit(example: Any, error: type[Exception], match: str) -> None:
    model = quantized(Attention(), A8W8Dynamic()).npu()
    before = state_of(model)
    with pytest.raises(error, match=match):
        prepare(model, example=example)
    assert state_of(model) == before


def test_a_model_on_the_cpu_does_not_run() -> None:
    model = quantized(Attention(), A8W8Dynamic())
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(LinearQuantValueError, match=r"q.linear is on cpu; .* call model.npu\(\)"):
        prepare(model, example=inputs())


@merges
@pytest.mark.parametrize("step", range(3))
def test_a_failure_after_merging_is_undone(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step that fails is in the merged layer, the last after all layers."""
    plain, model = pair(A8W8Static())
    model.npu()
    before, calls = state_of(model), 0
    cast, others = preparing._cast, preparing._others

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step + 1:
            raise RuntimeError("out of memory")
        return cast(*args) if len(args) == 2 else others(*args)

    monkeypatch.setattr(preparing, "_cast", failing)
    monkeypatch.setattr(preparing, "_others", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        prepare(model, example=inputs())
    monkeypatch.undo()
    assert calls > step
    assert state_of(model) == before and type(model.q.linear) is LinearQuant
    assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))
    assert len(prepare(model, example=inputs()).merged) == 1


@pytest.mark.skipif(has.HAS_PASSES, reason="torchair has register_replacement")
def test_layers_stay_apart_where_each_would_compute_the_product() -> None:
    plain, model = pair(A8W8Dynamic())
    report = prepare(model.npu(), example=inputs())
    assert not report.merged and [one.name for one in report.merged.left_alone] == [*"qkv"]
    for one in report.merged.left_alone:
        assert "runs no passes of other libraries" in one.why
    assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))


class Tied(nn.Module):
    """A head whose weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(32, 64), nn.Linear(64, 64)
        self.other, self.head = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.other(self.up(self.embed(tokens))))
        return out


def test_a_heads_weight_that_is_the_embeddings_stays_nd() -> None:
    model = Tied().half()
    lq_graph.quantize(model, A8W8Dynamic(), filter_fn=lambda _, name: name == "up")
    plain = copy.deepcopy(model)
    report = prepare(model.npu(), example=torch.arange(4))
    assert format_of(model.head.weight) == ND and format_of(model.other.weight) == FRACTAL_NZ
    last = report[-1]
    assert (last.name, last.before, last.note) == (
        "head", "float16 ND", "embed has the same weight",
    )  # fmt: skip
    assert not last.changed and model.head.weight is model.embed.weight
    tokens = torch.arange(4)
    torch.testing.assert_close(model(tokens.npu()).cpu(), plain(tokens), rtol=2**-9, atol=2**-9)


@merges
@pytest.mark.skipif(bool(has.int4_nz()), reason="torch_npu makes no int4 blocks here")
@pytest.mark.parametrize("merged_first", [True, False])
def test_int4_in_fractal_nz(merged_first: bool) -> None:
    """n of q and k are no multiples of a block's 16 rows."""
    sizes = {"q": 40, "k": 24, "v": 8}
    plain, model = pair(A4W4Dynamic(), bias=True, sizes=sizes)
    model.npu()
    if not merged_first:
        prepare(model, int4_nz=True)
    report = prepare(model, example=inputs(), int4_nz=True)
    assert [one.changed for one in report] == [merged_first] * 2
    assert format_of(model.q.linear.merged.weight) == FRACTAL_NZ
    with torch.no_grad():
        got, graph = lower(model, inputs().npu())
    assert Counter(graph.ops())[MATMUL] == 2
    assert torch.equal(got.cpu(), plain(inputs()))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), tensor), name
