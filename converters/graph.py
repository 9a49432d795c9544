"""Read the GE graph that torchair lowered a model to.

    config = torchair.CompilerConfig()
    with converters.graph.capture(config) as graphs:
        torch.compile(model, backend=torchair.get_npu_backend(compiler_config=config))(x)
    print(graphs[0])

Uses torchair's public graph dump (`config.debug.graph_dump`, type txt), which is protobuf text.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from ._torchair import GraphDef, LoweredError, ProtoDataType, dump_to, without_runs

__all__ = ["Edge", "Graph", "LoweredError", "Node", "capture", "read"]

# nodes that hold or pass on tensors and compute nothing
PASSIVE = frozenset({"Const", "ConstPlaceHolder", "Data", "FileConstant", "NetOutput", "RefData"})
# compute nodes that are no kernel on a device: the memory stays as it is
VIEWS = frozenset(
    {
        "Bitcast",
        "ExpandDims",
        "Flatten",
        "FlattenV2",
        "Identity",
        "Reshape",
        "Squeeze",
        "SqueezeV2",
        "SqueezeV3",
        "Unsqueeze",
        "UnsqueezeV2",
        "UnsqueezeV3",
    }
)
_FORMATS = {2: "ND", 29: "FRACTAL_NZ"}
# GE's dtype names that differ from torch's
_DTYPES = {"float": "float32", "bf16": "bfloat16", "double": "float64"}


@dataclass(frozen=True)
class Edge:
    """A tensor between two nodes.

    Attributes:
        shape: None if the graph does not have it; -1 or a symbol for a size that only run time
            knows.
        source: for an input, the name of the node that it comes from.
        output: which output of that node it is.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None
    format: str = "ND"
    source: str = ""
    output: int = 0

    def __str__(self) -> str:
        shape = "?" if self.shape is None else ", ".join(map(str, self.shape))
        layout = "" if self.format == "ND" else f" {self.format}"
        return f"{self.name} {self.dtype}[{shape}]{layout}"


@dataclass(frozen=True)
class Node:
    """One GE node. `inputs` does not list an optional input that is absent. `call` is the name of
    the call in the FX graph that it is from; "" if the graph does not say it."""

    op: str
    name: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    call: str = ""

    def __str__(self) -> str:
        flags = [key for key in ("transpose_x1", "transpose_x2") if self.attrs.get(key)]
        outputs = ", ".join(str(edge).partition(" ")[2] for edge in self.outputs)
        inputs = ", ".join(map(str, self.inputs))
        return f"{' '.join([self.op, *flags])} -> {outputs}\n    {inputs}"


@dataclass(frozen=True)
class Graph:
    """A lowered graph, nodes in order."""

    name: str
    nodes: tuple[Node, ...]

    @property
    def compute(self) -> tuple[Node, ...]:
        """The nodes that do work on the device."""
        return tuple(node for node in self.nodes if node.op not in PASSIVE)

    @property
    def launches(self) -> tuple[Node, ...]:
        """The compute nodes that are kernels on a device. GE's own fusions can make fewer.

        A TensorMove of a computed tensor that nothing else reads is none: GE deletes it
        (TensorMoveDeletePass, hicann/ge).
        """
        readers = Counter((edge.source, edge.output) for node in self.nodes for edge in node.inputs)
        passive = {node.name for node in self.nodes if node.op in PASSIVE}
        return tuple(
            node
            for node in self.compute
            if node.op not in VIEWS
            and not (
                node.op == "TensorMove"
                and all(
                    edge.source not in passive and readers[edge.source, edge.output] == 1
                    for edge in node.inputs
                )
            )
        )

    def ops(self) -> list[str]:
        """GE op types of the compute nodes, in order."""
        return [node.op for node in self.compute]

    def __str__(self) -> str:
        return "\n".join(str(node) for node in self.compute)


