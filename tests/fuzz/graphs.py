"""Graphs: serialized ModelDefs of real models, or of one operator, with changes.

The bytes of a graph decide its inputs: mostly inputs as its Data nodes describe them. In a
ConstPlaceHolder, an address from 0 to 7 in the file stands for that block of device memory.
"""

from __future__ import annotations

import ctypes
import inspect
import random
import zlib
from pathlib import Path
from typing import Any

from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

from cann_host.graph import compiler, executor

ND, NZ = 2, 29
BLOCKS = (65536, 4096, 1024, 512, 64, 16, 1 << 20, 16)
MOST_INPUT = 1 << 20  # bytes
SIZES = (0, 1, 1, 2, 3, 4, 8, 16, 17, 32, 64)
NUMBERS = (
    *range(-4, 12),
    *(15, 16, 17, 31, 32, 63, 64, 65, 255, 256, 1000, 4096, 65535, 65536, 1 << 20),
    *(
        sign * (1 << bits) + add
        for bits in (31, 32, 40, 62)
        for add in (-1, 0, 1)
        for sign in (-1, 1)
    ),
    *(-(1 << 63), (1 << 63) - 1),
)
REALS = (0.0, 1.0, -1.0, 0.5, 1e-30, 1e38, 1e308, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "none", "tanh", "NCHW", "NHWC", "constant", "reflect", "round", "x" * 300, "\0", "é")
ADDRESSES = (*range(8), 8, 4096, 1 << 46, -1, -(1 << 63))
# dtypes of the serialized form with the bytes of an element, where ge knows them
DTYPES = {1: 4, 2: 2, 3: 1, 4: 1, 5: 2, 7: 4, 8: 8, 10: 8, 11: 1, 12: 8, 27: 2}
INT32, INT64 = 7, 8


def _info(kind: int) -> int | None:
    """GE dtype of one of the serialized form; None if there is none."""
    try:
        return compiler._proto_dtype(kind)
    except (ValueError, AttributeError):
        return None


