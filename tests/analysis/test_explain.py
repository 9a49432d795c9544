"""explain(): the story of a model, as text and as a page."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from lq_graph import (
    A8W8Dynamic,
    LinearQuant,
    LinearQuantTypeError,
    LinearQuantValueError,
    QuantizedLinear,
    command_line,
    explain,
    quantize,
)
from lq_graph.analysis.explain_layers import VENDOR_KERNELS
from lq_graph.rules.tables import Peak
from support import cases
from support.cases import BF16, F16, I32, Case
from support.layers import module_for, vendor_for
from support.processes import python

EXAMPLES = Path(__file__).parents[2] / "examples"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Model(nn.Module):
    """Two A8W8 layers, an A4W4 one, and one that quantizes its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = module_for(cases.make(Case(k=64, n=64, offset=True, bias=I32)))
        self.down = vendor_for(cases.make(Case(k=64, n=32, output=F16)))
        self.int4 = module_for(cases.make(Case(x=I32, k=64, n=32, output=F16)))
        dynamic = LinearQuant(32, 16, bias=False, pertoken_scale=True, output_dtype=BF16)
        self.dynamic = QuantizedLinear(dynamic)

    def forward(self, x: torch.Tensor, x4: torch.Tensor) -> torch.Tensor:
        return self.dynamic(self.down(self.up(x)) + self.int4(x4))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = cases.make(Case(m=4, k=64))["x1"]
    return x, cases.make(Case(x=I32, m=4, k=64, output=F16))["x1"]


@pytest.fixture(scope="module")
def story():
    return explain(Model(), inputs(), peak=Peak("a chip", 1e12, 1e9, "made up"))


def test_every_layer_is_explained(story) -> None:
    told = [(s.name, s.plan.m, s.plan.k, s.plan.n, s.weight_format) for s in story.layers]
    assert told == [
        ("up", 4, 64, 64, "FRACTAL_NZ"),
        ("down", 4, 64, 32, "FRACTAL_NZ"),
        ("int4", 4, 64, 32, "ND"),
        ("dynamic.linear", 4, 32, 16, "FRACTAL_NZ"),
    ]
    nodes = [(len(s.ours.compute), len(s.vendor.compute)) for s in story.layers]
    assert nodes == [(1, 3), (1, 3), (5, 13), (1, 2)]
    (whole,) = story.graphs
    assert whole.ops().count("QuantBatchMatmulV3") == 4


def test_the_figures_are_the_layers(story) -> None:
    up, _, int4, _ = story.layers
    assert up.macs == 4 * 64 * 64
    # x1, weight, packed scale, bias (the offset is in the scale), out
    assert up.bytes == 4 * 64 + 64 * 64 + 64 * 8 + 64 * 4 + 4 * 64
    assert up.intensity == pytest.approx(2 * up.macs / up.bytes)
    assert up.seconds == pytest.approx(up.bytes / 1e9) and up.bound == "memory"
    assert int4.bytes == 4 * 32 + 32 * 32 + 32 * 8 + 4 * 32 * 2


def test_text(story) -> None:
    text = str(story)
    second = text.splitlines()[1]
    assert second == "4 LinearQuant layers, 8 GE nodes (the vendor's module: 21)"
    assert re.search(r"^up +4 x 64 x 64 +int8 > int8 +5\.25 KiB +\d+\.\d\d +5\.38$", text, re.M)
    assert "a chip at 1 TOPS int8 and 1 GB/s (made up)" in re.sub(r"\s+", " ", text)
    assert "QuantBatchMatmulV3 transpose_x2 -> int8[4, 64]" in text