def read(path: str | Path) -> Graph:
    """Read a graph dump of type txt.

    Args:
        path: a file torchair wrote with `config.debug.graph_dump.type = "txt"`.

    Raises:
        google.protobuf.text_format.ParseError: the file is not such a dump.
    """
    proto = GraphDef()
    text_format.Parse(Path(path).read_text(), proto)
    produced = {
        f"{op.name}:{i}": _edge(desc) for op in proto.op for i, desc in enumerate(op.output_desc)
    }
    needed = _needed(proto)
    nodes = []
    for op in proto.op:
        if op.name not in needed:
            continue
        inputs = []
        # control edges, which have no descriptor, come first
        sources = [source for source in op.input if not source.endswith(":-1")]
        for source, desc in zip(sources, op.input_desc, strict=False):
            if not source:  # an optional input left out
                continue
            origin = produced.get(source)
            edge = origin or _edge(desc)
            name, _, output = source.rpartition(":")
            inputs.append(replace(edge, name=desc.name, source=name, output=int(output)))
        outputs = tuple(produced[f"{op.name}:{i}"] for i in range(len(op.output_desc)))
        attrs = {key: _attr(value) for key, value in op.attr.items() if not key.startswith("_")}
        nodes.append(Node(op.type, op.name, tuple(inputs), outputs, attrs, _call(op)))
    return Graph(proto.name, tuple(nodes))


def _needed(proto: GraphDef) -> set[str]:
    """Names of the nodes that some result needs; GE removes the others (deadCodeElimination)."""
    needed = {op.name for op in proto.op if op.type in ("NetOutput", "Data", "RefData")}
    for op in reversed(proto.op):  # producers come before what reads them
        if op.name in needed:
            needed.update(source.rpartition(":")[0] for source in op.input)
    return needed


@contextmanager
def capture(config: Any, *, run: bool = True) -> Iterator[list[Graph]]:
    """Collect the graphs that torchair lowers inside the block, in order.

    Args:
        config: the torchair.CompilerConfig that get_npu_backend got. Its graph_dump settings are
            restored at the end.
        run: False: a graph that is called raises `LoweredError` once it is lowered.

    Yields:
        A list, filled when the block ends.
    """
    graphs: list[Graph] = []
    with tempfile.TemporaryDirectory(prefix="lq_graph_") as folder:
        with dump_to(config, folder), nullcontext() if run else without_runs():
            yield graphs
        files = sorted(
            Path(folder).glob("dynamo_optimized_*.txt"), key=lambda file: file.stat().st_mtime_ns
        )
        graphs.extend(read(file) for file in files)


def _edge(desc: Any) -> Edge:
    """dtype, shape and format of a tensor descriptor. torchair stores the fake tensor that it
    lowered from in `_meta`, which has the shape before GE infers it."""
    number = desc.attr["format_for_int"].i if "format_for_int" in desc.attr else 2
    layout = _FORMATS.get(number, str(number))
    dtype = ProtoDataType.Name(desc.dtype).removeprefix("DT_").lower()
    dtype = _DTYPES.get(dtype, dtype)
    meta = desc.attr["_meta"].s.decode() if "_meta" in desc.attr else ""
    if found := re.search(r"shape=torch\.Size\(\[(.*?)\]\)", meta):
        sizes = [size.strip() for size in found[1].split(",") if size.strip()]
        shape = tuple(int(size) if size.isdigit() else size for size in sizes)
        return Edge(desc.name, dtype, shape, layout)
    dims = tuple(desc.shape.dim)
    return Edge(desc.name, dtype, dims or None, layout)


def _call(op: Any) -> str:
    """torchair names each tensor that a call returns: linear_quant_1-lq_graph....OUTPUT.0."""
    names = [d.attr["_fx_tensor_name"].s for d in op.output_desc if "_fx_tensor_name" in d.attr]
    call: str = names[0].decode().partition("-")[0] if names else ""
    return call


def _attr(value: Any) -> Any:
    """The one field that an attribute holds."""
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
