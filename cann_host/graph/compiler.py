"""From a serialized graph (ModelDef of torchair's ge_ir.proto) to a `CompiledGraph`."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from cann_host import watched
from cann_host.graph import executor, ops  # noqa: F401 - ops registers the operators
from cann_host.graph.compiled import CompiledGraph, TensorInfo, output_tensor
from cann_host.graph.device_memory import bytes_at, with_format
from cann_host.graph.executor import (
    DTYPES,
    FractalNZ,
    GraphError,
    Op,
    ShapeUnknownError,
    Value,
    torch_dtype,
)
from cann_host.graph.in_place import plan_writes
from cann_host.graph.inference import Inference
from cann_host.graph.origins import origins_of
from cann_host.graph.program import Slot, Step
from cann_host.memory import FRACTAL_NZ

__all__ = ["compile_graph", "ge_dtype"]

# attributes in which torchair stores the layouts of a node's tensors; data_format has the same
_LAYOUTS = frozenset({"input_layout_info", "output_layout_info"})
# nodes that hold or pass on tensors
_PASSIVE = frozenset({"Const", "Constant", "ConstPlaceHolder", "Data", "NetOutput", "RefData"})
_ENDS = frozenset({"NetOutput", "Cmo"})  # nodes that are needed although no other reads them


def _attributes(op: Op, node: Any) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for name, attr in node.attr.items():
        if name.startswith("_") or name in _LAYOUTS:  # attributes for torchair and GE only
            continue
        if name not in op.attrs:
            raise GraphError(
                f"node {node.name} ({node.type}): attribute {name} is not implemented by cann_host"
            )
        attrs[name] = _attribute(attr)
    return attrs


def _attribute(attr: Any) -> Any:
    kind = attr.WhichOneof("value")
    if kind is None:
        return None
    value = getattr(attr, kind)
    if kind == "s":
        return value.decode()
    if kind == "list":
        fields = [list(items) for _, items in value.ListFields() if not isinstance(items, int)]
        return fields[0] if fields else []
    return value


def _inputs(op: Op, node: Any) -> dict[str, Slot | list[Slot]]:
    inputs: dict[str, Slot | list[Slot]] = {}
    lists: dict[str, list[Slot]] = {name: [] for name in op.dynamic}
    # control edges, which have no descriptor, come first
    sources = [source for source in node.input if not source.endswith(":-1")]
    for position, source in enumerate(sources):
        producer, _, index = source.rpartition(":")
        if not source:  # an absent optional input
            continue
        slot = Slot(producer, int(index))
        name = node.input_desc[position].name if position < len(node.input_desc) else ""
        many = next((d for d in op.dynamic if name.removeprefix(d).isdecimal()), None)
        if many is not None:
            lists[many].append(slot)
        elif name in op.inputs and name not in op.dynamic:
            inputs[name] = slot
        else:
            raise GraphError(f"node {node.name} ({node.type}): unknown input {name or position}")
    return inputs | lists


def _data_info(node: Any) -> TensorInfo:
    desc = node.output_desc[0]
    shape = desc.shape.dim
    if desc.attr["origin_shape_initialized"].b:  # a tensor with an internal format
        shape = desc.attr["origin_shape"].list.i
    return TensorInfo(_proto_dtype(desc.dtype), tuple(shape))


def _proto_dtype(number: int) -> int:
    """GE dtype of a dtype of the serialized form, which has other numbers."""
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType
    from torchair.ge._ge_graph import DataType as GeDataType

    name = DataType.Name(number)
    return int(getattr(GeDataType, name))


def _constant(node: Any) -> Tensor:
    tensor = node.attr["value"].t
    dtype = torch_dtype(_proto_dtype(tensor.desc.dtype), f"constant {node.name}")
    shape = tuple(tensor.desc.shape.dim)
    if min(shape, default=0) < 0 or len(tensor.data) != math.prod(shape) * dtype.itemsize:
        raise GraphError(
            f"constant {node.name} of shape {shape} and {dtype} has {len(tensor.data)} bytes"
        )
    if not tensor.data:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(tensor.data), dtype=dtype).reshape(shape)


def compile_graph(model: bytes) -> CompiledGraph:
    """Check a serialized ModelDef and compile it.

    Raises:
        GraphError: an operator is unknown or refuses its inputs.
    """
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    parsed = ModelDef()
    parsed.ParseFromString(model)
    if not parsed.graph:
        raise GraphError("the model holds no graph")
    graph = parsed.graph[0]

    data: dict[int, Slot] = {}
    infos: dict[Slot, TensorInfo] = {}
    formats: dict[Slot, int] = {}
    constants: dict[Slot, Any] = {}
    borrowed: list[tuple[str, int, int]] = []
    steps: list[Step] = []
    outputs: list[Slot] = []
    declared: list[TensorInfo] = []
    nodes = _needed(graph.op)
    _check_known(graph, nodes)
    for node in nodes:
        slot = Slot(node.name, 0)
        if node.type in ("Data", "RefData"):
            data[node.attr["index"].i] = slot
            infos[slot] = _data_info(node)
            # the bits above hold sub-formats
            formats[slot] = node.output_desc[0].attr["format_for_int"].i & 0xFF
        elif node.type in ("Const", "Constant"):
            constants[slot] = _constant(node)
        elif node.type == "ConstPlaceHolder":
            constants[slot], address, size = _placeholder(node)
            borrowed.append((node.name, address, size))
        elif node.type == "NetOutput":
            sources = [source for source in node.input if not source.endswith(":-1")]
            for source, desc in zip(sources, node.input_desc, strict=True):
                producer, _, index = source.rpartition(":")
                outputs.append(Slot(producer, int(index)))
                declared.append(TensorInfo(_proto_dtype(desc.dtype), tuple(desc.shape.dim)))
        else:
            op = executor.find_op(node.type)
            after = frozenset(source.rpartition(":")[0] for source in node.input if source)
            steps.append(Step(op, node.name, _inputs(op, node), _attributes(op, node), after))
    if sorted(data) != list(range(len(data))):
        raise GraphError(f"graph inputs are numbered {sorted(data)}, not from 0 without gaps")
    inputs = [data[index] for index in range(len(data))]

    steps = _sorted(steps, {slot.node for slot in (*inputs, *constants)}, graph.name)
    places = [Slot(name, 0) for name, _, _ in borrowed]
    written = plan_writes(steps, {*inputs, *places}, outputs)
    static = all(info.known for info in infos.values())
    returns_one: dict[Step, bool] = {}
    if static:
        steps, returns_one = _predict(steps, constants, infos, formats, outputs, declared, places)
    static = static and all(info.known for info in declared)
    return CompiledGraph(
        graph.name,
        inputs,
        [infos[slot] for slot in inputs],
        [formats[slot] for slot in inputs],
        outputs,
        declared,
        constants,
        steps,
        returns_one,
        static,
        borrowed,
        watched.watch(address for _, address, _ in borrowed),
        written,
    )


def _placeholder(node: Any) -> tuple[Value, int, int]:
    """ConstPlaceHolder: a constant in the caller's memory, with its address and bytes."""
    attr = node.attr
    dtype = torch_dtype(attr["dtype"].dt, f"constant {node.name}")
    shape, storage = (tuple(attr[name].list.i) for name in ("origin_shape", "storage_shape"))
    address, form = attr["addr"].i, attr["storage_format"].i
    value = with_format(address, bytes_at(address), dtype, form, shape, storage)
    dims = storage if isinstance(value, FractalNZ) else shape
    return value, address, math.prod(dims) * dtype.itemsize


