"""FX graphs of functions of npu tensors, fused, and what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from lq_graph.backends.compat import OpOverload
from lq_graph.fusion.editor import FusionReport
from lq_graph.fusion.options import FusionOptions
from lq_graph.fusion.passes import fuse

__all__ = ["calls_of", "fused", "outcomes", "traced"]


def traced(function: Callable[..., Any], *inputs: Any, dynamic: bool = False) -> GraphModule:
    """The function's graph of ATen operators with fake tensors, as torchair's passes get it."""
    mode: Literal["symbolic", "fake"] = "symbolic" if dynamic else "fake"
    with torch.no_grad():
        module = make_fx(function, tracing_mode=mode)(*inputs)
        if any(name.endswith("_.Scalar") for name in calls_of(module)):  # inside torch's rms_norm
            module = make_fx(torch.func.functionalize(module), tracing_mode=mode)(*inputs)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def fused(
    function: Callable[..., Any], *inputs: Any, dynamic: bool = False, **options: Any
) -> tuple[GraphModule, FusionReport]:
    """The fused graph, checked by FX, and what was done."""
    module = traced(function, *inputs, dynamic=dynamic)
    report = fuse(module, options=FusionOptions(**options))
    module.graph.lint()
    return module, report


def calls_of(module: GraphModule) -> Counter[str]:
    """How often each operator is called: "npu_rms_norm", "add.Tensor"."""
    names = (node.target for node in module.graph.nodes)
    return Counter(
        str(target).partition(".")[2].removesuffix(".default")
        for target in names
        if isinstance(target, OpOverload)
    )


def outcomes(report: FusionReport, *names: str) -> dict[str, list[str]]:
    """For each fusion that did anything: "" for each place done, the reason for each left."""
    found: dict[str, list[str]] = {}
    for line in report.lines:
        if not names or line.fusion in names:
            found.setdefault(line.fusion, []).append(line.why_not)
    return found
