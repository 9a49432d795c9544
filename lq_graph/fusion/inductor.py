"""Inductor runs two passes of ours over its graphs; the second is for the CPU alone.

A graph of torch.compile holds the two operators of a layer, as every backend wants them. Inductor
fuses neither, for it does not look into them. So a pass puts lq_graph::quantized_linear in their
place, which is one call of the compiled kernel. Before it, `join_parts` makes one product of those
of a merged weight.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from ..backends.compat import add_inductor_kernel, add_inductor_pass, patterns_of_call
from .editor import arguments_of, value_of
from .join_parts import join_parts_of

__all__ = ["register"]

_STRIDES = "eager_input_vals"
_known = False


def register() -> None:
    """Tell Inductor, once, if the program has imported it."""
    global _known
    if not _known and "torch._inductor.compile_fx" in sys.modules:
        _known = True
        products = patterns_of_call(torch.ops.lq_graph.linear_quant.default, "x1")
        add_inductor_pass("joint_graph", "lq_graph_join_parts", products, join_parts_of)
        add_inductor_pass("post_grad", "lq_graph_whole_layers", products, _join)
        whole = torch.ops.lq_graph.quantized_linear.default
        add_inductor_kernel(whole, "lq_graph.backends.whole_layer:into")


def _join(match: Any, **_: Any) -> None:
    """Replace a linear_quant whose x1 a quantizer made; what nothing reads then, Inductor
    removes."""
    node: fx.Node = match.output_node()
    given = arguments_of(node)
    quantizer = _quantizer(given["x1"], given.get("pertoken_scale"))
    if quantizer is None or value_of(node).device.type != "cpu":
        return
    activations = arguments_of(quantizer)
    x, weight = activations["x"], given["weight"]
    if not value_of(x).dim() == value_of(weight).dim() == 2:
        return
    arguments = [
        x,
        weight,
        given["scale"],
        given.get("offset"),
        given.get("bias"),
        activations.get("scale_reciprocal"),
        activations.get("offset"),
    ]
    op = torch.ops.lq_graph.quantized_linear.default
    dtype = {"output_dtype": given.get("output_dtype")}
    with match.graph.inserting_before(node):
        joined = match.graph.call_function(op, tuple(arguments), dtype)
    # "eager_input_vals" tells Inductor the strides of the arguments, which are others here
    joined.meta.update((key, value) for key, value in node.meta.items() if key != _STRIDES)
    node.replace_all_uses_with(joined)
    match.graph.erase_node(node)


def _quantizer(x1: fx.Node, pertoken_scale: fx.Node | None) -> fx.Node | None:
    """The call of static_quant or dynamic_quant that made x1, and the pertoken_scale if there is
    one."""
    if pertoken_scale is None:
        return x1 if x1.target is torch.ops.lq_graph.static_quant.default else None
    if not x1.target is pertoken_scale.target is operator.getitem:
        return None
    source, scale_source = x1.args[0], pertoken_scale.args[0]
    assert isinstance(source, fx.Node)
    if source is not scale_source or (x1.args[1], pertoken_scale.args[1]) != (0, 1):
        return None
    return source if source.target is torch.ops.lq_graph.dynamic_quant.default else None
