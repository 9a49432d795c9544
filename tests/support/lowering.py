"""Compile with the real torchair, and the graphs that come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchair
from torch import Tensor, nn

from lq_graph import converters
from lq_graph.converters.graph import Graph

MATMUL = "QuantBatchMatmulV3"


def lower(
    model: nn.Module, *inputs: torch.Tensor, dynamic: bool = False
) -> tuple[torch.Tensor, Graph]:
    """Compile with the real torchair; the result and the one graph it became."""
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=config)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    with converters.graph.capture(config) as graphs:
        out = compiled(*inputs)
    (graph,) = graphs
    return out, graph


def compiled(function: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> tuple[Any, Any]:
    """The result of a function compiled by torchair, and the graph."""
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    backend = torchair.get_npu_backend(compiler_config=config)
    with converters.graph.capture(config) as graphs:
        out = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    return out, graphs[0]
