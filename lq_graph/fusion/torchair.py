"""torchair runs the fusions in each graph that holds one of our layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ..backends.compat import patterns_of_call
from ..backends.compat_npu import config_of_patterns
from ..ops import load
from .passes import fuse

__all__ = ["register"]

_DONE = "_lq_graph_fused"  # attribute of a graph module

# A compiler is there once its module is loaded; `register_replacement` is its public function.
# npugraph_ex is a package of its own in newer torch_npu; before, a mode of torchair.
_COMPILERS = {
    "torchair.npu_fx_compiler": "torchair",
    "npugraph_ex.npu_fx_compiler": "torch_npu.npu.npugraph_ex",
}
_known: set[str] = set()


def register() -> None:
    """Tell torchair and npugraph_ex, once each, if the program has imported them.

    Both offer `register_replacement`: a pattern, and a check of each match. Ours matches a
    quantized product; the check of the first match runs the fusions over the whole graph, and no
    match is replaced. So a user's own passes and patterns keep working.

    Where there is no register_replacement, set `post_grad_custom_pre_pass` to
    `lq_graph.fusion.passes.fuse`.
    """
    for compiler, public in _COMPILERS.items():
        if compiler in sys.modules and compiler not in _known:
            _known.add(compiler)
            if public == "torchair":
                load("converters:register")()  # before a fusion asks what torchair converts
            _register(getattr(import_module(public), "register_replacement", None))


def _register(register_replacement: Callable[..., None] | None) -> None:
    if register_replacement is None:
        return
    for pattern in patterns_of_call(torch.ops.lq_graph.linear_quant.default, "x1"):
        register_replacement(
            search_fn=_nothing,
            replace_fn=_nothing,
            example_inputs=[torch.empty(1)],
            extra_check=_run,
            search_fn_pattern=pattern,
        )


def _nothing(x1: Any) -> Any:
    return x1


def _run(match: Any) -> bool:
    module = match.ctx.graph.owning_module
    if not getattr(module, _DONE, False):
        setattr(module, _DONE, True)
        fuse(module, None, config_of_patterns())
    return False
