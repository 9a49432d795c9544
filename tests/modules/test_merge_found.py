"""merge: which layers it finds, which it leaves alone and why, and that it is all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static, LinearQuant, QuantizedLinear
from lq_graph.backends.npu import format_of
from lq_graph.modules import merge as merging
from lq_graph.rules.tables import FRACTAL_NZ, ND
from support import has
from support.shared_input import Attention, K, inputs, pair, quantized

pytestmark = pytest.mark.skipif(not has.HAS_PASSES, reason="torchair has no register_replacement")

F16, BF16 = torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def internal_formats() -> None:
    torch.npu.config.allow_internal_format = True


def found(report: Any) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The groups, and the reasons of the layers left alone."""
    return [group.names for group in report], {one.name: one.why for one in report.left_alone}


# ---- what is found ----


class Two(nn.Module):
    """Two layers, called as a function says."""

    def __init__(self, call: Callable[[nn.Module, nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, 16), nn.Linear(K, 32)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.a, self.b, x)


def written(a: nn.Module, b: nn.Module, x: Tensor) -> Any:
    x = x.clone()
    y = a(x)
    x += 1
    return y, b(x)


def written_through_a_view(a: nn.Module, b: nn.Module, x: Tensor) -> Any:
    x = x.clone()
    y = a(x)
    x[0, 0] = 3
    return y, b(x)


def reused_memory(a: nn.Module, b: nn.Module, x: Tensor) -> Any:
    return [layer(x * 2) for layer in (a, b)]


TOGETHER: dict[str, Any] = {
    "one tensor": lambda a, b, x: (a(x), b(x)),
    "by keyword": lambda a, b, x: (a(input=x), b(x)),
    "in a loop": lambda a, b, x: [layer(y) for y in (x, x * 2) for layer in (b, a)],
    "equal views": lambda a, b, x: (a(x[0]), a(x[0]), b(x[0]), b(x[0])),
}
APART: dict[str, Any] = {
    "written between": written,
    "written through a view": written_through_a_view,
    "other memory": lambda a, b, x: (a(x), b(x.clone())),
    "memory used again": reused_memory,
    "other views": lambda a, b, x: (a(x[:1]), b(x[1:])),
    "one after the other": lambda a, b, x: b(torch.cat([a(x)] * 4, -1)),
}


@pytest.mark.parametrize("call", TOGETHER.values(), ids=TOGETHER)
def test_layers_that_read_one_tensor(call: Any) -> None:
    plain = quantized(Two(call), A8W8Dynamic())
    model = copy.deepcopy(plain)
    (group,) = lq_graph.merge(model, inputs())
    assert {*group.names} == {"a", "b"}
    for got, want in zip(model(inputs()), plain(inputs()), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("call", APART.values(), ids=APART)
def test_layers_that_read_different_tensors(call: Any) -> None:
    model = quantized(Two(call), A8W8Dynamic())
    assert found(lq_graph.merge(model, inputs())) == ([], {})


def test_layers_that_part_in_some_call() -> None:
    model = quantized(Two(lambda a, b, x: (a(x), b(x), b(x * 2))), A8W8Dynamic())
    groups, why = found(lq_graph.merge(model, inputs()))
    assert not groups
    assert why == {
        "a": "it reads a tensor of b, but not in the same calls",
        "b": "it reads a tensor of a, but not in the same calls",
    }


def test_a_layer_that_the_run_does_not_call() -> None:
    model = quantized(Two(lambda a, b, x: a(x)), A8W8Dynamic())
    assert found(lq_graph.merge(model, inputs())) == ([], {"b": "the run did not call it"})


def test_layers_that_are_called_often_are_merged_once() -> None:
    block = Attention()
    plain = quantized(nn.Sequential(block, block), A8W8Dynamic())
    model = copy.deepcopy(plain)
    assert found(lq_graph.merge(model, inputs())) == ([("0.q", "0.k", "0.v")], {})
    assert torch.equal(model(inputs()), plain(inputs()))


def test_the_run_leaves_nothing_behind() -> None:
    model = quantized(nn.Sequential(Attention(), nn.Dropout()), A8W8Dynamic())
    model.train()
    hooks: list[Any] = []
    model.register_forward_hook(lambda *_: hooks.append(torch.is_grad_enabled()))
    lq_graph.merge(model, inputs())
    assert hooks == [False] and torch.is_grad_enabled()
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_under_inference_mode_and_with_compiled_parts() -> None:
    plain, model = pair(A8W8Dynamic())
    model.compile(backend="eager")
    with torch.inference_mode():
        lq_graph.merge(model, inputs())
    assert not model.q.linear.merged.weight.is_inference()
    assert torch.equal(model(inputs()), plain(inputs()))


# ---- what is left alone ----


def other_dtype(model: Any) -> None:
    model.v.linear.output_dtype = BF16


def own_bias(model: Any) -> None:
    model.v.linear.bias = nn.Parameter(torch.zeros(8, dtype=F16), False)


def hooked(model: Any) -> None:
    model.v.register_forward_hook(lambda *_: None)


def hooked_inside(model: Any) -> None:
    model.v.linear.register_forward_pre_hook(lambda *_: None)


def patched(model: Any) -> None:
    forward = model.v.forward
    model.v.forward = lambda x: forward(x)


def of_a_subclass(model: Any) -> None:
    model.v.__class__ = type("Special", (QuantizedLinear,), {})


def left_float(model: Any) -> None:
    model.v = nn.Linear(K, 8).half()


def per_tensor(model: Any) -> None:
    model.v.linear.scale.data = model.v.linear.scale.data[:1]


def with_int8_output(model: Any) -> None:
    model.v.linear.output_dtype = torch.int8
    model.v.linear.forward = lambda x, scale=None: torch.zeros(10, 8, dtype=F16)


def of_int4(model: Any) -> None:
    model.v = quantized(Attention(), A4W4Dynamic()).v


def held_by_an_attribute(model: Any) -> None:
    model.everything = [model.v.linear]


def tied(model: Any) -> None:
    model.tied = LinearQuant(K, 8, output_dtype=F16)
    model.tied.weight = model.v.linear.weight


def of_two_layers(model: Any) -> None:
    model.w = QuantizedLinear(model.v.linear)


def split_on_k(model: Any) -> None:
    from torch.distributed.tensor import Shard

    from lq_graph.modules.split import SPLIT, Split

    nothing = lambda *_: None  # noqa: E731
    vars(model.v.linear)[SPLIT] = Split(None, {"weight": Shard(1)}, nothing, nothing)


def static(model: Any) -> None:
    model.v = quantized(Attention(), A8W8Static()).v


LEFT_ALONE: list[tuple[Callable[[Any], None], str]] = [
    (other_dtype, "its output dtype is bfloat16, and that of q is float16"),
    (own_bias, "its bias is float16, and that of q is None"),
    (hooked, "it has forward hooks, which would be lost"),
    (hooked_inside, "its linear: it has forward hooks, which would be lost"),
    (patched, "it has its own forward, which would be lost"),
    (of_a_subclass, "a Special, whose forward may differ from QuantizedLinear's"),
    (left_float, "it is float"),
    (per_tensor, "its scale has shape (1,), not (8,)"),
    (held_by_an_attribute, "everything holds its tensors too and would keep the old ones"),
    (tied, "another layer has the same weight"),
    (of_two_layers, "another layer holds its LinearQuant too"),
    (split_on_k, "it is split over devices on k"),
    (of_int4, "its scheme is A4W4 dynamic, and that of q is A8W8 dynamic"),
    (static, "its scheme is A8W8 static, and that of q is A8W8 dynamic"),
]


@pytest.mark.parametrize(
    ("spoil", "why"), LEFT_ALONE, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_layer_that_is_left_alone(spoil: Callable[[Any], None], why: str) -> None:
    model = quantized(Attention(), A8W8Dynamic())
    if spoil is other_dtype:
        model.forward = lambda x: [layer(x) for layer in (model.q, model.k, model.v)]
    spoil(model)
    groups, reasons = found(lq_graph.merge(model, inputs()))
    assert groups == [("q", "k")]
    assert reasons["v"] == why
    assert model.v.linear.merged is None if isinstance(model.v, QuantizedLinear) else True


@pytest.mark.parametrize(
    ("name", "value"),
    [("input_scale", 2.0), ("input_offset", 1.0)],
)
def test_static_layers_with_other_scales(name: str, value: float) -> None:
    model = quantized(Attention(), A8W8Static())
    setattr(model.k, name, getattr(model.k, name) + value)
    groups, why = found(lq_graph.merge(model, inputs()))
    assert groups == [("q", "v")]
    assert why["k"].startswith(f"its {name} is [") and "and that of q is [" in why["k"]


def test_a_layer_with_the_vendors_module() -> None:
    model = quantized(Attention(), A8W8Static()).npu()
    lq_graph.convert(model.v, to="torch_npu")
    want = model(inputs().npu())
    groups, why = found(lq_graph.merge(model, inputs().npu()))
    assert groups == [("q", "k")] and why == {"v": "its linear is the vendor's"}
    assert torch.equal(model(inputs().npu()), want)


def test_int8_between_layers_is_left_alone() -> None:
    layers = nn.Sequential(nn.Linear(K, K), nn.Linear(K, 16))
    model = quantized(nn.Sequential(layers), A8W8Static())
    x = inputs()

    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.other = model, quantized(Attention(), A8W8Static()).q

        def forward(self, x: Tensor) -> Any:
            return self.layers(x), self.other(x)

    groups, why = found(lq_graph.merge(Again(), x))
    assert not groups and why["layers.0.0"] == "its output is int8"
    assert why["other"] == "the other layers that read its tensor cannot be merged"


def test_what_the_product_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product limits n today."""
    monkeypatch.setattr(
        "lq_graph.modules.merge_rules.why_not_supported",
        lambda kind, k, n, **_: (f"n is {n}", "") if n > 70 else ("", ""),
    )
    model = quantized(Attention(), A8W8Dynamic())
    groups, why = found(lq_graph.merge(model, inputs()))
    assert (groups, why) == ([], dict.fromkeys("qkv", "n is 72"))


# ---- once, and all or nothing ----


def test_twice_is_once() -> None:
    _, model = pair(A8W8Dynamic())
    lq_graph.merge(model, inputs())
    merged = model.q.linear.merged
    (again,) = lq_graph.merge(model, inputs())
    assert (again.names, again.changed) == (("q", "k", "v"), False)
    assert model.q.linear.merged is merged


def snapshot(model: Any) -> dict[str, Any]:
    return {
        name: (id(p), format_of(p), p.dtype, p.detach().cpu().clone())
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static()], ids=repr)
@pytest.mark.parametrize("step", range(4))
def test_a_failure_is_undone(
    step: int, config: Any, prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(nn.Sequential(Attention(), Attention()), config).npu()
    if prepared:
        lq_graph.use_internal_format_weight(model)
    before, want = snapshot(model), model(inputs().npu()).cpu()
    modules = {name: id(module) for name, module in model.named_modules()}
    calls = 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step + 1:
            raise RuntimeError("out of memory")
        return part(*args)

    part = merging.MergedPart
    monkeypatch.setattr(merging, "MergedPart", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        lq_graph.merge(model, inputs().npu())
    monkeypatch.undo()
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (identity, acl_format, dtype, values) in before.items():
        assert after[name][:3] == (identity, acl_format, dtype), name
        assert torch.equal(after[name][3], values), name
    assert torch.equal(model(inputs().npu()).cpu(), want)
    assert len(lq_graph.merge(model, inputs().npu())) == 2


def test_an_error_of_the_model_leaves_it_unchanged() -> None:
    model = quantized(Attention(), A8W8Dynamic())
    with pytest.raises(lq_graph.LinearQuantValueError, match="differ in k"):
        lq_graph.merge(model, torch.ones(2, 5, 3, dtype=F16))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert type(model.q.linear) is LinearQuant


def test_a_merged_weights_memory_is_the_most_it_takes() -> None:
    model = nn.Sequential(*(_Wide() for _ in range(12)))
    quantized(model, A8W8Dynamic()).npu()
    torch.npu.synchronize()
    base = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    lq_graph.merge(model, torch.ones(1, 512, dtype=F16).npu())
    assert torch.npu.max_memory_allocated() - base <= 1.5 * 2**20  # a merged weight has 1 MiB
    assert torch.npu.memory_allocated() - base <= 2**17


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(512, 1024, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x) * self.up(x))[..., :512]


# ---- with preparation, before and after ----


@pytest.mark.parametrize("config", [A8W8Dynamic(), A8W8Static(), A4W4Dynamic()], ids=repr)
def test_prepared_before_or_after(config: Any) -> None:
    plain, before = pair(config, bias=True)
    after = copy.deepcopy(before)
    lq_graph.use_internal_format_weight(before.npu())
    lq_graph.merge(before, inputs().npu())
    lq_graph.merge(after.npu(), inputs().npu())
    report = lq_graph.use_internal_format_weight(after)
    assert [one.name for one in report] == ["q.linear.merged", "out.linear"]
    for model in (before, after):
        merged = model.q.linear.merged
        assert format_of(merged.weight) == (ND if config == A4W4Dynamic() else FRACTAL_NZ)
        assert torch.equal(model(inputs().npu()).cpu(), plain(inputs()))
    one, other = before.q.linear.merged, after.q.linear.merged
    assert torch.equal(one.scale, other.scale) and one.scale.dtype == other.scale.dtype
    assert not any(one.changed for one in lq_graph.use_internal_format_weight(before))


# ---- what is said ----


def test_report_and_repr() -> None:
    model = quantized(nn.ModuleDict({"attention": Attention()}), A8W8Dynamic())
    model.forward = lambda x: model["attention"](x)
    hooked(model["attention"])
    report = lq_graph.merge(model, inputs())
    assert str(report).splitlines() == [
        "layers                          k  n",
        "attention: q, k  A8W8 dynamic  64  40 + 24",
        "left alone   why",
        "attention.v  it has forward hooks, which would be lost",
        "layers merged: 2 into 1; left alone: 1",
    ]
    text = str(model)
    assert "rows=40:64 of 64" in text and "merged=q + k" in text
    assert str(lq_graph.merge(nn.Linear(4, 4), torch.ones(1, 4))) == (
        "nothing to merge; left alone: 0"
    )


def test_repr_differs_by_group() -> None:
    """torchair's cache_compile keys on it."""
    _, one = pair(A8W8Dynamic())
    _, other = pair(A8W8Dynamic())
    plain = str(one)
    hooked(other)
    for model in (one, other):
        lq_graph.merge(model, inputs())
    assert len({plain, str(one), str(other)}) == 3