class Tensor(ctypes.Structure):
    """FuzzTensor of entry.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("dtype", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("placement", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("origin_rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("origin", ctypes.POINTER(ctypes.c_int64)),
    )


class Target:
    """The graph engine."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.blocks = []
        for size in BLOCKS:
            block = ctypes.c_void_p()
            assert library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(size), 0) == 0
            assert block.value is not None
            self.blocks.append(block.value)
        corpus = Path(__file__).parent / "corpus"
        self.seeds = [path.read_bytes() for path in sorted(corpus.glob("graph_*.pb"))]
        self.bytes = random.Random(0).randbytes(max(BLOCKS))

    # ---- making ----

    def make(self, rng: random.Random) -> bytes:
        model = ModelDef()
        if rng.random() < 0.5 or not self.seeds:
            _one_operator(rng, model.graph.add())
        else:
            model.ParseFromString(rng.choice(self.seeds))
        for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
            _mutate(rng, model)
        data = bytearray(model.SerializeToString())
        if rng.random() < 0.15:
            _mutate_bytes(rng, data)
        return bytes(data)

    # ---- running ----

    def run(self, data: bytes) -> bool:
        """Whether the graph was compiled and run."""
        for address, size in zip(self.blocks, BLOCKS, strict=True):
            ctypes.memmove(address, self.bytes, size)
        rng = random.Random(zlib.crc32(data))
        hostile, on_device = rng.random() < 0.4, rng.random() < 0.5
        inputs: list[Tensor] = []
        kept: list[Any] = []
        model = ModelDef()
        try:
            model.ParseFromString(data)
        except Exception:
            model = None
        if model is not None and model.graph:
            changed = False
            for node in model.graph[0].op:
                if node.type == "ConstPlaceHolder" and 0 <= node.attr["addr"].i < len(BLOCKS):
                    node.attr["addr"].i = self.blocks[node.attr["addr"].i]
                    changed = True
            if changed:
                data = model.SerializeToString()
            nodes = [node for node in model.graph[0].op if node.type in ("Data", "RefData")]
            nodes.sort(key=lambda node: node.attr["index"].i)
            inputs = [self.input(rng, node, on_device, hostile, kept) for node in nodes]
        array = (Tensor * len(inputs))(*inputs)
        given = rng.choice((0, 1, 2)) if hostile else rng.choice((0, 1))
        reached = self.library.fuzz_graph(
            ctypes.c_char_p(data),
            ctypes.c_size_t(len(data)),
            array,
            ctypes.c_size_t(len(inputs)),
            int(on_device),
            given,
        )
        return bool(reached == 3)

    def input(
        self, rng: random.Random, node: Any, on_device: bool, hostile: bool, kept: list[Any]
    ) -> Tensor:
        desc = node.output_desc[0] if node.output_desc else None
        kind = desc.dtype if desc is not None else 1
        dims = list(desc.shape.dim) if desc is not None else []
        form = desc.attr["format_for_int"].i if desc is not None else ND
        origin = None
        if desc is not None and desc.attr["origin_shape_initialized"].b:
            origin = list(desc.attr["origin_shape"].list.i)
        dims = [rng.choice((1, 2, 8, 16)) if size < 0 else size for size in dims]
        if form == NZ and origin and len(origin) > 1 and not dims:
            c0 = 32 // DTYPES.get(kind, 1)
            dims = [*origin[:-2], -(-origin[-1] // c0), -(-origin[-2] // 16), 16, c0]
        if hostile and rng.random() < 0.2:
            kind = rng.choice(list(DTYPES))
        if hostile and rng.random() < 0.2 and dims:
            dims[rng.randrange(len(dims))] = rng.choice(NUMBERS)
        dtype, width, size = _info(kind), DTYPES.get(kind, 4), 1
        for dim in dims:
            size *= dim
        size = min(max(size * width, 0), MOST_INPUT)
        if hostile and rng.random() < 0.1:
            size = rng.choice((0, 1, 16))
        if on_device:
            block = min((i for i, s in enumerate(BLOCKS) if s >= size), key=lambda i: BLOCKS[i])
            address = self.blocks[block]
        else:
            buffer = (ctypes.c_char * max(size, 1)).from_buffer_copy(self.bytes[: max(size, 1)])
            kept.append(buffer)
            address = ctypes.addressof(buffer)
        if hostile and rng.random() < 0.1:
            address = rng.choice((0, 4096)) if on_device else 0
            size = size if on_device else 0
        lists = [(ctypes.c_int64 * len(d))(*(_signed(v) for v in d)) for d in (dims, origin or [])]
        kept.extend(lists)
        rank = -1 if origin is None else len(origin)
        code = dtype if dtype is not None else 99
        pointers = [ctypes.cast(x, ctypes.POINTER(ctypes.c_int64)) for x in lists]
        return Tensor(
            address, size, code, _signed32(form), int(on_device), len(dims), rank, *pointers
        )


def _signed(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _signed32(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


# ---- a graph of one operator ----


def _describe(rng: random.Random, desc: Any, name: str, kind: int, dims: list[int]) -> None:
    desc.name, desc.dtype, desc.layout = name, kind, "ND"
    desc.shape.dim.extend(dims)
    desc.attr["format_for_int"].i = ND


def _one_operator(rng: random.Random, graph: Any) -> None:
    graph.name = "one"
    op = executor.OPS[rng.choice(sorted(executor.OPS))]
    node = graph.op.add(name="node", type=op.type)
    dims = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 4)))]
    kind = rng.choice((1, 1, 1, 2, 3, 7, 8, 11, 27, *DTYPES))
    parameters = inspect.signature(op.function).parameters.values()
    count = 0
    for parameter in parameters:
        name = executor._ge_name(parameter.name)
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty or rng.random() < 0.4:
                _set_attr(rng, node.attr[name], str(parameter.annotation))
            continue
        if parameter.default is not parameter.empty and rng.random() < 0.5:
            continue
        names = (
            [name]
            if name not in op.dynamic
            else [f"{name}{i}" for i in range(rng.choice((1, 2, 3)))]
        )
        for each in names:
            source = f"in{len(graph.op)}"
            shape = dims if rng.random() < 0.8 else [rng.choice(SIZES) for _ in range(2)]
            if name in op.host or rng.random() < 0.2:
                width_kind = rng.choice((INT32, INT64)) if name in op.host else kind
                _constant(rng, graph.op.add(name=source, type="Const"), width_kind, name in op.host,
                          shape, len(dims))  # fmt: skip
                made = width_kind
            else:
                data = graph.op.add(name=source, type="Data")
                data.attr["index"].i = count
                count += 1
                made = kind if rng.random() < 0.85 else rng.choice(list(DTYPES))
                shape = [-1 if rng.random() < 0.05 else size for size in shape]
                _describe(rng, data.output_desc.add(), "y", made, shape)
            node.input.append(f"{source}:0")
            _describe(rng, node.input_desc.add(), each, made, [])
    result = graph.op.add(name="out", type="NetOutput")
    for port in range(rng.choice((1, 1, 1, 2))):
        result.input.append(f"node:{port}")
        _describe(rng, result.input_desc.add(), f"input{port}", kind, dims)


