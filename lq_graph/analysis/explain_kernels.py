"""The kernels of a GE graph: the module that each is from, and its forecast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LinearQuantValueError
from ..forecast import KernelCost, kernel_cost
from ..forecast.operators import bytes_of

__all__ = ["KINDS", "Kernel", "Total", "kernels_of", "kind_of"]

# What a kernel does, by parts of its operator's name; the first that fits.
KINDS: dict[str, tuple[str, ...]] = {
    "matrix product": ("QuantBatchMatmul", "MatMul"),
    "attention": ("FlashAttention", "FusedInferAttention"),
    "norm, quantize, activate": ("Norm", "Quant", "Swi", "Softmax", "Gelu"),
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

_Tensor = tuple[str, tuple[int, ...]]  # dtype and shape
# Nodes whose output holds the bytes of their first input.
_SAME_BYTES = {
    "Bitcast",
    "ExpandDims",
    "Flatten",
    "Identity",
    "Reshape",
    "Squeeze",
    "TensorMove",
    "Unsqueeze",
}
# Nodes whose output has the shape that their inputs broadcast to.
_ELEMENTWISE = {"Add", "Div", "Mul", "Neg", "Pow", "RealDiv", "Rsqrt", "Sub"}


@dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
        op: GE operator.
        module: whose forward made it, by its qualified name; "" if the graph does not say.
        cost: its forecast; None if the graph lacks a size, or if the operator has no forecast.
        reads, writes: its tensors, as text.
    """

    op: str
    module: str
    cost: KernelCost | None
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
        unknown: kernels without a forecast, which the sums leave out.
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
            len(every) - len(costs),
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
        Kernel(
            node.op,
            names.get(node.name, ""),
            _cost(node, nodes, read, product),
            tuple(map(str, node.inputs)),
            tuple(str(edge).partition(" ")[2] for edge in node.outputs),
        )
        for node in graph.launches
    ]


def _cost(
    node: Any, nodes: Mapping[str, Any], read: set[tuple[str, int]], product: str
) -> KernelCost | None:
    inputs = _all_known(_tensor(edge, nodes) for edge in node.inputs)
    # an output that nothing reads and that has no shape is one that was not asked for
    outputs = _all_known(
        _known(edge) or _passed_on(node, nodes)
        for i, edge in enumerate(node.outputs)
        if edge.shape is not None or (node.name, i) in read
    )
    if inputs is None or outputs is None:
        return None
    try:
        return kernel_cost(node.op, list(_heads_first(node, inputs)), outputs, product)
    except LinearQuantValueError:  # a dtype or a size that has no forecast
        return None


def _all_known(tensors: Iterable[_Tensor | None]) -> list[_Tensor] | None:
    found = list(tensors)
    known = [tensor for tensor in found if tensor is not None]
    return known if len(known) == len(found) else None


def _heads_first(node: Any, inputs: list[_Tensor]) -> Iterator[_Tensor]:
    """The inputs; those of attention as (batch, heads, positions, head size)."""
    layout = node.attrs.get("input_layout", "")
    layout = layout.decode() if isinstance(layout, bytes) else layout
    heads = node.attrs.get("num_heads", 1)
    kv_heads = node.attrs.get("num_key_value_heads", 0) or heads
    for i, (dtype, shape) in enumerate(inputs):
        if i > 2 or kind_of(node.op) != "attention":
            yield dtype, shape
        elif layout.startswith("BSND") and len(shape) == 4:
            yield dtype, (shape[0], shape[2], shape[1], shape[3])
        elif layout.startswith("BSH") and len(shape) == 3:
            count = kv_heads if i else heads
            yield dtype, (shape[0], count, shape[1], shape[2] // count)
        else:
            yield dtype, shape


def _tensor(edge: Any, nodes: Mapping[str, Any]) -> _Tensor | None:
    """dtype and shape of an input. torchair records none for the nodes that its converters add."""
    source = nodes.get(edge.source)
    return _known(edge) or (_passed_on(source, nodes) if source is not None else None)


def _passed_on(node: Any, nodes: Mapping[str, Any]) -> _Tensor | None:
    """dtype and shape of the output of a node, from its inputs."""
    if node.op == "Const":
        return node.outputs[0].dtype, (1,)
    inputs = _all_known(_tensor(edge, nodes) for edge in node.inputs)
    if not inputs:
        return None
    if node.op in _ELEMENTWISE:
        shape = torch.broadcast_shapes(*(shape for _, shape in inputs))
        return node.outputs[0].dtype, tuple(shape)
    if not any(node.op.startswith(name) for name in _SAME_BYTES):
        return None
    if node.op == "Bitcast":
        dtype = node.outputs[0].dtype
        return dtype, (int(bytes_of(*inputs[0]) / bytes_of(dtype, (1,))),)
    return inputs[0]


def _known(edge: Any) -> _Tensor | None:
    if edge.shape is None or any(not isinstance(n, int) or n < 0 for n in edge.shape):
        return None
    return edge.dtype, tuple(edge.shape)
