"""The graph engine's Python half: compiles serialized graphs into plans and runs them.

`libcann_host.so` (csrc/ge.cpp) calls in here through ctypes: once to compile a graph, then once per
run with the addresses of inputs and outputs. What the operators compute is in `executor`.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import math
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cann_host import watched
from cann_host._callbacks import give
from cann_host.graph import executor, ops  # noqa: F401 - ops registers the operators
from cann_host.graph.executor import (
    DTYPES,
    FractalNZ,
    GraphError,
    Op,
    ShapeUnknownError,
    Value,
    torch_dtype,
)
from cann_host.graph.origins import origins_of
from cann_host.memory import FRACTAL_NZ, over_memory
from lq_graph.kernels.numerics import NzWeight, nz_to_nd

__all__ = ["Plan", "compile_graph", "install", "is_installed", "live_plans"]

FORMAT_ND = 2
# Formats whose storage is the plain row-major tensor: NCHW, NHWC, ND, NCDHW, ...
_PLAIN_FORMATS = frozenset({0, 1, 2, 27, 30, 35, 47})
_INT64, _UINT64 = 9, 10
# torchair's notes on the layouts of a node's tensors; an operator's data_format says the same
_LAYOUTS = frozenset({"input_layout_info", "output_layout_info"})
# nodes that hold or hand over tensors
_PASSIVE = frozenset({"Const", "Constant", "ConstPlaceHolder", "Data", "NetOutput", "RefData"})


class Slot(NamedTuple):
    """Where a value of a plan lives: output number `port` of a node."""

    node: str
    port: int


@dataclass(frozen=True)
class Step:
    """One operator of a plan.

    Attributes:
        op: what it computes.
        node: name of the node, for messages.
        inputs: slot, or list of slots of a dynamic input, by input name.
        attrs: attributes by name.
        last_use: slots nobody reads after this step.
    """

    op: Op
    node: str
    inputs: dict[str, Slot | list[Slot]]
    attrs: dict[str, Any]
    last_use: list[Slot] = field(default_factory=list)

    def run(self, values: dict[Slot, Any], *, compiling: bool = False) -> list[Any]:
        """Compute the step's outputs from the values so far."""
        inputs = {
            name: [values[s] for s in slot] if isinstance(slot, list) else values[slot]
            for name, slot in self.inputs.items()
        }
        try:
            return executor.run_op(self.op, inputs, self.attrs, compiling=compiling)
        except ShapeUnknownError:
            raise
        except GraphError as error:
            raise GraphError(f"node {self.node} ({self.op.type}): {error}") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise GraphError(f"node {self.node} ({self.op.type}): {text}") from error


class TensorInfo(NamedTuple):
    """GE dtype and shape of a graph's input or output; -1 is a dim known only at run time."""

    dtype: int
    shape: tuple[int, ...]

    @property
    def known(self) -> bool:
        return all(dim >= 0 for dim in self.shape)


