"""Every way torchair and torch offer to turn a LinearQuant model into something else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch_npu
import torchair

import cann_host
import lq_graph
from lq_graph.rules.tables import FRACTAL_NZ
from support import cases
from support.cases import BF16, F16, I8, I32, I64, Case
from support.layers import module_for
from support.processes import output_of, python, run, script

CASES = [
    Case(offset=True, bias=I32),
    Case(output=BF16, bias=BF16, pertoken=True),
    Case(x=I32, output=F16, scale=I64),
]
EACH = pytest.mark.parametrize("case", CASES, ids=str)


def prepared(case: Case) -> tuple[cases.Inputs, torch.nn.Module, torch.Tensor]:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    inputs = cases.make(case)
    layer = module_for(inputs).npu()
    lq_graph.use_internal_format_weight(layer)
    return inputs, layer, inputs["x1"].npu()


def backend(config: torchair.CompilerConfig):
    return torchair.get_npu_backend(compiler_config=config)


@EACH
def test_frozen_parameter(case: Case) -> None:
    inputs, layer, x1 = prepared(case)
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = True
    compiled = torch.compile(layer, backend=backend(config), dynamic=False, fullgraph=True)
    cases.assert_equal(compiled(x1), inputs)
    cases.assert_equal(compiled(x1), inputs)


@EACH
def test_marked_dynamic_m_is_one_graph(case: Case) -> None:
    _, layer, _ = prepared(case)
    graphs = torch._dynamo.utils.counters
    graphs.clear()
    config = torchair.CompilerConfig()
    compiled = torch.compile(layer, backend=backend(config), fullgraph=True)
    for m in (3, 9, 33):
        more = cases.make(replace(case, m=m), seed=m)
        # the scales of the rows come with them: a parameter's size would be a constant to dynamo
        args = [t.npu() for t in (more["x1"], more["pertoken_scale"]) if t is not None]
        for tensor in args:
            torch._dynamo.mark_dynamic(tensor, 0)
        out = compiled(*args)
        assert out.shape == (m, case.n) and torch.equal(out.cpu(), layer(*args).cpu())
    assert graphs["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("kind", ["txt", "pbtxt", "py"])
def test_graph_dumps_name_our_node(kind: str, tmp_path: Path) -> None:
    inputs, layer, x1 = prepared(CASES[0])
    config = torchair.CompilerConfig()
    config.debug.graph_dump.type = kind
    config.debug.graph_dump.path = str(tmp_path)
    compiled = torch.compile(layer, backend=backend(config), dynamic=False, fullgraph=True)
    cases.assert_equal(compiled(x1), inputs)
    dumps = [path.read_text() for path in tmp_path.glob(f"*.{kind}")]
    assert dumps and all("QuantBatchMatmulV3" in text for text in dumps)


@EACH
def test_dynamo_export_writes_an_air_file(case: Case, tmp_path: Path) -> None:
    _, layer, x1 = prepared(case)
    torchair.dynamo_export(x1, model=layer, export_path=str(tmp_path), dynamic=False)
    assert (tmp_path / "export.air").stat().st_size > 0
    assert "QuantBatchMatmulV3" in (tmp_path / "dynamo.pbtxt").read_text()


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("mode", ["reduce-overhead", "npugraph_ex"])
def test_captured_graphs_replay(case: Case, mode: str) -> None:
    """aclgraph: under cann_host what was launched is kept and launched again, on the CPU."""
    inputs, layer, x1 = prepared(case)
    chosen = mode
    if mode == "reduce-overhead":
        config = torchair.CompilerConfig()
        config.mode = mode
        chosen = backend(config)
    compiled = torch.compile(layer, backend=chosen, dynamic=False, fullgraph=True)
    for seed in (0, 1, 2):
        other = cases.make(case, seed=seed)["x1"]
        inputs["x1"] = other
        x1.copy_(other)
        cases.assert_equal(compiled(x1), inputs)


def test_a_graph_captured_by_hand() -> None:
    inputs, layer, x1 = prepared(CASES[0])
    layer(x1)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = layer(x1)
    for seed in (1, 2):
        inputs["x1"] = cases.make(CASES[0], seed=seed)["x1"]
        x1.copy_(inputs["x1"])
        graph.replay()
        torch.npu.synchronize()
        cases.assert_equal(out, inputs)


@pytest.mark.skipif(not cann_host.is_active(), reason="about the stand-in")
def test_an_operator_that_cannot_be_captured_is_named() -> None:
    x = torch.ones(4).npu()
    graph = torch.npu.NPUGraph()
    named = pytest.raises(RuntimeError, match=r"aten.nonzero.default is not captured")
    with named, torch.npu.graph(graph):
        torch.nonzero(x)
    assert torch.sqrt(x).sum().item() == 4


@EACH
def test_torch_export(case: Case) -> None:
    inputs, layer, x1 = prepared(case)
    program = torch.export.export(layer, (x1,))
    assert "lq_graph.linear_quant" in str(program)
    cases.assert_equal(program.module()(x1), inputs)


@pytest.mark.slow
def test_cache_compile_is_used_by_the_next_process_and_kept_apart(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    launcher = [] if os.environ.get("LQ_GRAPH_TEST_NPU") == "1" else ["-m", "cann_host"]

    def run(output_dtype: str) -> list[Path]:
        said = output_of(python(*launcher, *script(f"cached.py dtype {cache} {output_dtype}")))
        assert f"torch.{output_dtype}" in said
        return sorted(path for path in cache.rglob("*") if path.is_file())

    first = run("int8")
    times = {path: path.stat().st_mtime_ns for path in first}
    assert first
    assert run("int8") == first  # the second start compiles nothing
    assert {path: path.stat().st_mtime_ns for path in first} == times
    other = set(run("float16")) - set(first)
    assert other and {path.parent for path in other}.isdisjoint({p.parent for p in first})


def test_int8_output_feeds_the_next_layer_in_every_mode() -> None:
    first = cases.make(Case(offset=True, n=40, scale=I64))
    second = cases.make(Case(scale=I64, output=F16), seed=1)
    for mode in ("max-autotune", "reduce-overhead"):
        torch._dynamo.reset()
        chain = torch.nn.Sequential(module_for(first), module_for(second)).npu()
        config = torchair.CompilerConfig()
        config.mode = mode
        out = torch.compile(chain, backend=backend(config), dynamic=False)(first["x1"].npu())
        second["x1"] = torch.from_numpy(cases.expected(first))
        assert second["x1"].dtype == I8
        cases.assert_equal(out, second)


# ---- a graph holds for the format, and the memory, it was made for ----

Change = Callable[[torch.nn.Module], None]


def unprepared(kind: type[torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    """bfloat16 output: its scale is not folded, so only the weight's format changes."""
    inputs = cases.make(Case(k=64, n=48, output=BF16), seed=seed)
    layer = kind(64, 48, bias=False, output_dtype=BF16)
    layer.weight.data, layer.scale.data = inputs["weight"], inputs["scale"]
    return layer.npu()