def _needed(nodes: Sequence[Any]) -> list[Any]:
    """Inputs, outputs, prefetches and the nodes that one of these needs, in order. GE removes the
    others too (ge.oo.deadCodeElimination)."""
    by_name = {node.name: node for node in nodes}
    needed = {node.name for node in nodes if node.type in ("Data", "RefData", *_ENDS)}
    waiting = list(needed)
    while waiting:
        for source in by_name[waiting.pop()].input:
            name = source.rpartition(":")[0]
            if name in by_name and name not in needed:
                needed.add(name)
                waiting.append(name)
    return [node for node in nodes if node.name in needed]


def _check_known(graph: Any, nodes: Sequence[Any]) -> None:
    """Refuse a graph with operators that cann_host does not have. Names all of them, each with the
    torch call it came from."""
    missing = [
        node for node in nodes if node.type not in executor.OPS and node.type not in _PASSIVE
    ]
    if not missing:
        return
    origins = origins_of(graph.name)
    lines = []
    for type_ in dict.fromkeys(node.type for node in missing):
        names = [node.name for node in missing if node.type == type_]
        origin = origins.get(names[0], "a call that torchair does not record")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"\n    op type {type_}, node {names[0]}{more}, from {origin}")
    raise GraphError(
        f"graph {graph.name} has operators that are not implemented by cann_host, the CPU stand-in "
        f"for CANN:{''.join(lines)}\n  It knows {', '.join(sorted(executor.OPS))}."
    )