def _constant(
    rng: random.Random, node: Any, kind: int, host: bool, dims: list[int], rank: int
) -> None:
    """Host values are mostly few and small: axes, shapes, sizes."""
    width = DTYPES[kind]
    if host:
        count = rng.choice((0, 1, 1, rank, rank, 2 * rank))
        pool = NUMBERS if rng.random() < 0.2 else (*range(-3, 5), 8, 16)
        values = [rng.choice(pool) % (1 << 8 * width) for _ in range(count)]
        dims = [count] if count != 1 or rng.random() < 0.5 else []
        data = b"".join(value.to_bytes(width, "little") for value in values)
    else:
        size = width
        for dim in dims:
            size *= dim
        size = min(size, 1 << 14)
        word = rng.choice((b"\0", b"\xff", b"\x80", b"\1\0\0\0", b"\0\0\0\x80", b"\x7f", None))
        data = rng.randbytes(size) if word is None else (word * size)[:size]
    value = node.attr["value"].t
    value.data = data
    _describe(rng, value.desc, "", kind, dims)
    _describe(rng, node.output_desc.add(), "y", kind, dims)


def _set_attr(rng: random.Random, attr: Any, annotation: str) -> None:
    small = rng.random() < 0.7
    if annotation == "bool":
        attr.b = rng.random() < 0.5
    elif annotation == "float":
        attr.f = rng.choice(REALS[:9])
    elif annotation == "str":
        attr.s = rng.choice(WORDS).encode()
    elif "Sequence" in annotation:
        pool = range(-2, 4) if small else NUMBERS
        attr.list.i.extend(rng.choice(pool) for _ in range(rng.choice((0, 1, 2, 4))))
    else:
        attr.i = rng.choice(range(-3, 30) if small else NUMBERS)


# ---- changes ----