def prepare(layer: torch.nn.Module) -> None:
    lq_graph.use_internal_format_weight(layer)


def nd_weight(seed: int = 1) -> torch.Tensor:
    return cases.make(Case(k=64, n=48), seed=seed)["weight"].npu()


def move(layer: torch.nn.Module) -> None:
    layer.cpu().npu()


def assign_data(layer: torch.nn.Module) -> None:
    layer.weight.data = nd_weight()


def assign_same_format(layer: torch.nn.Module) -> None:
    layer.weight.data = torch_npu.npu_format_cast(nd_weight(), FRACTAL_NZ)


def assign_parameter(layer: torch.nn.Module) -> None:
    layer.weight = torch.nn.Parameter(nd_weight(), False)


def load(layer: torch.nn.Module) -> None:
    layer.load_state_dict(unprepared(type(layer), seed=1).state_dict())


def write_in_place(layer: torch.nn.Module) -> None:
    layer.weight.data.copy_(torch_npu.npu_format_cast(nd_weight(), FRACTAL_NZ))


GE, FROZEN, CAPTURED, CAPTURED_FROZEN = "", "frozen", "reduce-overhead", "reduce-overhead frozen"
FORMAT = r"is (ND|FRACTAL_NZ) and the graph was compiled for (ND|FRACTAL_NZ)"
OTHER = r"(has other memory|is gone|was (ND|FRACTAL_NZ) and is (ND|FRACTAL_NZ)) ?(now)?"
Ours, Vendors = lq_graph.LinearQuant, torch_npu.contrib.module.LinearQuant
# (what was done before the first call, what after it, then by mode: "" computes the right values,
# else what the stand-in refuses with), for ours and for the vendor's module
AFTERWARDS: list[tuple[type, Change | None, Change, dict[str, str]]] = [
    (Ours, prepare, move, {GE: "", FROZEN: "", CAPTURED: ""}),
    (Ours, None, prepare, {GE: "", FROZEN: "", CAPTURED: ""}),
    (Ours, prepare, assign_parameter, {GE: "", FROZEN: "", CAPTURED: ""}),
    (Ours, prepare, load, {GE: "", CAPTURED: ""}),
    (
        Ours,
        prepare,
        assign_data,
        {GE: FORMAT, FROZEN: FORMAT, CAPTURED: "", CAPTURED_FROZEN: OTHER},
    ),
    (Ours, prepare, assign_same_format, {GE: "", FROZEN: "other memory", CAPTURED_FROZEN: OTHER}),
    (Ours, prepare, write_in_place, {GE: "", FROZEN: "", CAPTURED: "", CAPTURED_FROZEN: ""}),
    (Vendors, prepare, move, {GE: FORMAT, CAPTURED_FROZEN: OTHER}),
    (Vendors, None, prepare, {GE: FORMAT, FROZEN: FORMAT, CAPTURED: "", CAPTURED_FROZEN: OTHER}),
    (Vendors, prepare, assign_parameter, {GE: FORMAT, CAPTURED_FROZEN: OTHER}),
    (Vendors, prepare, write_in_place, {GE: "", CAPTURED: ""}),
]
EACH_AFTERWARDS = [
    pytest.param(
        kind, first, then, mode, refused,
        id=f"{kind.__module__.split('.')[0]}-{getattr(first, '__name__', 'as it is')}-"
        f"{then.__name__}-{mode or 'ge'}",
    )
    for kind, first, then, modes in AFTERWARDS
    for mode, refused in modes.items()
]  # fmt: skip