@dataclass
class Plan:
    """A compiled graph.

    Attributes:
        name: of the graph.
        inputs: slot of each graph input, in the order of the caller's inputs.
        constants: values known at compile time.
        steps: what is left to compute on every run.
        outputs: slots of the results.
        output_infos: what the summary says about them.
        is_static: whether every shape is known.
        borrowed: (name, address, bytes) of constants in the caller's memory.
        formats: of each graph input, as it was compiled.
        parameters: those whose memory `borrowed` is.
    """

    name: str
    inputs: list[Slot]
    constants: dict[Slot, Any]
    steps: list[Step]
    outputs: list[Slot]
    output_infos: list[TensorInfo]
    is_static: bool
    borrowed: list[tuple[str, int, int]] = field(default_factory=list)
    formats: list[int] = field(default_factory=list)
    parameters: list[watched.Watched] = field(default_factory=list)

    def run(self, inputs: Sequence[Value]) -> list[Tensor]:
        """Compute the graph's outputs.

        Args:
            inputs: one value per graph input.

        Returns:
            One tensor per graph output.
        """
        if len(inputs) != len(self.inputs):
            raise GraphError(f"the graph has {len(self.inputs)} inputs but got {len(inputs)}")
        for name, address, size in self.borrowed:
            if bytes_at(address) < size:
                raise GraphError(f"the memory of constant {name} was freed after compilation")
        values: dict[Slot, Any] = dict(self.constants)
        values.update(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            for index, value in enumerate(step.run(values)):
                values[Slot(step.node, index)] = value
            for slot in step.last_use:
                values.pop(slot, None)
        return [_output(values[slot], i) for i, slot in enumerate(self.outputs)]

    def check_unchanged(self, given: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """Refuse what a device would not notice: torchair says the formats of the inputs once, then
        only addresses, and no more of constants and of frozen parameters.

        Args:
            given: the tensors torchair was called with.
            addresses: that reached the graph.

        Raises:
            RuntimeError: one of them is not what the graph was compiled for.
        """
        todo = (
            "torch._dynamo.reset() after a weight was replaced, prepared or moved, and call again"
        )
        watched.check(f"graph {self.name}", self.parameters, todo)
        for slot, form, tensor, address in zip(
            self.inputs, self.formats, given, addresses, strict=False
        ):
            if tensor.device.type != "npu" or tensor.numel() == 0:
                continue
            name = f"input {slot.node} {tuple(tensor.shape)} of graph {self.name}"
            watched.check_format(name, form, tensor)
            if tensor.data_ptr() != address:
                watched.refuse_frozen(name, todo)


def _output(value: Value, index: int) -> Tensor:
    if isinstance(value, FractalNZ):
        value = value.nd
    if not isinstance(value, Tensor):
        raise GraphError(f"output {index} is int4, which torch cannot hold")
    return value


# ---- From the serialized graph to a plan ----


def _attributes(op: Op, node: Any) -> dict[str, Any]:
    attrs: dict[str, Any] = {}
    for name, attr in node.attr.items():
        if name.startswith("_") or name in _LAYOUTS:  # notes of torchair and GE
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
    many: list[Slot] = []
    # edges that only order, without a descriptor, come first
    sources = [source for source in node.input if not source.endswith(":-1")]
    for position, source in enumerate(sources):
        producer, _, index = source.rpartition(":")
        if not source:  # an absent optional input
            continue
        slot = Slot(producer, int(index))
        name = node.input_desc[position].name if position < len(node.input_desc) else ""
        if name in op.inputs and name != op.dynamic:
            inputs[name] = slot
        elif op.dynamic and name.removeprefix(op.dynamic).isdecimal():
            many.append(slot)
        else:
            raise GraphError(f"node {node.name} ({node.type}): unknown input {name or position}")
    if op.dynamic:
        inputs[op.dynamic] = many
    return inputs


def _data_info(node: Any) -> TensorInfo:
    desc = node.output_desc[0]
    shape = desc.shape.dim
    if desc.attr["origin_shape_initialized"].b:  # a tensor with an internal format
        shape = desc.attr["origin_shape"].list.i
    return TensorInfo(_proto_dtype(desc.dtype), tuple(shape))


def _proto_dtype(number: int) -> int:
    """GE dtype of a dtype of the serialized form, which counts differently."""
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


def compile_graph(model: bytes) -> Plan:
    """Check a serialized ModelDef and make a plan of it.

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
            steps.append(Step(op, node.name, _inputs(op, node), _attributes(op, node)))
    if sorted(data) != list(range(len(data))):
        raise GraphError(f"graph inputs are numbered {sorted(data)}, not from 0 without gaps")
    inputs = [data[index] for index in range(len(data))]

    steps = _sorted(steps, {*inputs, *constants}, graph.name)
    static = all(info.known for info in infos.values())
    if static:
        steps = _predict(steps, constants, infos, formats, outputs, declared)
    static = static and all(info.known for info in declared)
    _mark_last_uses(steps, outputs)
    return Plan(
        graph.name,
        inputs,
        constants,
        steps,
        outputs,
        declared,
        static,
        borrowed,
        [formats[slot] for slot in inputs],
        watched.watch(address for _, address, _ in borrowed),
    )


def _needed(nodes: Sequence[Any]) -> list[Any]:
    """Inputs, outputs and what some output depends on, in order. GE removes the rest too
    (ge.oo.deadCodeElimination)."""
    by_name = {node.name: node for node in nodes}
    needed = {node.name for node in nodes if node.type in ("NetOutput", "Data", "RefData")}
    waiting = list(needed)
    while waiting:
        for source in by_name[waiting.pop()].input:
            name = source.rpartition(":")[0]
            if name in by_name and name not in needed:
                needed.add(name)
                waiting.append(name)
    return [node for node in nodes if node.name in needed]


def _check_known(graph: Any, nodes: Sequence[Any]) -> None:
    """Refuse a graph with operators that are not here, all of them at once, each with the torch
    call it came from."""
    missing = [
        node for node in nodes if node.type not in executor.OPS and node.type not in _PASSIVE
    ]
    if not missing:
        return
    origins = origins_of(graph.name)
    lines = []
    for type_ in dict.fromkeys(node.type for node in missing):
        names = [node.name for node in missing if node.type == type_]
        origin = origins.get(names[0], "a call that torchair keeps no record of")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"\n    op type {type_}, node {names[0]}{more}, from {origin}")
    raise GraphError(
        f"graph {graph.name} has operators that are not implemented by cann_host, the CPU stand-in "
        f"for CANN:{''.join(lines)}\n  It knows {', '.join(sorted(executor.OPS))}."
    )


def _sources(step: Step) -> Iterable[Slot]:
    for slots in step.inputs.values():
        yield from slots if isinstance(slots, list) else [slots]


def _sorted(steps: list[Step], known: set[Slot], graph: str) -> list[Step]:
    """The steps in an order in which every input is computed before it is read."""
    nodes = {slot.node for slot in known}
    ordered: list[Step] = []
    waiting = steps
    while waiting:
        ready = []
        blocked = []
        for step in waiting:
            if all(slot.node in nodes for slot in _sources(step)):
                ready.append(step)
                nodes.add(step.node)
            else:
                blocked.append(step)
        if not ready:
            names = ", ".join(step.node for step in blocked)
            raise GraphError(f"graph {graph}: inputs of {names} are never computed")
        ordered += ready
        waiting = blocked
    return ordered


def _predict(
    steps: list[Step],
    constants: dict[Slot, Any],
    infos: dict[Slot, TensorInfo],
    formats: dict[Slot, int],
    outputs: list[Slot],
    declared: list[TensorInfo],
) -> list[Step]:
    """Run a static graph on meta tensors: every operator checks its inputs, as GE does.

    Values that turn out constant join `constants` and their steps go; `declared` takes the shapes
    and dtypes the operators really give, which torchair compares with what torch expects.

    Returns:
        The steps left to run.
    """
    values: dict[Slot, Any] = dict(constants)
    for slot, info in infos.items():
        dtype = torch_dtype(info.dtype, f"input {slot.node}")
        like = torch.empty(info.shape, dtype=dtype, device="meta")
        values[slot] = FractalNZ(like, None) if formats[slot] == FRACTAL_NZ else like
    left: list[Step] = []
    for step in steps:
        try:
            results = step.run(values, compiling=True)
        except ShapeUnknownError:
            return steps  # shapes that depend on values: GE makes such a graph a dynamic one
        slots = [Slot(step.node, index) for index in range(len(results))]
        values.update(zip(slots, results, strict=True))
        if any(executor.is_meta(result) for result in results):
            left.append(step)
        else:
            constants.update(zip(slots, results, strict=True))
    for index, slot in enumerate(outputs):
        result = _output(values[slot], index)
        declared[index] = TensorInfo(
            _ge_dtype(result, declared[index].dtype, index), tuple(result.shape)
        )
    return left


def _ge_dtype(result: Tensor, declared: int, index: int) -> int:
    """GE dtype of a result; the declared one decides between two with the same bits."""
    if DTYPES.get(declared) == result.dtype:
        return declared
    for code, dtype in DTYPES.items():
        if dtype == result.dtype:
            return code
    raise GraphError(f"output {index} has dtype {result.dtype}, which GE does not know")


def _mark_last_uses(steps: list[Step], outputs: list[Slot]) -> None:
    seen = set(outputs)
    for step in reversed(steps):
        fresh = {slot for slot in _sources(step) if slot not in seen}
        step.last_use.extend(fresh)
        seen |= fresh


# ---- The caller's memory ----


def _wrap(address: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > size or (needed and not address):
        raise GraphError(
            f"a tensor of shape {shape} takes {needed} bytes, and its memory has {size}"
        )
    if needed and address % dtype.itemsize:
        raise GraphError(f"a {dtype} tensor at {address:#x}, no multiple of its element's bytes")
    return over_memory(address, dtype, shape)


def _with_format(
    address: int,
    size: int,
    dtype: torch.dtype,
    form: int,
    shape: tuple[int, ...],
    storage: tuple[int, ...],
) -> Tensor | FractalNZ:
    form &= 0xFF  # the bits above hold sub-formats
    if form in _PLAIN_FORMATS:
        return _wrap(address, size, dtype, shape)
    if form != FRACTAL_NZ:
        raise GraphError(f"a tensor of shape {shape} has format {form}, which is not implemented")
    if len(storage) != len(shape) + 2:
        raise GraphError(f"a FRACTAL_NZ tensor of shape {shape} has storage shape {storage}")
    blocks = _wrap(address, size, dtype, storage)
    return FractalNZ(
        torch.empty(shape, dtype=dtype, device="meta"),
        storage,
        lambda: nz_to_nd(blocks, *shape[-2:]),
        NzWeight(blocks, *shape) if NzWeight.fits(blocks, shape) else None,
    )


def _placeholder(node: Any) -> tuple[Value, int, int]:
    """ConstPlaceHolder: a constant in the caller's memory, with its address and bytes."""
    attr = node.attr
    dtype = torch_dtype(attr["dtype"].dt, f"constant {node.name}")
    shape, storage = (tuple(attr[name].list.i) for name in ("origin_shape", "storage_shape"))
    address, form = attr["addr"].i, attr["storage_format"].i
    value = _with_format(address, bytes_at(address), dtype, form, shape, storage)
    dims = storage if isinstance(value, FractalNZ) else shape
    return value, address, math.prod(dims) * dtype.itemsize


def bytes_at(address: int) -> int:
    """How many bytes of device memory begin at an address; `install` replaces this."""
    del address
    return 0


class _GeTensor(ctypes.Structure):
    """cann_host_ge_tensor of csrc/ge.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("dtype", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("dim_count", ctypes.c_int32),
        ("origin_dim_count", ctypes.c_int32),
        ("has_origin", ctypes.c_int32),
        ("placement", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("origin_dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Bridge:
    """The three functions csrc/ge.cpp calls, and the plans they share."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.plans: dict[int, Plan] = {}
        self.numbers = itertools.count(1)
        lib.cann_host_ge_output.restype = ctypes.c_void_p
        lib.cann_host_ge_output.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_size_t,
            ctypes.c_size_t,
        ]
        lib.cann_host_ge_add_output.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int64),
            ctypes.c_size_t,
        ]
        lib.cann_host_ge_set_static.argtypes = [ctypes.c_void_p, ctypes.c_int]
        lib.cann_host_ge_fail.argtypes = [ctypes.c_char_p]
        for op in executor.OPS.values():
            self.announce(op)
        executor.announce = self.announce
        give(lib.cann_host_set_ge_executor, self.compile, self.run, self.release)
        # Past this point the interpreter is gone but torchair's statics still remove their graphs.
        atexit.register(give, lib.cann_host_set_ge_executor, None, None, None)

    def announce(self, op: Op) -> None:
        names = (op.type, ",".join(op.inputs), ",".join(sorted(op.attrs)))
        self.lib.cann_host_ge_register_op(*(name.encode() for name in names))

    def fail(self, error: BaseException) -> int:
        if isinstance(error, GraphError):
            text = f"cann_host: {error}"
        elif isinstance(error, watched.ReplacedError):
            text = str(error)
        else:
            text = "cann_host: " + "".join(traceback.format_exception(error))
        self.lib.cann_host_ge_fail(text.encode(errors="replace"))
        return 1

    def compile(self, model: int, size: int, summary: int, number: int) -> int:
        try:
            from torchair.core._backend import TorchNpuGraph

            watched.watch_torchair(TorchNpuGraph)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                plan = compile_graph(ctypes.string_at(model, size))
            self.lib.cann_host_ge_set_static(summary, plan.is_static)
            for info in plan.output_infos:
                self.lib.cann_host_ge_add_output(
                    summary, info.dtype, _int64s(info.shape), len(info.shape)
                )
            place = ctypes.c_uint64.from_address(number)
            place.value = next(self.numbers)
            self.plans[place.value] = plan
        except Exception as error:
            return self.fail(error)
        return 0

    def run(self, number: int, inputs: int, count: int, outputs: int) -> int:
        try:
            plan = self.plans[number]
            given = (_GeTensor * count).from_address(inputs) if count else ()
            # The caller may be inside `with torch.device("npu")` or a mode of its own.
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if (tensors := watched.given_inputs()) is not None:
                    plan.check_unchanged(tensors, [info.data or 0 for info in given])
                results = plan.run([_read(info) for info in given])
                for index, (result, info) in enumerate(
                    zip(results, plan.output_infos, strict=True)
                ):
                    if not self.write(outputs, index, result, info):
                        return 1
        except Exception as error:
            return self.fail(error)
        return 0

    def write(self, outputs: int, index: int, result: Tensor, info: TensorInfo) -> bool:
        result = result.contiguous()
        size = result.numel() * result.element_size()
        dtype = _ge_dtype(result, info.dtype, index)
        if dtype != info.dtype:
            raise GraphError(f"output {index} has GE dtype {dtype}; the graph says {info.dtype}")
        target = self.lib.cann_host_ge_output(
            outputs, index, dtype, _int64s(result.shape), result.dim(), size
        )
        if target is None:
            return False
        ctypes.memmove(target, result.data_ptr(), size)
        return True

    def release(self, number: int) -> int:
        self.plans.pop(number, None)
        return 0


