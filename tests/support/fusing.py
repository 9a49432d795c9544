"""Functions compiled with fusions: the results, the operators that are left, and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchair
from torch import Tensor
from torch.fx import GraphModule

from lq_graph.fusion.editor import FusionReport
from lq_graph.fusion.passes import reports

MODES = ("GE", "npugraph_ex")
VIEWS = ("getitem", "reshape", "view", "slice", "split", "transpose", "squeeze", "sym_size")


class Fused(NamedTuple):
    """A compiled function that ran once.

    Attributes:
        results: of the function, on the CPU.
        names: of the operators in the graph.
        report: of the fusions.
    """

    results: Any
    names: list[str]
    report: FusionReport

    @property
    def kernels(self) -> list[str]:
        """The operators that are no views."""
        return [name for name in self.names if not any(view in name for view in VIEWS)]

    def reasons(self, fusion: str) -> list[str]:
        """Why a fusion was left, at each place."""
        return [
            line.why_not for line in self.report.lines if line.fusion == fusion and line.why_not
        ]


def compiled(
    function: Callable[..., Any],
    mode: str,
    dynamic: bool = False,
    **passes: Callable[..., None],
) -> Callable[..., Any]:
    """A function compiled for the NPU.

    Args:
        function: calls an operator of lq_graph.
        mode: one of MODES, or "reduce-overhead".
        dynamic: whether sizes are symbolic.
        passes: the user's own, `pre` and `post` of the fusions.
    """
    torch._dynamo.reset()
    named = {f"post_grad_custom_{name}_pass": one for name, one in passes.items()}
    given: dict[str, Any] = {"backend": mode, "options": named}
    if mode != "npugraph_ex":
        config = torchair.CompilerConfig()
        config.mode = {"GE": "max-autotune"}.get(mode, mode)
        for name, one in named.items():
            setattr(config, name, one)
        given = {"backend": torchair.get_npu_backend(compiler_config=config)}
    return torch.compile(function, dynamic=dynamic, fullgraph=True, **given)


def run(function: Callable[..., Any], mode: str, *inputs: Any, dynamic: bool = False) -> Fused:
    """Compile a function that calls an operator of lq_graph, and run it once on the NPU."""
    seen: list[list[str]] = []

    def post(module: GraphModule, *_: Any) -> None:
        seen.append([str(n.target) for n in module.graph.nodes if n.op == "call_function"])

    call = compiled(function, mode, dynamic, post=post)
    there = [one.npu() if isinstance(one, Tensor) else one for one in inputs]
    with torch.no_grad(), reports() as found:
        results = call(*there)
    on_cpu = torch.utils._pytree.tree_map_only(Tensor, lambda one: one.cpu(), results)
    return Fused(on_cpu, seen[0], found[0])
