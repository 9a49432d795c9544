"""Runs of one compiled graph after another: what is kept from the run before must not show in the
numbers, whatever happened between the two."""

from __future__ import annotations

import ctypes
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cann_host
from cann_host import runtime
from cann_host.graph import compiler, device_memory, executor
from cann_host.graph.executor import Op
from cann_host.graph.inference import Inference
from cann_host.graph.program import Program, Slot, Step
from lq_graph import kernels

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
torchair = pytest.importorskip("torchair")

NZ = 29


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.npu.config.allow_internal_format = True
    with torch.no_grad():
        yield
    torch.npu.config.allow_internal_format = False


def compiled(
    function: Callable[..., Any], *, dynamic: bool = False, **options: Any
) -> Callable[..., Any]:
    config = torchair.CompilerConfig()
    for name, value in options.items():
        setattr(config.experimental_config, name, value)
    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)


def newest() -> Any:
    return runtime.current().graphs.compiled[-1]


# ---- weights that change ----

N, K = 48, 64


class Weights(nn.Module):
    """A float weight and a quantized one, as a matmul and as an embedding read them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.dense = nn.Parameter(torch.randn(N, K).half(), requires_grad=False)
        self.packed = nn.Parameter(torch.randint(-128, 128, (N, K), dtype=torch.int8), False)
        self.register_buffer("scale", torch.rand(N) * 1e-3)
        self.npu()
        if form == "FRACTAL_NZ":
            for name in ("dense", "packed"):
                parameter = getattr(self, name)
                parameter.data = torch_npu.npu_format_cast(parameter.data, NZ)
                assert torch_npu.get_npu_format(parameter) == NZ

    def forward(self, x: Tensor, x1: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones(x1.shape[0], device=x1.device)
        return (
            F.linear(x, self.dense),
            self.dense.to(torch.float32) * 2,
            F.embedding(rows, self.dense),
            torch_npu.npu_quant_matmul(
                x1, self.packed.t(), self.scale, pertoken_scale=ones, output_dtype=torch.float16
            ),
        )

    def want(self, x: Tensor, x1: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """From the weights as they are now, on the CPU."""
        weight, int8, scale = (t.detach().cpu() for t in (self.dense, self.packed, self.scale))
        ones = torch.ones(x1.shape[0])
        return (
            F.linear(x, weight),
            weight.float() * 2,
            F.embedding(rows, weight),
            kernels.quant_matmul(x1, int8, scale, pertoken_scale=ones, output_dtype=torch.float16),
        )


def new(weight: Tensor) -> Tensor:
    other = weight.detach().cpu().float().flip(0) + 1
    return other.clamp(-128, 127).to(weight.dtype)


def replayed(weight: Tensor) -> None:
    source, graph = new(weight).npu(), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        weight.copy_(source)
    source.copy_(new(weight))  # another one than at the capture
    graph.replay()


def memcpy(weight: Tensor) -> None:
    # bytes that are small numbers in float16 too
    data = torch.randint(0x30, 0x38, (weight.untyped_storage().nbytes(),), dtype=torch.int8)
    size, host_to_device = data.nbytes, 1
    library = runtime.current().library
    at = ctypes.c_void_p(weight.data_ptr())
    source = ctypes.c_void_p(data.data_ptr())
    assert library.aclrtMemcpy(at, size, source, size, host_to_device) == 0


def memset(weight: Tensor) -> None:
    size = weight.untyped_storage().nbytes()
    assert (
        runtime.current().library.aclrtMemset(ctypes.c_void_p(weight.data_ptr()), size, 0, size)
        == 0
    )


# ways in which the bytes of a weight change and its memory stays
WRITES: dict[str, Callable[[Tensor], object]] = {
    "copy from the CPU": lambda w: w.copy_(new(w)),
    "copy from pinned memory": lambda w: w.copy_(new(w).pin_memory(), non_blocking=True),
    "copy on the device": lambda w: w.copy_(new(w).npu()),
    "through .data": lambda w: w.data.copy_(new(w)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(3),
    "neg_": lambda w: w.neg_(),
    "add_": lambda w: w.add_(1),
    "a replay": replayed,
}
# torch_npu gives a FRACTAL_NZ tensor other memory when it writes to it
RAW_WRITES: dict[str, Callable[[Tensor], object]] = {
    "aclrtMemcpy": memcpy,
    "aclrtMemset": memset,
}


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("frozen", [False, True], ids=["inputs", "frozen"])
@pytest.mark.parametrize("form", ["ND", "FRACTAL_NZ"])
def test_a_weight_that_was_written_is_read_again(form: str, frozen: bool) -> None:
    model = Weights(form)
    given = (
        torch.randn(3, K).half(),
        torch.randint(-128, 128, (3, K), dtype=torch.int8),
        torch.tensor([0, N - 1, 5]),
    )
    on_npu = [t.npu() for t in given]
    run = compiled(model, frozen_parameter=frozen)
    for _ in range(2):
        assert same(run(*on_npu), model.want(*given))
    writes = RAW_WRITES if form == "FRACTAL_NZ" else {**WRITES, **RAW_WRITES}
    for how, write in writes.items():
        for weight in (model.dense, model.packed):
            before = weight.cpu()
            write(weight)
            torch.npu.synchronize()
            assert not torch.equal(weight.cpu(), before), how
        for _ in range(2):
            assert same(run(*on_npu), model.want(*given)), how


def test_memory_that_another_weight_gets_later() -> None:
    x = torch.randn(3, K).half()
    addresses = set()
    for seed in range(4):
        torch.manual_seed(seed)
        torch._dynamo.reset()
        weight = torch_npu.npu_format_cast(torch.randn(N, K).half().npu(), NZ)
        addresses.add(weight.data_ptr())
        run = compiled(F.linear)
        for _ in range(2):
            assert torch.equal(run(x.npu(), weight).cpu(), F.linear(x, weight.cpu()))
        del weight
    assert len(addresses) < 4, "no memory was used twice"


def test_a_float_weight_in_fractal_nz_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    def counting(blocks: Tensor, *shape: int) -> Tensor:
        counted.append(1)
        return kernels.nz_to_nd(blocks, *shape)

    monkeypatch.setattr(device_memory, "nz_to_nd", counting)
    weight = torch_npu.npu_format_cast(torch.randn(N, K).half().npu(), NZ)
    run, x = compiled(F.linear), torch.randn(3, K).half().npu()
    for _ in range(3):
        run(x, weight)
    assert len(counted) == 1
    memset(weight)
    assert not run(x, weight).any() and len(counted) == 2


# ---- runs that differ, fail, or run at the same time ----


def some(x: Tensor, table: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    hidden = (x * 2).reshape(-1)[:-1].relu() + 1
    constant = torch.arange(4, device=x.device, dtype=torch.float32) * 3
    return hidden, x, constant, table.index_select(0, rows) @ table.t(), x.view(-1), x


def inputs(seed: int, rows: int = 6) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return torch.randn(rows, 5), torch.randn(8, 4), torch.randint(8, (rows,))


def close(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_results_are_the_callers_own(dynamic: bool) -> None:
    """Outputs that are an input, a view of it, or a constant, also twice; kept over later runs."""
    run = compiled(some, dynamic=dynamic)
    kept = [(run(*(t.npu() for t in inputs(seed))), inputs(seed)) for seed in range(3)]
    kept[0][0][2].zero_()  # a caller may write to a constant it got
    kept.append((run(*(t.npu() for t in inputs(9))), inputs(9)))
    for got, given in kept[1:]:
        close(got, some(*given))


def test_shapes_that_change_from_run_to_run() -> None:
    run = compiled(some, dynamic=True)
    for rows in (6, 3, 6, 11, 2, 6):
        given = inputs(rows, rows)
        close(run(*(t.npu() for t in given)), some(*given))


def test_a_static_graph_that_gets_other_shapes_checks_every_step() -> None:
    compiled(lambda x: (x.relu() + 1).reshape(-1))(torch.ones(2, 3).npu())
    graph = newest()
    assert graph.returns_one
    (got,) = graph.run([-torch.ones(3, 2)])  # the constant shape still fits
    assert torch.equal(got, torch.ones(6))
    with pytest.raises(executor.GraphError, match=r"node Reshape.* \(Reshape\)"):
        graph.run([torch.ones(7)])


def test_a_run_that_fails_leaves_no_trace() -> None:
    run = compiled(some)
    x, table, rows = inputs(0)
    want = some(x, table, rows)
    close(run(x.npu(), table.npu(), rows.npu()), want)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"node \w+ \(Gather"):
            run(x.npu(), table.npu(), torch.full_like(rows, 8).npu())
        close(run(x.npu(), table.npu(), rows.npu()), want)


def test_two_threads_run_one_graph() -> None:
    run = compiled(some)
    given = [inputs(seed) for seed in range(8)]
    on_npu = [[t.npu() for t in one] for one in given]
    run(*on_npu[0])
    graph, failures = newest(), []

    def work(first: int) -> None:
        with torch.no_grad():
            for turn in range(40):
                one = given[(first + turn) % len(given)]
                values = {tuple(t.shape): t for t in one}
                results = graph.run([values[info.shape] for info in graph.input_infos])
                if not torch.equal(results[0], some(*one)[0]):
                    failures.append(turn)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_may_come_and_go() -> None:
    run, given = compiled(some), inputs(0)
    on_npu = [t.npu() for t in given]
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            close(run(*on_npu), some(*given))


# ---- what a program holds and decides ----


def operator(name: str, function: Callable[..., Any], *inputs: str) -> Op:
    return Op(name, function, inputs, frozenset(), None, frozenset(), False)


@pytest.mark.parametrize("direct", [False, True], ids=["checked", "direct"])
def test_values_are_freed_after_their_last_use(direct: bool) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        alive.append(sum(ref() is not None for ref in made))
        results = x + 1, x + 2  # nobody reads the second
        made.extend(map(weakref.ref, results))
        return results

    op = operator("Two", two, "x")
    nodes = ["in", *(f"n{i}" for i in range(5))]
    steps = [
        Step(op, node, {"x": Slot(before, 0)}, {}) for before, node in itertools.pairwise(nodes)
    ]
    one = dict.fromkeys(steps, False) if direct else {}
    program = Program([Slot("in", 0)], {}, steps, [Slot("n4", 0)], one)
    for _ in range(2):
        made.clear()
        alive.clear()
        (result,) = program.run([torch.zeros(2)])
        assert result.tolist() == [5, 5]
        assert alive == [0, 1, 1, 1, 1]


def test_steps_keep_the_order_of_the_graph() -> None:
    """A read that comes before a write in place, though no edge says so, stays before it."""
    op = operator("Any", lambda x: x, "x")
    wanted = ["read", "write", "late", "control", "last"]
    after = {"last": {"late", "control"}, "control": {"write"}, "late": {"in"}}
    steps = [
        Step(op, name, {"x": Slot("in", 0)}, {}, frozenset(after.get(name, {"in"})))
        for name in wanted
    ]
    assert [s.node for s in compiler._sorted(steps, {"in"}, "g")] == wanted
    shuffled = [steps[i] for i in (4, 0, 3, 1, 2)]
    found = [s.node for s in compiler._sorted(shuffled, {"in"}, "g")]
    assert found == ["read", "write", "control", "late", "last"]


def test_each_node_is_cautioned() -> None:
    """A step like an earlier one has its results, but not if there was a caution."""
    calls: list[str] = []

    def careful(x: Tensor) -> Tensor:
        calls.append("careful")
        executor.caution("something")
        return x + 1

    def plain(x: Tensor) -> Tensor:
        calls.append("plain")
        return x + 1

    inference, like = Inference(), torch.empty(3, device="meta")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for function in (careful, careful, plain, plain):
            op = operator(function.__name__, function, "x")
            inference.result(Step(op, "n", {"x": Slot("in", 0)}, {}), [like])
    assert calls == ["careful", "careful", "plain"] and len(caught) == 2


def test_steps_that_differ_are_inferred_apart() -> None:
    def function(x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape(shape.tolist())

    op = replace(operator("R", function, "x", "shape"), host=frozenset({"shape"}))
    inference = Inference()
    step = Step(op, "n", {"x": Slot("in", 0), "shape": Slot("s", 0)}, {})
    like = torch.empty(2, 6, device="meta")
    for shape in ([12], [3, 4], [4, 3], [12]):
        result = inference.result(step, [like, torch.tensor(shape)])
        assert list(result.shape) == shape
    turned = inference.result(step, [like.t(), torch.tensor([12])])
    assert turned.shape == (12,)


def test_a_symbolic_size_beside_a_constant() -> None:
    """Pack makes the shape of both; torchair declares the size as a scalar and passes (1,)."""
    run = compiled(lambda x, n: torch.ops.aten.view.default(x, [n, 8]) * 2, dynamic=True)
    for n in (2, 3):
        x = torch.arange(8.0 * n)
        assert torch.equal(run(x.npu(), n).cpu(), x.view(n, 8) * 2)
