"""A quantized layer in Inductor's graphs on the CPU: one operator instead of two.

A graph of torch.compile holds the two operators of a layer, as every backend wants them. Inductor
fuses neither, for it does not look into them. So a pass of its own puts lq_graph::quantized_linear
in their place, which is one call of the compiled kernel.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx

from .compat import add_inductor_kernel, add_inductor_pass, patterns_of_call

__all__ = ["register"]

_STRIDES = "eager_input_vals"
_REPEATED = (torch.ops.aten.view.default, torch.ops.lq_graph.quantized_linear.default)
_known = False


def register() -> None:
    """Tell Inductor, once, if the program has imported it."""
    global _known
    if not _known and "torch._inductor.compile_fx" in sys.modules:
        _known = True
        op = torch.ops.lq_graph.linear_quant.default
        add_inductor_pass("lq_graph", patterns_of_call(op, "x1"), _join)
        whole = torch.ops.lq_graph.quantized_linear.default
        add_inductor_kernel(whole, "lq_graph.backends.whole_layer:into")


def _join(match: Any, **_: Any) -> None:
    """Replace a linear_quant whose x1 a quantizer made; what nothing reads then, Inductor removes.
    Equal calls become one: parts of a merged layer each multiply by the whole weight."""
    node: fx.Node = match.output_node()
    given = _arguments(node)
    quantizer = _quantizer(given["x1"], given.get("pertoken_scale"))
    if quantizer is None or node.meta["val"].device.type != "cpu":
        return
    activations = _arguments(quantizer)
    x, weight = activations["x"], given["weight"]
    if not x.meta["val"].dim() == weight.meta["val"].dim() == 2:
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
    for other in weight.users:
        if other is not joined and _is_same(other, joined):
            first, second = sorted((other, joined))
            second.replace_all_uses_with(first)
            match.graph.erase_node(second)
            return


def _is_same(one: Any, other: Any) -> bool:
    """Whether two nodes, or arguments of nodes, are computed alike: nothing in such a graph is
    written in place."""
    if one is other:
        return True
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return type(one) is type(other) and bool(one == other)
    return (
        one.target is other.target
        and one.target in _REPEATED
        and len(one.args) == len(other.args)
        and one.kwargs == other.kwargs
        and all(map(_is_same, one.args, other.args))
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call, by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


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
