"""Every way torchair and torch offer to turn a LinearQuant model into something else."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
import torchair
from cases import BF16, F16, I8, I32, I64, Case
from test_module import module_for

import cann_host
import lq_graph

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
def test_what_cannot_be_captured_is_named() -> None:
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


CACHED = """
import sys, torch, torch_npu, torchair, lq_graph
torch.manual_seed(0)
class Model(torch.nn.Module):
    def __init__(self, output_dtype, cache):
        super().__init__()
        self.layer = lq_graph.LinearQuant(64, 32, bias=False, output_dtype=output_dtype).npu()
        self.layer.weight.data = torch.randint(-128, 128, (32, 64), dtype=torch.int8).npu()
        self.layer.scale.data = (torch.rand(32) * 1e-2).npu()
        config = torchair.CompilerConfig()
        self.run = torchair.inference.cache_compile(
            self.prompt, config=config, dynamic=False, cache_dir=cache)
    def prompt(self, x):
        return self.layer(x)
x = torch.randint(-128, 128, (4, 64), dtype=torch.int8).npu()
model = Model(getattr(torch, sys.argv[2]), sys.argv[1])
out = model.run(x)
assert torch.equal(out.cpu(), model.layer(x).cpu())
print(out.dtype)
"""


def test_cache_compile_is_used_by_the_next_process_and_kept_apart(tmp_path: Path) -> None:
    script, cache = tmp_path / "cached.py", tmp_path / "cache"
    script.write_text(CACHED)
    launcher = [] if os.environ.get("LQ_GRAPH_TEST_NPU") == "1" else ["-m", "cann_host"]

    def run(output_dtype: str) -> list[Path]:
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(cache), output_dtype],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"torch.{output_dtype}" in done.stdout
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
