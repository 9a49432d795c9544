"""Whose memory a graph's cache update writes into: that of the caller, seen by the next step and by
eager code, and no other value's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import cann_host
from cann_host import runtime
from cann_host.graph.compiler import compile_graph

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def compiled(
    function: Callable[..., Any],
    *,
    mode: str = "max-autotune",
    dynamic: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    config = torchair.CompilerConfig()
    config.mode = mode
    for name, value in options.items():
        setattr(config.experimental_config, name, value)
    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


def nodes() -> list[str]:
    """The op types that the newest graph computes at each run."""
    newest = max(runtime.current().graphs._graphs.items())[1]
    return [step.op.type for step in newest.steps]


class Cache(torch.nn.Module):
    """A cache of keys in a buffer, and one in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(2, 3, 8, 4))
        self.pages = torch.nn.Parameter(torch.zeros(8, 4), requires_grad=False)

    def forward(self, place: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x[None, None, None].expand(2, 3, 1, 4)
        torch_npu.scatter_update_(self.keys, place.expand(2), rows.contiguous(), -2)
        torch_npu.npu_scatter_nd_update_(self.pages, place[:, None], x[None])
        return self.keys.sum(-1), self.pages * 2

    def want(self, steps: int) -> Tensor:
        """The first row of each cache after so many steps of `ran`."""
        return torch.tensor([float(i + 1) if i < steps else 0.0 for i in range(8)])

    def check(self, steps: int) -> None:
        want = self.want(steps)
        assert torch.equal(self.keys[1, 2].cpu(), want[:, None].expand(8, 4))
        assert torch.equal(self.pages.cpu(), want[:, None].expand(8, 4))


def ran(model: Cache, function: Callable[..., Any], steps: int) -> None:
    place, x = torch.zeros(1, dtype=torch.int64).npu(), torch.zeros(4).npu()
    for step in range(steps):
        place.fill_(step)
        x.fill_(step + 1)
        sums, pages = function(place, x)
        want = model.want(step + 1)
        assert torch.equal(sums[0, 0].cpu(), want * 4) and torch.equal(pages[:, 0].cpu(), want * 2)
        model.check(step + 1)


# how the model is compiled, and what its graph then writes with
WAYS = {
    "eager": None,
    "inputs": {},
    "frozen": {"frozen_parameter": True},
    "ref_data": {"enable_ref_data": True},
    "dynamic": {"dynamic": True},
    "captured": {"mode": "reduce-overhead"},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_see_the_cache_of_the_steps_before(way: str) -> None:
    model = Cache().npu()
    options = WAYS[way]
    ran(model, model if options is None else compiled(model, **options), 4)
    if way in ("inputs", "frozen", "ref_data"):
        assert "Assign" not in nodes() and "TensorMove" not in nodes()


@pytest.mark.parametrize("way", ["inputs", "frozen"])
def test_eager_code_and_a_graph_share_a_cache(way: str) -> None:
    model = Cache().npu()
    function = compiled(model, **(WAYS[way] or {}))
    ran(model, function, 2)
    model.keys.zero_()
    model.pages.zero_()
    ran(model, function, 3)  # the graph reads what eager code wrote
    model(torch.tensor([3]).npu(), torch.full((4,), 4.0).npu())
    model.check(4)


def test_npugraph_ex_replays_the_updates() -> None:
    model = Cache().npu()
    ran(model, torch.compile(model, backend="npugraph_ex", dynamic=False), 4)


def run_with(function: Callable[..., Any], frozen: bool, *inputs: Tensor) -> Any:
    """The results, and the first input afterwards, beside those of plain torch on the CPU."""
    on_npu = [t.npu() for t in inputs]
    if frozen:
        on_npu[0] = torch.nn.Parameter(on_npu[0], requires_grad=False)
    results = compiled(function, frozen_parameter=frozen)(*on_npu)
    return [t.cpu() for t in results], [t.detach().cpu() for t in on_npu]


ROWS = torch.arange(16.0).reshape(4, 4)


@pytest.mark.parametrize("frozen", [False, True], ids=["inputs", "frozen"])
def test_values_that_were_read_before_the_write_stay(frozen: bool) -> None:
    """On cann_host a slice is a view, on the device a copy."""

    def run(cache: Tensor, place: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        old = cache[1:3].clone()
        turned = cache.t() + 0
        torch_npu.npu_scatter_nd_update_(cache, place, x)
        return old, turned, cache[1:3] * 1

    place, x = torch.tensor([[1], [2]]), torch.full((2, 4), -1.0)
    (old, turned, new), (cache, *_) = run_with(run, frozen, ROWS, place, x)
    assert torch.equal(old, ROWS[1:3]) and torch.equal(turned, ROWS.t())
    assert torch.equal(new, x) and torch.equal(cache[1:3], x) and torch.equal(cache[0], ROWS[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["inputs", "frozen"])
def test_an_operator_that_is_not_in_place_leaves_its_input(frozen: bool) -> None:
    def run(cache: Tensor, place: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        first = torch_npu.npu_scatter_nd_update(cache, place, x)
        second = torch_npu.npu_scatter_nd_update(first, place + 1, x)
        return first, second

    (first, second), (cache, *_) = run_with(
        run, frozen, ROWS, torch.tensor([[1]]), torch.zeros(1, 4)
    )
    assert torch.equal(cache, ROWS)
    assert first[1].sum() == 0 and torch.equal(first[2:], ROWS[2:])
    assert second[1:3].sum() == 0 and torch.equal(second[3], ROWS[3])


@pytest.mark.parametrize("frozen", [False, True], ids=["inputs", "frozen"])
def test_two_inputs_that_swap(frozen: bool) -> None:
    """Each output is the memory of the input that the other one reads."""

    def run(one: Tensor, other: Tensor) -> tuple[Tensor]:
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
        return (one + other,)

    (total,), (one, other) = run_with(run, frozen, ROWS, ROWS * 2)
    assert torch.equal(one, ROWS * 2) and torch.equal(other, ROWS)
    assert torch.equal(total, ROWS * 3)


def test_through_a_view() -> None:
    """torchair's pattern for a view of an input: a reshape before the operator in place."""

    def run(cache: Tensor, place: Tensor, x: Tensor) -> tuple[Tensor]:
        torch_npu.npu_scatter_nd_update_(cache.view(-1, 4), place, x)
        return (cache.sum((1, 2)),)

    (sums,), (cache, *_) = run_with(
        run, False, torch.zeros(2, 2, 4), torch.tensor([[1], [2]]), torch.ones(2, 4)
    )
    assert sums.tolist() == [4, 4]
    assert torch.equal(cache.view(4, 4)[:, 0], torch.tensor([0.0, 1, 1, 0]))


def test_an_input_that_is_not_contiguous() -> None:
    def run(cache: Tensor, place: Tensor, x: Tensor) -> tuple[Tensor]:
        torch_npu.npu_scatter_nd_update_(cache, place, x)
        return (cache * 1,)

    whole = torch.zeros(4, 2, 4).npu()
    place, x = torch.tensor([[1]]).npu(), torch.ones(1, 4).npu()
    (result,) = compiled(run)(whole[:, 1], place, x)
    assert result[1].sum() == 4 and whole[1, 1].sum() == 4 and whole.sum() == 4


def test_an_index_outside_is_refused_and_nothing_written() -> None:
    def run(cache: Tensor, place: Tensor, x: Tensor) -> tuple[Tensor]:
        torch_npu.npu_scatter_nd_update_(cache, place, x)
        return (cache.sum(),)

    function = compiled(run)
    cache, x = torch.zeros(8, 4).npu(), torch.ones(2, 4).npu()
    with pytest.raises(RuntimeError, match="indices has 8, and dim 0 of var has 8"):
        function(cache, torch.tensor([[1], [8]]).npu(), x)
    assert not cache.any()
    assert function(cache, torch.tensor([[1], [7]]).npu(), x)[0].item() == 8


def test_aten_scatter() -> None:
    """scatter, scatter_add and what torchair makes of select and slice."""

    def run(x: Tensor, index: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        wide = x.slice_scatter(rows, 0, 0, 4, 2)
        return (
            x.scatter(1, index, rows),
            x.scatter(0, index, 7.0),
            x.scatter_add(1, index, rows),
            x.select_scatter(rows[0], 0, 2),
            wide,
        )

    index, rows = torch.tensor([[0, 2, 1, 3], [3, 1, 0, 2]]), torch.full((2, 4), -5.0)
    results, _ = run_with(run, False, ROWS, index, rows)
    for got, want in zip(results, run(ROWS, index, rows), strict=True):
        assert torch.equal(got, want)


# ---- constants in the caller's memory, which torchair before 2.8 makes of frozen parameters ----

FLOAT, INT64 = 1, 10  # in the serialized form


def graph_of(cache: Tensor, outputs: list[str], *nodes: tuple[str, str, dict[str, str]]) -> Any:
    """A graph of the constant `cache`, the inputs `place` and `x`, and some nodes."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    graph = model.graph.add()
    constant = graph.op.add(name="cache", type="ConstPlaceHolder")
    for name in ("origin_shape", "storage_shape"):
        constant.attr[name].list.i.extend(cache.shape)
        constant.attr[name].list.val_type = 2
    constant.attr["addr"].i, constant.attr["dtype"].dt = cache.data_ptr(), 0  # GE's float32
    constant.attr["storage_format"].i = 2
    for index, (name, dtype, shape) in enumerate((("place", INT64, (1, 1)), ("x", FLOAT, (1, 4)))):
        data = graph.op.add(name=name, type="Data")
        data.attr["index"].i = index
        desc = data.output_desc.add(dtype=dtype)
        desc.shape.dim.extend(shape)
    for name, type_, inputs in nodes:
        node = graph.op.add(name=name, type=type_)
        for input_name, source in inputs.items():
            node.input.append(f"{source}:0")
            node.input_desc.add(name=input_name)
    out = graph.op.add(name="out", type="NetOutput")
    for name in outputs:
        source, _, port = name.partition(":")
        out.input.append(f"{source}:{port or 0}")
        if port != "-1":
            out.input_desc.add(dtype=FLOAT)
    return compile_graph(model.SerializeToString())


UPDATE = {"indices": "place", "updates": "x"}


def test_a_constant_is_written_at_each_run() -> None:
    cache = torch.zeros(4, 4).npu()
    graph = graph_of(
        cache,
        ["old", "double", "assign:-1"],
        ("old", "Abs", {"x": "cache"}),
        ("moved", "TensorMove", {"x": "cache"}),
        ("scatter", "ScatterNdUpdate", {"var": "moved", **UPDATE}),
        ("assign", "Assign", {"ref": "cache", "value": "scatter"}),
        ("double", "Neg", {"x": "scatter"}),
    )
    for step in range(3):
        old, negative = graph.run([torch.tensor([[step]]), torch.full((1, 4), step + 1.0)])
        rows = torch.tensor([i + 1.0 if i <= step else 0 for i in range(4)])
        assert torch.equal(cache[:, 0].cpu(), rows) and torch.equal(negative[:, 0], -rows)
        assert old.sum() == 4 * sum(range(step + 1))  # not folded when it was compiled


def test_a_view_of_a_constant_is_kept_before_the_write() -> None:
    cache = torch.ones(4, 4).npu()
    graph = graph_of(
        cache,
        ["kept", "scatter"],
        ("flat", "Squeeze", {"x": "cache"}),
        ("kept", "Identity", {"x": "flat"}),
        ("scatter", "ScatterNdUpdate", {"var": "flat", **UPDATE}),
    )
    kept, scatter = graph.run([torch.tensor([[2]]), torch.full((1, 4), 5.0)])
    assert torch.equal(kept, torch.ones(4, 4))
    assert scatter[2, 0] == 5 and cache[2, 0].item() == 5
    (step,) = [step for step in graph.steps if step.op.writes]
    assert not step.copies and [slot.node for slot in step.views] == ["kept"]