def _mutate(rng: random.Random, model: Any) -> None:
    if not model.graph or not model.graph[0].op:
        model.graph.add().op.add(name="a", type="NetOutput")
        return
    graph = model.graph[0]
    node = rng.choice(list(graph.op))
    what = rng.randrange(14)
    if what == 0:
        node.type = rng.choice((*sorted(executor.OPS), "Data", "Const", "NetOutput", "None", ""))
    elif what == 1:
        node.name = rng.choice(list(graph.op)).name
    elif what == 2 and node.input:
        name = rng.choice(list(graph.op)).name
        ports = ("0", "1", "-1", "-7", "9" * 20, "", "x", "0:0")
        node.input[rng.randrange(len(node.input))] = rng.choice(
            ("", ":", name, *(f"{name}:{port}" for port in ports))
        )
    elif what == 3 and node.input:
        node.input.append(rng.choice(list(node.input)))
    elif what == 4 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif what == 5:
        graph.op.remove(node)
    elif what == 6:
        graph.op.add().CopyFrom(node)
    elif what in (7, 8):
        descs = [*node.output_desc, *node.input_desc]
        if descs:
            _mutate_desc(rng, rng.choice(descs))
    elif what in (9, 10) and node.attr:
        _mutate_attr(rng, node.attr[rng.choice(sorted(node.attr))])
    elif what == 11:
        other = rng.choice(list(graph.op))
        names = sorted(other.attr) + ["index", "value", "addr", "_x"]
        _mutate_attr(rng, node.attr[rng.choice(names)])
    elif what == 12:
        placeholder = graph.op.add(name=node.name if rng.random() < 0.7 else "p")
        placeholder.type = "ConstPlaceHolder"
        dims = [rng.choice(SIZES) for _ in range(2)]
        stored = [-(-dims[1] // 32), -(-dims[0] // 16), 16, 32] if rng.random() < 0.5 else dims
        placeholder.attr["addr"].i = rng.choice(ADDRESSES)
        placeholder.attr["dtype"].dt = rng.choice((0, 2, 3, 9))
        placeholder.attr["origin_shape"].list.i.extend(dims)
        placeholder.attr["storage_shape"].list.i.extend(stored)
        placeholder.attr["storage_format"].i = ND if stored is dims else NZ
        if rng.random() < 0.7:
            graph.op.remove(node)
    else:
        order = list(graph.op)
        rng.shuffle(order)
        copies = [type(node).FromString(each.SerializeToString()) for each in order]
        del graph.op[:]
        graph.op.extend(copies)


def _mutate_desc(rng: random.Random, desc: Any) -> None:
    what = rng.randrange(5)
    if what == 0:
        desc.dtype = rng.choice((*DTYPES, 0, 8, 22, 99))
    elif what == 1 and desc.shape.dim:
        desc.shape.dim[rng.randrange(len(desc.shape.dim))] = rng.choice(NUMBERS)
    elif what == 2:
        desc.shape.dim.append(rng.choice((*SIZES, -1)))
    elif what == 3:
        desc.attr["format_for_int"].i = rng.choice((ND, NZ, NZ, 0, 3, 4, -1, NUMBERS[-1]))
    else:
        desc.attr["origin_shape_initialized"].b = True
        desc.attr["origin_shape"].list.i.extend(rng.choice(SIZES) for _ in range(rng.randrange(4)))


def _mutate_attr(rng: random.Random, attr: Any) -> None:
    kind = attr.WhichOneof("value")
    if kind == "t" and rng.random() < 0.9:
        what = rng.randrange(4)
        if what == 0:
            attr.t.data = attr.t.data[: rng.randrange(len(attr.t.data) + 1)]
        elif what == 1:
            attr.t.data = attr.t.data + rng.randbytes(rng.choice((1, 4, 100)))
        elif what == 2:
            attr.t.data = b""
            _mutate_desc(rng, attr.t.desc)
        else:
            _mutate_desc(rng, attr.t.desc)
        return
    if kind is not None and rng.random() < 0.8:
        annotation = {"b": "bool", "f": "float", "s": "str", "list": "Sequence"}.get(kind, "int")
    else:
        annotation = rng.choice(("bool", "float", "str", "Sequence", "int"))
    _set_attr(rng, attr, annotation)


def _mutate_bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 4, 20))):
        if not data:
            return
        at = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.choice((1, 2, 8))]
        elif what == 2:
            data[at:at] = rng.choice((b"\xff" * 10, b"\x80" * 10, b"\0", rng.randbytes(4)))
        else:
            del data[at:]
