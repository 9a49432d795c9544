"""Equal calls become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import lq_graph
from lq_graph.modules.fusion_options import FusionOptions


def written(x: Tensor) -> Tensor:
    before = x + 1
    x.add_(1)
    return before * (x + 1)


def written_result(x: Tensor) -> Tensor:
    one, two = x + 1, x + 1
    one.add_(1)
    return one * two


def random(x: Tensor) -> Tensor:
    return torch.rand_like(x) - torch.rand_like(x)


def checked(x: Tensor) -> Tensor:
    torch.ops.aten._assert_async.default((x == x).all())
    torch.ops.aten._assert_async.default((x == x).all())
    return x + 1


# function of x (4, 8): how many calls are left of how many
CASES: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "a chain": (lambda x: (x + 1).exp() * (x + 1).exp(), 3, 5),
    "other numbers": (lambda x: (x + 1) * (x + 2), 3, 3),
    "1 is not 1.0": (lambda x: (x + 1) * (x + 1.0), 3, 3),
    "other order": (lambda x: (x - x.exp()) * (x.exp() - x), 4, 5),
    "several results": (lambda x: x.max(0)[0] + x.max(0)[0], 4, 7),
    "other dtypes": (lambda x: x.half().float() * x.bfloat16().float(), 5, 5),
    "constants": (lambda x: x + torch.ones(8) * torch.ones(8), 3, 4),
    "memory without values": (lambda x: torch.empty_like(x).copy_(x) * torch.empty_like(x), 4, 4),
    "results that are returned": (lambda x: (x + 1, x + 1), 2, 2),
    "views that are returned": (lambda x: ((x + 1)[0], (x + 1)[1]), 4, 4),
    "a tensor that is written": (written, 4, 4),
    "a result that is written": (written_result, 4, 4),
    "random numbers": (random, 3, 3),
    "checks, which return nothing": (checked, 5, 7),
}


def calls(graph: GraphModule) -> int:
    return sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left(name: str) -> None:
    function, after, before = CASES[name]
    x = torch.randn(4, 8)
    graph = make_fx(function, tracing_mode="fake")(x)
    want = graph(x.clone())
    assert calls(graph) == before
    lq_graph.fuse(graph, options=FusionOptions(exact=True))
    assert calls(graph) == after
    if name not in ("random numbers", "memory without values"):
        torch.testing.assert_close(graph(x.clone()), want, rtol=0, atol=0)