def _sorted(steps: list[Step], known: set[str], graph: str) -> list[Step]:
    """The steps in an order in which every input is computed before it is read: the graph's own
    order, which decides between a write in place and a read that no edge connects, if it allows
    that."""
    missing = {step: len(step.after - known) for step in steps}
    readers: defaultdict[str, list[tuple[int, Step]]] = defaultdict(list)
    for at, step in enumerate(steps):
        for node in step.after - known:
            readers[node].append((at, step))
    ready = [(at, step) for at, step in enumerate(steps) if not missing[step]]  # a heap
    ordered: list[Step] = []
    while ready:
        ordered.append(heapq.heappop(ready)[1])
        for at, step in readers.pop(ordered[-1].node, ()):
            missing[step] -= 1
            if not missing[step]:
                heapq.heappush(ready, (at, step))
    if len(ordered) < len(steps):
        names = ", ".join(step.node for step in steps if missing[step])
        raise GraphError(f"graph {graph}: inputs of {names} are never computed")
    return ordered


def _predict(
    steps: list[Step],
    constants: dict[Slot, Any],
    infos: dict[Slot, TensorInfo],
    formats: dict[Slot, int],
    outputs: list[Slot],
    declared: list[TensorInfo],
    borrowed: Iterable[Slot],
) -> tuple[list[Step], dict[Step, bool]]:
    """Run a static graph on meta tensors: every operator checks its inputs, as GE does.

    Constant values are added to `constants` and their steps are removed; `declared` gets the shapes
    and dtypes that the operators really return, which torchair compares with torch's.

    Returns:
        The steps that every run computes, and `returns_one` of those that need no more checks.
    """
    values: dict[Slot, Any] = dict(constants)
    for slot in borrowed:  # what it holds now, a run may find changed
        values[slot] = executor.to_meta(values[slot])
    for slot, info in infos.items():
        dtype = torch_dtype(info.dtype, f"input {slot.node}")
        like = torch.empty(info.shape, dtype=dtype, device="meta")
        values[slot] = FractalNZ(like, None) if formats[slot] == FRACTAL_NZ else like
    inference = Inference()
    left: list[Step] = []
    returns_one: dict[Step, bool] = {}
    for step in steps:
        given = [_value(values, slot, f"node {step.node}") for slot in step.sources]
        try:
            result = inference.result(step, given)
        except ShapeUnknownError:
            return steps, {}  # shapes that depend on values: in GE such a graph is dynamic
        except Exception as error:
            raise step.failure(error) from (None if isinstance(error, GraphError) else error)
        results = {Slot(step.node, i): one for i, one in enumerate(executor.as_list(result))}
        values.update(results)
        if not any(executor.is_meta(one) for one in results.values()):
            constants.update(results)
            continue
        left.append(step)
        if executor.takes(step.op, given):
            returns_one[step] = not isinstance(result, list | tuple)
    for index, slot in enumerate(outputs):
        result = output_tensor(_value(values, slot, f"output {index}"), index)
        declared[index] = TensorInfo(
            ge_dtype(result, declared[index].dtype, index), tuple(result.shape)
        )
    return left, returns_one


def _value(values: dict[Slot, Any], slot: Slot, what: str) -> Any:
    if slot not in values:
        raise GraphError(f"{what}: node {slot.node} has no output {slot.port}")
    return values[slot]


def ge_dtype(result: Tensor, declared: int, index: int) -> int:
    """GE dtype of a result; the declared dtype decides between two dtypes with the same bits."""
    if DTYPES.get(declared) == result.dtype:
        return declared
    for code, dtype in DTYPES.items():
        if dtype == result.dtype:
            return code
    raise GraphError(f"output {index} has dtype {result.dtype}, which GE does not know")