def _int64s(dims: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(dims))(*dims)


def _read(tensor: _GeTensor) -> Value:
    dims = tuple(tensor.dims[: tensor.dim_count])
    shape = tuple(tensor.origin_dims[: tensor.origin_dim_count]) if tensor.has_origin else dims
    dtype = torch_dtype(tensor.dtype, "an input")
    return _with_format(tensor.data or 0, tensor.size, dtype, tensor.format, shape, dims)


_bridge: _Bridge | None = None


def install(lib: ctypes.CDLL) -> None:
    """Connect the native graph engine with this module. Later calls do nothing.

    Args:
        lib: libcann_host.so.
    """
    global _bridge, bytes_at
    if _bridge is not None:
        return
    lib.cann_host_bytes_at.argtypes = (ctypes.c_void_p,)
    lib.cann_host_bytes_at.restype = ctypes.c_uint64
    bytes_at = lib.cann_host_bytes_at
    lib.aclrtGetSocName.restype = ctypes.c_char_p
    executor.soc_name = lambda: lib.aclrtGetSocName().decode()
    executor.native = lambda: lib
    _bridge = _Bridge(lib)


def is_installed() -> bool:
    """Whether graphs of this process come here."""
    return _bridge is not None


def live_plans() -> int:
    """How many compiled graphs are alive."""
    return 0 if _bridge is None else len(_bridge.plans)
