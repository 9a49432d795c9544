"""The kernels of a GE graph: the module that each is from, and its forecast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LinearQuantValueError
from ..forecast import KernelCost, kernel_cost

__all__ = ["KINDS", "Kernel", "Total", "kernels_of", "kind_of"]

# What a kernel does, by parts of its operator's name; the first that fits.
KINDS: dict[str, tuple[str, ...]] = {
    "matrix product": ("QuantBatchMatmul", "MatMul"),
    "attention": ("FlashAttention", "FusedInferAttention"),
    "norm, rope, quantize, activate": ("Norm", "Rotary", "Quant", "Swi", "Softmax", "Gelu"),
    "move": (
        "Broadcast",
        "Cast",
        "Concat",
        "Gather",
        "Pack",
        "Scatter",
        "Slice",
        "Split",
        "TensorMove",
        "Tile",
        "Transpose",
    ),
    "other": ("",),
}

_Tensor = tuple[str, tuple[int, ...] | None]  # dtype and shape
# Nodes whose output has the dtype and the shape of their input.
_PASSED_ON = {"Identity", "TensorMove"}
# Nodes whose output has the shape that their inputs broadcast to.
_ELEMENTWISE = {"Add", "Div", "Mul", "Neg", "Pow", "RealDiv", "Rsqrt", "Sub"}


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        op: GE operator.
        module: whose forward made it, by its qualified name; "" if the graph does not say.
        cost: its forecast; None if the operator cannot have one.
        is_sized: False if the graph lacks the size of a tensor, whose bytes then count as none.
        reads, writes: its tensors, as text.
    """

    op: str
    module: str
    cost: KernelCost | None
    is_sized: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes that it reads and writes; 0 if they are not known."""
        return int(self.cost.bytes) if self.cost else 0


@dataclass(frozen=True)
class Total:
    """The forecast of several kernels, one after the other.

    Attributes:
        launches: kernels.
        bytes: read and written.
        seconds: the sum.
        error: relative, as if all errors went one way.
        assumed: share of the seconds that is of kernels nobody has published a measurement of.
        unknown: kernels of which a size is not known: the sums have less than all of them.
    """

    launches: int
    bytes: int
    seconds: float
    error: float
    assumed: float
    unknown: int

    @staticmethod
    def of(kernels: Iterable[Kernel]) -> Total:
        """The sums."""
        every = list(kernels)
        costs = [kernel.cost for kernel in every if kernel.cost]
        seconds = sum(cost.seconds for cost in costs)
        wrong = sum(cost.seconds * cost.error for cost in costs)
        assumed = sum(cost.seconds for cost in costs if cost.assumed)
        return Total(
            len(every),
            sum(kernel.bytes for kernel in every),
            seconds,
            wrong / seconds if seconds else 0.0,
            assumed / seconds if seconds else 0.0,
            sum(not kernel.is_sized or not kernel.cost for kernel in every),
        )


def kind_of(op: str) -> str:
    """What a kernel does: a key of KINDS."""
    return next(kind for kind, parts in KINDS.items() if any(part in op for part in parts))


def kernels_of(graph: Any, product: str, modules: Mapping[str, str] | None = None) -> list[Kernel]:
    """The launches of a GE graph, in order.

    Args:
        graph: `lq_graph.converters.graph.Graph`.
        product: key of the product that the forecast is for.
        modules: the module of a node, by the node's name.
    """
    nodes = {node.name: node for node in graph.nodes}
    read = {(edge.source, edge.output) for node in graph.nodes for edge in node.inputs}
    names = modules or {}
    return [
        _kernel(node, nodes, read, names.get(node.name, ""), product) for node in graph.launches
    ]


def _kernel(
    node: Any, nodes: Mapping[str, Any], read: set[tuple[str, int]], module: str, product: str
) -> Kernel:
    inputs = [_tensor(edge, nodes) for edge in node.inputs]
    # an output that nothing reads and that has no shape is one that was not asked for
    outputs = [
        _output(node, i, nodes)
        for i, edge in enumerate(node.outputs)
        if edge.shape is not None or (node.name, i) in read
    ]
    cost = None
    with suppress(LinearQuantValueError):  # the operands of a product have no size
        cost = kernel_cost(node.op, inputs, outputs, product, attributes=node.attrs)
    return Kernel(
        node.op,
        module,
        cost,
        all(shape is not None for _, shape in (*inputs, *outputs)),
        tuple(map(str, node.inputs)),
        tuple(str(edge).partition(" ")[2] for edge in node.outputs),
    )


def _tensor(edge: Any, nodes: Mapping[str, Any]) -> _Tensor:
    """dtype and shape of an input. torchair records none for the nodes that its converters add."""
    if edge.shape is None and (source := nodes.get(edge.source)) is not None:
        return _output(source, edge.output, nodes)
    return _own(edge)


def _output(node: Any, number: int, nodes: Mapping[str, Any]) -> _Tensor:
    """dtype and shape of an output, from the node's inputs if it has none of its own."""
    edge = node.outputs[number]
    if edge.shape is not None:
        return _own(edge)
    if node.op == "Const":  # a scalar
        return edge.dtype, ()
    inputs = [_tensor(source, nodes) for source in node.inputs]
    if node.op in _PASSED_ON:
        return inputs[0]
    shapes = [shape for _, shape in inputs if shape is not None]
    if node.op in _ELEMENTWISE and len(shapes) == len(inputs):
        return edge.dtype, tuple(torch.broadcast_shapes(*shapes))
    return edge.dtype, None


def _own(edge: Any) -> _Tensor:
    if edge.shape is None or any(not isinstance(n, int) or n < 0 for n in edge.shape):
        return edge.dtype, None
    return edge.dtype, tuple(edge.shape)