def compiled_in(mode: str, layer: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    config = torchair.CompilerConfig()
    if "frozen" in mode:
        config.experimental_config.frozen_parameter = True
    if "reduce-overhead" in mode:
        config.mode = "reduce-overhead"
    return torch.compile(layer, backend=backend(config), dynamic=False)


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="a device does not notice")
@pytest.mark.filterwarnings("ignore:use_internal_format_weight. formats")
@pytest.mark.parametrize(("kind", "first", "then", "mode", "refused"), EACH_AFTERWARDS)
def test_a_graph_runs_only_on_what_it_was_compiled_for(
    kind: type, first: Change | None, then: Change, mode: str, refused: str
) -> None:
    torch._dynamo.reset()
    torch.npu.config.allow_internal_format = True
    layer = unprepared(kind)
    if first:
        first(layer)
    x1 = cases.make(Case(m=4, k=64, n=48))["x1"].npu()
    compiled = compiled_in(mode, layer)
    for _ in range(2):
        assert torch.equal(compiled(x1).cpu(), layer(x1).cpu())
    then(layer)
    wanted = layer(x1).cpu()
    for _ in range(2):
        if refused:
            with pytest.raises(RuntimeError, match=refused) as caught:
                compiled(x1)
            assert "this refusal is cann_host's own" in str(caught.value)
            assert "What to do: " in str(caught.value)
        else:
            assert torch.equal(compiled(x1).cpu(), wanted)
    torch._dynamo.reset()
    assert torch.equal(compiled_in(mode, layer)(x1).cpu(), wanted)


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="a device does not notice")
@pytest.mark.parametrize("then", [assign_data, assign_same_format, assign_parameter, move])
def test_a_graph_captured_by_hand_is_not_replayed_on_a_replaced_weight(then: Change) -> None:
    torch.npu.config.allow_internal_format = True
    layer = unprepared(Ours)
    prepare(layer)
    x1 = cases.make(Case(m=4, k=64, n=48))["x1"].npu()
    layer(x1)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = layer(x1)
    graph.replay()
    assert torch.equal(out.cpu(), layer(x1).cpu())
    write_in_place(layer)
    graph.replay()
    assert torch.equal(out.cpu(), layer(x1).cpu())
    then(layer)
    with pytest.raises(RuntimeError, match=f"captured graph uses the memory .* that {OTHER}"):
        graph.replay()


def test_the_same_memory_in_another_parameter_is_the_same() -> None:
    layer = unprepared(Ours)
    x1 = cases.make(Case(m=4, k=64, n=48))["x1"].npu()
    layer(x1)
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        out = layer(x1)
    layer.weight = torch.nn.Parameter(layer.weight.data, False)
    graph.replay()
    assert torch.equal(out.cpu(), layer(x1).cpu())


def test_preparing_others_layers_after_something_was_compiled_warns() -> None:
    torch.npu.config.allow_internal_format = True
    torch._dynamo.reset()
    x1 = cases.make(Case(m=4, k=64, n=48))["x1"].npu()
    told = r"formats of weights changed after .*\(LinearQuant\).*torch\._dynamo\.reset\(\) now"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="use_internal_format_weight")
        prepare(unprepared(Vendors))  # nothing is compiled yet
        layer = unprepared(Ours)
        compiled_in(GE, layer)(x1)
        prepare(layer)
        prepare(layer)
    layer = unprepared(Vendors)
    with pytest.warns(UserWarning, match=told):
        prepare(layer)


@pytest.mark.slow
@pytest.mark.skipif(not cann_host.is_active(), reason="a device does not notice")
@pytest.mark.parametrize("kind", ["vendor"])  # ours has the format in its cache key
def test_a_cached_graph_takes_the_formats_of_its_first_run(kind: str, tmp_path: Path) -> None:
    """torchair notes them before it compiles the cached graph; after that run they stay."""
    for state in ("prepared", "plain"):
        said = run(f"cached.py formats {tmp_path / 'cache'} {kind} {state}")
        assert "compiled for FRACTAL_NZ" in said or state == "plain"
