"""Running the fusions: where they run, what turns them off, and what they leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import lq_graph
from lq_graph.fusion.editor import Editor, storages_of, value_of
from lq_graph.fusion.passes import reports
from lq_graph.fusion.table import FUSIONS
from lq_graph.modules.fusion_options import FusionOptions, get_fusion, put_fusion
from support.fusing import MODES, compiled, run

_npu = torch.ops.npu


@pytest.fixture(autouse=True)
def default_options() -> Iterator[None]:
    yield
    put_fusion(None)


class Three(nn.Module):
    """Three quantized layers that read one tensor."""

    def __init__(self, scheme: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(64, 32, bias=False).half() for _ in range(3)]
        self.layers = nn.ModuleList(layers)
        scheme = scheme or lq_graph.A8W8Dynamic()
        batches = [torch.randn(4, 64).half()] if isinstance(scheme, lq_graph.A8W8Static) else None
        lq_graph.quantize(self, scheme, batches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("scheme", "quantization"),
    [
        (lq_graph.A8W8Dynamic(), "npu.npu_dynamic_quant.default"),
        (lq_graph.A4W4Dynamic(), "lq_graph.dynamic_quant.default"),
    ],
    ids=str,
)
def test_one_tensor_is_quantized_once(
    scheme: Any, quantization: str, dynamic: bool, mode: str
) -> None:
    model, x = Three(scheme).npu(), torch.randn(4, 64).half().npu()
    want = model(x).cpu()
    got, names, _ = run(model, mode, x, dynamic=dynamic)
    assert names.count(quantization) == 1
    assert sum("quant" in name for name in names) == 1 + 3
    assert torch.equal(got, want)


@pytest.mark.parametrize("factors", [(1, 1, 1), (1, 2, 1), (1, 2, 4)])
def test_layers_with_one_static_scale_share_the_quantization(factors: tuple[int, ...]) -> None:
    """Each has a scale of its own; equal ones are equal values in different tensors."""
    model, x = Three(lq_graph.A8W8Static()).npu(), torch.randn(4, 64).half().npu()
    for layer, factor in zip(model.layers, factors, strict=True):
        layer.input_scale = layer.input_scale * factor
    want = model(x).cpu()
    got, names, _ = run(model, "GE", x)
    assert names.count("lq_graph.static_quant.default") == len({*factors})
    assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_the_users_passes_run_too(mode: str) -> None:
    seen: list[str] = []

    def pre(module: GraphModule, *_: Any) -> None:
        seen.append("pre")
        assert any("lq_graph.dynamic_quant" in str(n.target) for n in module.graph.nodes)
        before = lq_graph.fuse(module)
        again = lq_graph.fuse(module)
        assert before.done("equal_quantizations") == 2
        assert (again.nodes_before, again.lines) == (before.nodes_after, [])

    def post(module: GraphModule, *_: Any) -> None:
        seen.append("post")

    model, x = Three().npu(), torch.randn(4, 64).half().npu()
    with torch.no_grad():
        got = compiled(model, mode, pre=pre, post=post)(x)
    assert seen == ["pre", "post"]
    assert torch.equal(got, model(x))


@pytest.mark.parametrize(
    ("variable", "count"), [("off", 0), ("exact", 2), ("on", 2), ("on,-equal_quantizations", 0)]
)
def test_the_environment_chooses(
    variable: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LQ_GRAPH_FUSION", variable)
    assert str(get_fusion()) == variable
    report = run(Three().npu(), "GE", torch.randn(4, 64).half()).report
    assert report.done("equal_quantizations") == count


@pytest.mark.parametrize("variable", ["", "yes", "on,equal_quantizations", "exact,-", "on,-none"])
def test_what_the_environment_may_not_say(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LQ_GRAPH_FUSION", variable)
    with pytest.raises(lq_graph.LinearQuantValueError, match=r"LQ_GRAPH_FUSION.*allowed are"):
        lq_graph.fuse(torch.fx.symbolic_trace(nn.Identity()))


def test_set_fusion() -> None:
    assert lq_graph.set_fusion(exact=True, off=["shapes"]) == FusionOptions(
        True, frozenset(["shapes"])
    )
    layer = lq_graph.LinearQuant(32, 32, output_dtype=torch.float16)
    assert repr(layer).endswith("fusion=exact,-shapes)")
    lq_graph.set_fusion()
    assert "fusion" not in repr(layer)
    with pytest.raises(lq_graph.LinearQuantValueError, match="no fusion is called norm; allowed"):
        lq_graph.set_fusion(off=["norm"])


def test_names_are_told_apart() -> None:
    names = [fusion.name for fusion in FUSIONS]
    assert len(set(names)) == len(names)
    assert all(fusion.exact or fusion.differs for fusion in FUSIONS)


def test_a_graph_without_our_layers_is_left_alone() -> None:
    def twice(x: Tensor) -> Tensor:
        one, _ = _npu.npu_dynamic_quant(x)
        two, _ = _npu.npu_dynamic_quant(x)
        return one + two

    with reports() as found, torch.no_grad():
        compiled(twice, "GE")(torch.randn(4, 64).half().npu())
    assert found == []


def test_a_tensor_that_is_written_between_is_quantized_twice() -> None:
    class Writes(Three):
        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            x.mul_(2)
            return first + self.layers[1](x)

    model, x = Writes().npu(), torch.randn(4, 64).half().npu()
    want = model(x.clone()).cpu()
    got, names, _ = run(model, "GE", x.clone())
    assert names.count("npu.npu_dynamic_quant.default") == 2
    assert torch.equal(got, want)


def test_a_new_node_is_written_if_the_one_before_was() -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        made = x + y
        made.add_(1)
        return made

    module = make_fx(write, tracing_mode="fake")(torch.ones(4), torch.ones(4))
    editor = Editor(module)
    (made,) = editor.calls(torch.ops.aten.add.Tensor)
    new = editor.call(torch.ops.aten.mul.Tensor, *made.args, before=made)
    assert storages_of(value_of(made)) <= editor.written
    assert not storages_of(value_of(new)) & editor.written
    editor.replace(made, new)
    assert storages_of(value_of(new)) <= editor.written