def test_the_model_is_left_as_it_was() -> None:
    model = Model()
    before = {key: (type(t), t.device.type, t.clone()) for key, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    explain(model, inputs())
    assert [type(m) for m in model.modules()] == kinds
    for key, tensor in model.state_dict().items():
        assert tensor.device.type == before[key][1] and torch.equal(tensor, before[key][2])


def test_a_model_without_quantized_layers_is_refused() -> None:
    with pytest.raises(LinearQuantValueError, match="no LinearQuant layer was called"):
        explain(nn.Linear(4, 4), (torch.ones(1, 4),))


def test_inputs_by_keyword_are_refused() -> None:
    with pytest.raises(LinearQuantTypeError, match="inputs are a mapping; allowed are a tensor"):
        explain(Model(), {"x": inputs()[0]})


def test_command_line(tmp_path: Path, capsys) -> None:
    page = tmp_path / "page.html"
    model = f"{EXAMPLES / 'graph_mode.py'}:example"
    assert command_line.main(["explain", model, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "3 LinearQuant layers, 7 GE nodes (the vendor's module: 19)" in shown
    assert page.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("graph_mode.py:example --batch 3", "--batch goes with a folder that has a config.json"),
        ("graph_mode.py", "is neither FILE.py:FUNCTION nor a folder"),
        ("absent.py:make", "there is no file absent.py"),
        ("no_such_module:make", "No module named 'no_such_module'"),
        ("math:pi", "math has no function pi"),
        ("os:getcwd", "os:getcwd returned str; it has to return the model and a tuple"),
    ],
)
def test_command_line_mistakes(model: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["explain", *model.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_device_it_says_what_to_do() -> None:
    command = ("-m", "lq_graph", "explain", "math:pi")
    done = python(*command, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 2 and "python -m cann_host -m lq_graph explain" in done.stderr


class Three(nn.Module):
    """Three layers that quantize one tensor."""

    def __init__(self) -> None:
        super().__init__()
        layers = [LinearQuant(32, 16, bias=False, pertoken_scale=True, output_dtype=F16)] * 3
        self.layers = nn.ModuleList(QuantizedLinear(copy.deepcopy(one)) for one in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def test_what_fused_is_said() -> None:
    told = explain(Three(), torch.randn(4, 32).half())
    launches = [[node.op for node in graphs[0].launches] for graphs in (told.unfused, told.graphs)]
    assert [ops.count("DynamicQuant") for ops in launches] == [3, 1]
    assert [ops.count("QuantBatchMatmulV3") for ops in launches] == [3, 1]  # merged
    assert told.launches == (len(launches[0]), len(launches[1]))
    assert f"whole model: {told.launches[0]} kernels without fusion, {told.launches[1]} with" in (
        str(told)
    )


class Layer(nn.Module):
    """A decoder layer without attention: a norm of a sum, SwiGLU, and a sum."""

    def __init__(self, is_read_again: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6).half()
        self.gate, self.up = (nn.Linear(32, 32, bias=False).half() for _ in range(2))
        self.down = nn.Linear(32, 32, bias=False).half()
        self.is_read_again = is_read_again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + x.relu()
        normed = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return x + normed if self.is_read_again else x


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, (False, False, True)))
        quantize(self.requires_grad_(False), A8W8Dynamic())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(scope="module")
def layered():
    return explain(Layers(), [torch.randn(4, 32).half()])


def test_each_layer_has_its_kernels(layered) -> None:
    assert [block.name for block in layered.blocks] == ["layers.0", "layers.1", "layers.2"]
    for way, graphs in (("unfused", layered.unfused), ("fused", layered.graphs)):
        counts = [getattr(block, way) for block in layered.blocks]
        assert sum(counts, Counter()) == Counter(node.op for g in graphs for node in g.launches)
    one, two, last = (block.fused for block in layered.blocks)
    assert one == two
    assert one["AddRmsNormDynamicQuant"] == one["DequantSwigluQuant"] == 1
    assert one["QuantBatchMatmulV3"] == 2 and one["DynamicQuant"] == 0
    assert last["AddRmsNormDynamicQuant"] == 0 and last["DynamicQuant"] == 1


def test_each_layer_says_what_fused_and_what_blocked_the_nearest(layered) -> None:
    rows = [block.fusions()[1:] for block in layered.blocks]
    done = [{str(row[0]): row[1] for row in lines if row[1]} for lines in rows]
    assert all(one["rms_norm"] == one["swiglu"] == 1 for one in done)
    assert done[0]["add_rms_norm_dynamic_quant"] == 1
    left = [[(row[0], row[4]) for row in lines if row[2]] for lines in rows]
    assert left[0] == left[1] == []
    ((name, why),) = left[2]
    assert name == "add_rms_norm_dynamic_quant"
    assert why == "aten.add.Tensor reads the norm too, which the operator does not give"


def test_layers_that_are_alike_are_shown_once(layered, tmp_path: Path) -> None:
    layered.html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text().replace("<wbr>", "")
    assert str(layered).count("\nlayers.[0-1] x2: ") == 1
    assert page.count("<h3>layers.[0-1]</h3>") == page.count("<h3>layers.2</h3>") == 1
    for shown in (re.sub(r"\s+", " ", str(layered)), page):
        assert "aten.add.Tensor reads the norm too" in shown
        assert "DequantSwigluQuant" in shown


@pytest.mark.slow
def test_the_vendors_layer_has_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchair

    from lq_graph import converters

    monkeypatch.syspath_prepend(BENCHMARKS)
    from vendor_layer import PagedLayer, step_inputs

    class Step(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(PagedLayer() for _ in range(count)).npu()

        def forward(self, x, residual, *others):
            for layer in self.layers:
                x, residual = layer(x, residual, *others)
            return x + residual

    found = []
    for count in (1, 2):
        torch._dynamo.reset()
        config = torchair.CompilerConfig()
        backend = torchair.get_npu_backend(compiler_config=config)
        with converters.graph.capture(config) as graphs, torch.no_grad():
            torch.compile(Step(count), backend=backend, dynamic=False)(*step_inputs(100))
        found.append(Counter(node.op for graph in graphs for node in graph.launches))
    assert found[1] - found[0] == VENDOR_KERNELS
