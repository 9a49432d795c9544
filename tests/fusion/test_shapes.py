"""Views, transposes and casts that change nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import lq_graph
from lq_graph.modules.fusion_options import FusionOptions, fusion
from support.fusing import run

EXACT = FusionOptions(exact=True)

# function of x (2, 1, 3, 4): the operators that are left
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "view of a view": (lambda x: x.view(6, 4).view(3, 8) + 1, ["view", "add"]),
    "view to the same shape": (lambda x: x.view(2, 1, 3, 4) + 1, ["add"]),
    "views back": (lambda x: x.view(6, 4).view(2, 1, 3, 4) + 1, ["add"]),
    "expand to the same shape": (lambda x: x.expand(2, -1, 3, 4) + 1, ["add"]),
    "product with 1": (lambda x: x * 1.0 + 1, ["add"]),
    "product with 2": (lambda x: x * 2 + 1, ["mul", "add"]),
    "product with a tensor": (lambda x: x * x + 1, ["mul", "add"]),
    "two transposes that cancel": (lambda x: x.transpose(2, 3).transpose(3, 2) + 1, ["add"]),
    "two that do not": (
        lambda x: x.transpose(2, 3).transpose(0, 2) + 1,
        ["transpose", "transpose", "add"],
    ),
    "permutes that cancel": (
        lambda x: x.permute(3, 0, 1, 2).permute(1, 2, 3, 0) + 1,
        ["add"],
    ),
    "permutes that do not": (
        lambda x: x.permute(3, 0, 1, 2).permute(3, 0, 1, 2) + 1,
        ["permute", "permute", "add"],
    ),
    "a dim of size 1 moves": (lambda x: x.transpose(1, 2) + 1, ["reshape", "add"]),
    "a dim of size 1 moves, and others": (lambda x: x.transpose(0, 2) + 1, ["transpose", "add"]),
    "what is returned stays": (lambda x: x.transpose(1, 2), ["transpose"]),
    "a transpose with two readers": (
        lambda x: x.transpose(2, 3) + x.transpose(2, 3).transpose(2, 3).view(2, 1, 4, 3),
        ["transpose", "view", "add"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_left(name: str) -> None:
    function, wanted = CASES[name]
    x = torch.arange(24.0).view(2, 1, 3, 4)
    graph = make_fx(function, tracing_mode="fake")(x)
    lq_graph.fuse(graph, options=EXACT)
    left = [
        n.target._schema.name.removeprefix("aten::")
        for n in graph.graph.nodes
        if n.op == "call_function"
    ]
    assert sorted(left) == sorted(wanted)
    assert torch.equal(graph(x), function(x))


def test_sizes_that_only_run_time_knows() -> None:
    def function(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(x.shape[0], -1) + 1

    graph = make_fx(function, tracing_mode="symbolic")(torch.randn(5, 1, 3, 4))
    lq_graph.fuse(graph, options=EXACT)
    for m in (5, 7):
        x = torch.randn(m, 1, 3, 4)
        assert torch.equal(graph(x), function(x))


class Scaled(nn.Module):
    """A weight of one dim is the first operand of a product with three, as in Cohere's norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).half(), requires_grad=False)
        self.linear = nn.Linear(64, 32).half()
        lq_graph.quantize(self, lq_graph.A8W8Dynamic())

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.weight.float() * x.float()
        x = (1.5 - scaled).half()
        factor = self.weight.float().amax()  # of no dims: it makes no product float32
        x = x * (factor * x.amax(-1, keepdim=True))
        return self.linear(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("exact", [False, True])
def test_a_captured_graph_may_work_in_place(exact: bool) -> None:
    """Without all_dims, the product would be written into a tensor of one dim."""
    model = Scaled().npu()
    x = torch.randn(1, 1, 64).half()
    with fusion(FusionOptions(exact=exact)):
        found = run(model, "npugraph_ex", x)
    assert torch.equal(found.results, model(x.npu()).cpu())
    assert found.report.done("all_dims") == 1
