"""The fusions of the table, run over a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.fx import GraphModule

from ..modules.fusion_options import FusionOptions
from .editor import CAPTURED, GE, Editor, FusionReport, layer_of
from .options import checked
from .quantizations import repeated_products
from .table import FUSIONS

__all__ = ["fuse", "reports"]

_listeners: list[Callable[[FusionReport], None]] = []


_FOR_MERGED = ("equal_quantizations", "equal_calls")  # merged layers need one of them
_KINDS = {"max-autotune": GE, "reduce-overhead": CAPTURED, "npugraph_ex": CAPTURED}


def fuse(
    module: GraphModule,
    inputs: object = None,
    config: object = None,
    *,
    options: FusionOptions | None = None,
) -> FusionReport:
    """Run the fusions over a graph of ATen, lq_graph's and torch_npu's operators, in place.

    torchair runs this by itself in every graph with a quantized layer. Call it in a pass of your
    own (`config.post_grad_custom_pre_pass`) to see the fused graph there, or where torchair's
    `pattern_fusion_pass` is off. A second run changes nothing.

    Args:
        module: the graph; its nodes have fake tensors in `meta["val"]`, else it is left alone.
        inputs: not read.
        config: torchair's, which says whether the graph becomes GE's or is captured; None if that
            is not known: then only what is right in both.
        options: default those of `get_fusion`.

    Raises:
        LinearQuantValueError: LQ_GRAPH_FUSION is not understood.

    Returns:
        What was done. The graph computes the same, up to the roundings that the table names.

    Source: post_grad_custom_pre_pass of Ascend/torchair, whose signature it has.
    """
    chosen = checked() if options is None else options
    del inputs
    mode = getattr(config, "mode", None)
    editor = Editor(module, _KINDS.get(getattr(mode, "value", ""), ""))
    unknown = editor.unknown()
    if chosen.enabled and unknown is not None:
        why = f"{unknown} has no fake tensor, so nothing of the graph is fused"
        editor.left(FUSIONS[0].name, unknown, why)
    elif chosen.enabled:
        for fusion in FUSIONS:
            if fusion.name not in chosen.off and (fusion.exact or not chosen.exact):
                fusion.run(editor)
        module.graph.lint()
        module.recompile()
    if _is_off(chosen, *_FOR_MERGED) and (repeated := repeated_products(editor)):
        warnings.warn(
            f"fuse: {repeated} products of merged layers are computed once for each layer, because "
            f"{' and '.join(_FOR_MERGED)} are off. What to do: leave one on; it changes no bit. Or "
            "do not merge.",
            stacklevel=2,
        )
    editor.report.nodes_after = editor.count()
    if _listeners:
        calls = (n for n in module.graph.nodes if n.op == "call_function")
        editor.report.modules = {node.name: layer_of(node) for node in calls}
    for listener in _listeners:
        listener(editor.report)
    return editor.report


def _is_off(options: FusionOptions, *names: str) -> bool:
    return not options.enabled or options.off.issuperset(names)


@contextmanager
def reports() -> Iterator[list[FusionReport]]:
    """The reports of all graphs that are compiled inside the block."""
    found: list[FusionReport] = []
    _listeners.append(found.append)
    try:
        yield found
    finally:
        _listeners.remove(found.append)
