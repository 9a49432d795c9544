"""Calls of aclnn, aclop and memory functions: JSON with a function's name and its arguments.

    {"op": "aclnnCast", "then": "launch", "arguments": [
        {"dims": [2, 4], "strides": [4, 1], "offset": 0, "storage": [8], "dtype": 0, "format": 2,
         "block": 0, "at": 0}, 2, ...]}

A tensor begins `at` bytes after the begin of a block of device memory; with block -1, `at` is its
address. null is an absent tensor, {"handle": n} a handle that was never made, {"real": x} a double,
{"flags": [...]} and {"ints": [...]} lists, {"tensors": [...]} a list of tensors, {"scalar": n} a
scalar, and a plain number an int64. `then` is the step after the first phase of an operator:

    launch, never     the second phase, or nothing
    twice             the same executor again, which must be refused
    freed             the memory of block 0 is freed before the launch, which must be refused
    other             another operator is launched with the executor
    handle, stream    the launch gets an executor, or a stream, that was never made
"""

from __future__ import annotations

import ctypes
import json
import random
from collections.abc import Callable
from typing import Any

I8, I32, U64, I64, F32, F16, BF16 = 2, 3, 10, 9, 0, 1, 27
WIDTH = {0: 4, 1: 2, 2: 1, 3: 4, 4: 1, 6: 2, 7: 2, 8: 4, 9: 8, 10: 8, 11: 8, 12: 1, 16: 8, 17: 16}
WIDTH.update({27: 2, 33: 4, 35: 1, 36: 1})
ND, NZ = 2, 29
BLOCKS = (16384, 16384, 4096, 4096, 1024, 512, 64, 16)
THEN = ("launch",) * 12 + ("twice", "freed", "other", "never", "handle", "stream")
NUMBERS = (
    *range(-3, 10),
    *(15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 512, 1024, 4096, 16384, 65535, 65536),
    *(
        sign * (1 << bits) + add
        for bits in (31, 32, 40, 62)
        for add in (-1, 0, 1)
        for sign in (-1, 1)
    ),
    *(-(1 << 63), (1 << 63) - 1),
)

Json = dict[str, Any]


def tensor(dims: tuple[int, ...], dtype: int, block: int, **changed: Any) -> Json:
    strides: list[int] = []
    step = 1
    for size in reversed(dims):
        strides.insert(0, step)
        step *= size
    made = dict(dims=list(dims), strides=strides, offset=0, storage=[step], dtype=dtype, format=ND)
    return {**made, "block": block, "at": 0, **changed}


def transposed(made: Json) -> Json:
    made["dims"][-2:] = made["dims"][:-3:-1]
    made["strides"][-2:] = made["strides"][:-3:-1]
    return made


def nz(made: Json) -> Json:
    """As FRACTAL_NZ; of the shape before it was transposed."""
    *batch, rows, columns = made["dims"]
    if made["strides"][-2:] == [1, rows]:
        rows, columns = columns, rows
    c0 = 32 // WIDTH.get(made["dtype"], 1) or 1
    made["storage"] = [*batch, -(-columns // c0), -(-rows // 16), 16, c0]
    made["format"] = NZ
    return made


def _quant_matmul(rng: random.Random) -> list[Any]:
    m, n, k = (rng.choice((1, 2, 8, 16, 17, 32, 64)) for _ in range(3))
    int4 = rng.random() < 0.3
    out, pertoken = rng.choice(((I8, 0), (F16, 0), (BF16, 0), (I32, 0), (BF16, 1), (F16, 1)))
    if int4:
        k = (k + 7) // 8  # words
    x1 = tensor((m, k), I32 if int4 else I8, 0)
    x2 = transposed(tensor((n, k), I32 if int4 else I8, 1))
    if rng.random() < 0.4:
        x2 = nz(x2)
    packed = out in (I8, F16) and not pertoken
    scale = tensor((rng.choice((1, n)),), U64 if packed else F32, 2)
    bias = tensor((n,), I32, 3) if rng.random() < 0.3 else None
    rows = tensor((m,), F32, 4) if pertoken else None
    offset = tensor(tuple(scale["dims"]), F32, 3) if out == I8 and rng.random() < 0.5 else None
    result = tensor((m, n), out, 1, at=8192)
    return [x1, x2, rows, scale, None, None, offset, None, bias, 0, 0, 0, result]


def _quant_matmul_v4(rng: random.Random) -> list[Any]:
    x1, x2, rows, scale, _, _, offset, _, bias, first, second, _, out = _quant_matmul(rng)
    return [x1, x2, scale, offset, rows, bias, first, second, out]


def _trans_quant_param(rng: random.Random) -> list[Any]:
    n = rng.choice((1, 3, 16, 100))
    shape = rng.choice(((n,), (1, n), (1,), (1, 1)))
    scale = tensor(shape, F32, 0)
    lengths = ((1,), (n,), (1, n), (1, 1))
    offset = tensor(rng.choice(lengths), F32, 2) if rng.random() < 0.5 else None
    out = rng.choice((shape, shape, (n,), (1, n)))
    return [scale, offset, rng.choice((0, 1)), tensor(out, rng.choice((U64, I64)), 1)]


def _shape(rng: random.Random, most: int = 4) -> tuple[int, ...]:
    return tuple(rng.choice((0, 1, 2, 3, 7, 8, 16)) for _ in range(rng.randrange(most + 1)))[:3]


def _copy(rng: random.Random) -> list[Any]:
    shape = _shape(rng)
    to, source = (tensor(shape, rng.choice(list(WIDTH)), block) for block in (0, 1))
    if len(shape) > 1 and rng.random() < 0.5:
        source = transposed(tensor((*shape[:-2], shape[-1], shape[-2]), source["dtype"], 1))
    return [to, source]


def _cast(rng: random.Random) -> list[Any]:
    out, source = _copy(rng)
    return [source, out["dtype"], out]


def _format_cast(rng: random.Random) -> list[Any]:
    shape = (*_shape(rng, 1), rng.choice((1, 16, 17, 32)), rng.choice((1, 8, 16, 33, 64)))
    dtype = rng.choice((I8, I32, F16, F32, I64))
    pair = [tensor(shape, dtype, 0), nz(tensor(shape, dtype, 1))]
    rng.shuffle(pair)
    return pair


def _size_and_format(rng: random.Random) -> list[Any]:
    return [tensor(_shape(rng), I8, 0), rng.choice((ND, NZ)), rng.choice((I8, I32, F16, U64))]


def _dynamic_quant(rng: random.Random) -> list[Any]:
    m, k = rng.choice((0, 1, 4)), rng.choice((8, 16, 64))
    int4 = rng.random() < 0.4
    y = tensor((m, k // 8 if int4 else k), I32 if int4 else I8, 1)
    offset = tensor((m,), F32, 3) if rng.random() < 0.5 else None
    return [tensor((m, k), rng.choice((F16, BF16)), 0), None, None, y["dtype"], y,
            tensor((m,), F32, 2), offset]  # fmt: skip


def _dynamic_quant_v3(rng: random.Random) -> list[Any]:
    *first, y, scale, offset = _dynamic_quant(rng)
    mode = rng.choice(("pertoken", "pertensor", "perchannel", "each"))
    return [*first, int(offset is None), mode, y, scale, offset]


def _dynamic_quant_v4(rng: random.Random) -> list[Any]:
    *first, y, scale, offset = _dynamic_quant_v3(rng)
    return [*first, {"real": 0.0}, y, scale, offset]


def _ascend_quant(rng: random.Random) -> list[Any]:
    m, k, dtype = rng.choice((1, 4)), rng.choice((8, 16, 64)), rng.choice((F16, BF16, F32))
    scale = tensor((rng.choice((1, k)),), dtype, 2)
    offset = {**scale, "block": 3} if rng.random() < 0.5 else None
    return [tensor((m, k), dtype, 0), scale, offset, 0, "round", I8, rng.choice((-1, 1)),
            tensor((m, k), I8, 1)]  # fmt: skip


def _rms_norm(rng: random.Random) -> list[Any]:
    m, k, dtype = rng.choice((1, 4)), rng.choice((1, 16, 64)), rng.choice((F16, BF16, F32))
    x, y = (tensor((m, k), dtype, block) for block in (0, 1))
    return [x, tensor((k,), dtype, 2), {"real": 1e-6}, y, tensor((m, 1), F32, 3)]


def _zero(rng: random.Random) -> list[Any]:
    return [tensor(_shape(rng), rng.choice(list(WIDTH)), 0)]


def _identity(rng: random.Random) -> list[Any]:
    """Of aclop: dims, storage dims and format come from the same description."""
    return _format_cast(rng) if rng.random() < 0.8 else _copy(rng)


def _memcpy(rng: random.Random) -> list[Any]:
    """Of device memory: block, at and bytes of both, and the bytes to copy."""
    size = rng.choice((1, 16, 64, 512))
    return [rng.randrange(5), 0, size, rng.randrange(5), 0, size]


def _memset(rng: random.Random) -> list[Any]:
    size = rng.choice((1, 16, 64, 512))
    return [rng.randrange(5), 0, size, rng.randrange(256), size]


MAKERS: dict[str, Callable[[random.Random], list[Any]]] = {
    "aclnnAscendQuant": lambda rng: [a for i, a in enumerate(_ascend_quant(rng)) if i != 6],
    "aclnnAscendQuantV3": _ascend_quant,
    "aclnnCast": _cast,
    "aclnnDynamicQuant": lambda rng: [
        a for i, a in enumerate(_dynamic_quant(rng)) if i not in (2, 3, 6)
    ],
    "aclnnDynamicQuantV2": _dynamic_quant,
    "aclnnDynamicQuantV3": _dynamic_quant_v3,
    "aclnnDynamicQuantV4": _dynamic_quant_v4,
    "aclnnInplaceCopy": _copy,
    "aclnnInplaceZero": _zero,
    "aclnnNpuFormatCast": _format_cast,
    "aclnnNpuFormatCastCalculateSizeAndFormat": _size_and_format,
    "aclnnQuantMatmulV4": _quant_matmul_v4,
    "aclnnQuantMatmulV5": _quant_matmul,
    "aclnnQuantMatmulWeightNz": _quant_matmul,
    "aclnnRmsNorm": _rms_norm,
    "aclnnTransQuantParamV2": lambda rng: [
        a for a in _trans_quant_param(rng) if type(a) is not int
    ],
    "aclnnTransQuantParamV3": _trans_quant_param,
    "Identity": _identity,
    "aclrtMemcpy": _memcpy,
    "aclrtMemcpyAsync": _memcpy,
    "aclrtMemset": _memset,
}


def _mutate_tensor(rng: random.Random, made: Json) -> Any:
    what = rng.randrange(12)
    field = rng.choice(("dims", "strides", "storage"))
    values = made[field]
    if what < 5 and values:
        values[rng.randrange(len(values))] = rng.choice(NUMBERS)
    elif what == 5:  # ranks no longer agree with what the operator expects
        size = rng.choice((0, 1, 2, 16))
        for name in ("dims", "strides"):
            made[name].insert(0, size)
    elif what == 6 and made["dims"]:
        made["dims"].pop(0), made["strides"].pop(0)
    elif what == 7:
        made["offset"] = rng.choice(NUMBERS)
    elif what == 8:
        made["dtype"] = rng.choice((*WIDTH, 5, 13, 28, 29, 99, -1))
    elif what == 9:
        return nz(made) if len(made["dims"]) > 1 and rng.random() < 0.7 else {**made, "format": 3}
    elif what == 10:
        made["block"], made["at"] = (
            rng.randrange(len(BLOCKS)),
            rng.choice((0, 1, 8, 100, -16, 4096)),
        )
    elif rng.random() < 0.5:
        made["block"], made["at"] = -1, rng.choice((0, 1, 4096, 1 << 46, (1 << 63) - 1))
    elif len(made["dims"]) > 1:
        return transposed(made)
    return made


def _mutate(rng: random.Random, arguments: list[Any]) -> None:
    at = rng.randrange(len(arguments))
    value = arguments[at]
    if isinstance(value, dict) and "dims" in value:
        chance = rng.random()
        if chance < 0.06:
            arguments[at] = None
        elif chance < 0.1:
            arguments[at] = {"handle": rng.choice((1, 8, 0x5A5A5A5A5A5A))}
        else:
            arguments[at] = _mutate_tensor(rng, value)
    elif isinstance(value, int):
        arguments[at] = rng.choice(NUMBERS)
    elif isinstance(value, dict) and "real" in value:
        arguments[at] = {"real": rng.choice((0.0, -1.0, 1e308, float("inf"), float("nan")))}
    elif isinstance(value, dict) and "flags" in value:
        arguments[at] = {"flags": [rng.choice((0, 1)) for _ in range(rng.randrange(4))]}
    elif isinstance(value, dict) and "ints" in value:
        arguments[at] = {"ints": [rng.choice(NUMBERS) for _ in range(rng.randrange(4))]}
    elif isinstance(value, dict) and "tensors" in value:
        _mutate(rng, value["tensors"]) if value["tensors"] and rng.random() < 0.7 else (
            value["tensors"].append(tensor(_shape(rng), F16, 0))
        )
    elif isinstance(value, str):
        arguments[at] = rng.choice(("", "floor", "round" * 100, None))
    else:
        arguments[at] = tensor(_shape(rng), rng.choice(list(WIDTH)), rng.randrange(len(BLOCKS)))


class Target:
    """The library to call, and the memory of the calls."""

    def __init__(self, library: Any) -> None:
        self.library = library
        library.aclCreateTensor.restype = ctypes.c_void_p
        library.aclCreateTensorDesc.restype = ctypes.c_void_p
        for kind in ("BoolArray", "IntArray", "Scalar", "TensorList"):
            getattr(library, f"aclCreate{kind}").restype = ctypes.c_void_p
        library.aclCreateDataBuffer.restype = ctypes.c_void_p
        self.blocks = [self.allocate(size) for size in BLOCKS]
        self.bytes = random.Random(0).randbytes(max(BLOCKS))

    def allocate(self, size: int) -> int:
        block = ctypes.c_void_p()
        assert self.library.aclrtMalloc(ctypes.byref(block), ctypes.c_size_t(size), 0) == 0
        assert block.value is not None
        return block.value

    def make(self, rng: random.Random) -> bytes:
        """A valid call with zero to three changes."""
        op = rng.choice(list(MAKERS))
        arguments = MAKERS[op](rng)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            _mutate(rng, arguments)
        return json.dumps({"op": op, "then": rng.choice(THEN), "arguments": arguments}).encode()

    def run(self, data: bytes) -> bool:
        """Run a call. Returns whether every step was accepted."""
        call = json.loads(data)
        for address, size in zip(self.blocks, BLOCKS, strict=True):
            ctypes.memmove(address, self.bytes, size)
        ctypes.memset(self.blocks[-1], 0, BLOCKS[-1])  # for indices
        op, arguments = call["op"], call["arguments"]
        if op == "Identity":
            return self.identity(*arguments)
        if op.startswith("aclrt"):
            return self.memory(op, arguments)
        tensors: list[ctypes.c_void_p] = []
        others: list[tuple[str, ctypes.c_void_p]] = []
        passed: list[Any] = []
        own = self.allocate(16384) if call["then"] == "freed" else None
        for value in arguments:
            if not isinstance(value, dict) or value.keys() & {"handle", "real"}:
                passed.append(_plain(value))
            elif "dims" in value:
                handle = self.tensor(value, own)
                if handle is None:  # refused already
                    break
                tensors.append(handle)
                passed.append(handle)
            else:
                kind, handle = self.list_or_scalar(value, own)
                others.append((kind, handle))
                passed.append(handle)
        accepted = len(passed) == len(arguments) and self.call(op, call["then"], passed, own)
        for handle in tensors:
            assert self.library.aclDestroyTensor(handle) == 0
        for kind, handle in others:
            assert getattr(self.library, f"aclDestroy{kind}")(handle) == 0
        if tensors and call["then"] == "handle":
            assert self.library.aclDestroyTensor(tensors[0]) != 0  # no longer one
        if own is not None and self.library.cann_host_bytes_at(ctypes.c_void_p(own)):
            self.library.aclrtFree(ctypes.c_void_p(own))
        return accepted

    def address(self, value: Json, own: int | None = None) -> ctypes.c_void_p:
        block = value["block"]
        begin = 0 if block < 0 else own if own is not None and block == 0 else self.blocks[block]
        return ctypes.c_void_p((begin + value["at"]) % (1 << 64))

    def list_or_scalar(self, value: Json, own: int | None) -> tuple[str, ctypes.c_void_p]:
        """What aclDestroy calls its kind, and the handle."""
        ((name, content),) = value.items()
        if name == "scalar":
            number = ctypes.c_double(content)
            made = self.library.aclCreateScalar(ctypes.byref(number), 11)
            return "Scalar", ctypes.c_void_p(made)
        if name == "tensors":
            members = [
                self.tensor(one, own) if isinstance(one, dict) and "dims" in one else None
                for one in content
            ]
            handles = [member for member in members if member is not None]
            listed: Any
            kind, listed = "TensorList", (ctypes.c_void_p * len(handles))(*handles)
        elif name == "flags":
            kind, listed = "BoolArray", (ctypes.c_bool * len(content))(*map(bool, content))
        else:
            kind, listed = "IntArray", _int64s(content)
        made = getattr(self.library, f"aclCreate{kind}")(listed, ctypes.c_uint64(len(listed)))
        return kind, ctypes.c_void_p(made)

    def tensor(self, value: Json, own: int | None) -> ctypes.c_void_p | None:
        dims, strides, storage = (_int64s(value[n]) for n in ("dims", "strides", "storage"))
        rank, stored = (ctypes.c_uint64(len(value[n])) for n in ("dims", "storage"))
        address, offset = self.address(value, own), ctypes.c_int64(value["offset"])
        made = self.library.aclCreateTensor(
            dims, rank, value["dtype"], strides, offset, value["format"], storage, stored, address
        )
        return None if made is None else ctypes.c_void_p(made)

    def call(self, op: str, then: str, passed: list[Any], own: int | None) -> bool:
        if op == "aclnnNpuFormatCastCalculateSizeAndFormat":
            dims, rank, form = ctypes.POINTER(ctypes.c_int64)(), ctypes.c_uint64(), ctypes.c_int()
            outputs = (dims, rank, form)
            code = getattr(self.library, op)(*passed, *map(ctypes.byref, outputs))
            if code == 0:
                assert all(size >= 0 for size in dims[: rank.value])
                self.library.fuzz_free_dims(dims)
            return bool(code == 0)
        size, executor = ctypes.c_uint64(), ctypes.c_void_p()
        prepare = getattr(self.library, f"{op}GetWorkspaceSize")
        if prepare(*passed, ctypes.byref(size), ctypes.byref(executor)):
            return False
        launch = getattr(self.library, op)
        if then == "never":
            return True
        if then == "handle":
            executor = ctypes.c_void_p(0x5A5A5A5A5A5A)
        if then == "freed":
            self.library.aclrtFree(ctypes.c_void_p(own))
        if then == "other":
            launch = self.library.aclnnInplaceZero if op != "aclnnInplaceZero" else (
                self.library.aclnnCast
            )  # fmt: skip
        stream = ctypes.c_void_p(8 if then == "stream" else None)
        code = launch(None, ctypes.c_uint64(0), executor, stream)
        if then == "twice":
            assert launch(None, ctypes.c_uint64(0), executor, stream) != 0
        return bool(code == 0)

    def identity(self, *pair: Any) -> bool:
        descs, buffers = [], []
        for value in pair:
            if not isinstance(value, dict) or "dims" not in value:
                descs.append(ctypes.c_void_p(None if value is None else value["handle"]))
                buffers.append(ctypes.c_void_p(None))
                continue
            dims, storage = _int64s(value["dims"]), _int64s(value["storage"])
            desc = ctypes.c_void_p(
                self.library.aclCreateTensorDesc(value["dtype"], len(dims), dims, ND)
            )
            self.library.aclSetTensorFormat(desc, value["format"])
            self.library.aclSetTensorShape(desc, len(storage), storage)
            descs.append(desc)
            size = ctypes.c_size_t(value["offset"] % (1 << 64) or 16384)
            made = self.library.aclCreateDataBuffer(self.address(value), size)
            buffers.append(ctypes.c_void_p(made))
        lists = [(ctypes.c_void_p * 1)(item) for item in (*descs, *buffers)]
        source, target, source_data, target_data = lists
        code = self.library.aclopCompileAndExecute(
            b"Identity", 1, source, source_data, 1, target, target_data, None, 0, 0, None, None
        )
        for value, desc, buffer in zip(pair, descs, buffers, strict=True):
            if isinstance(value, dict) and "dims" in value:
                self.library.aclDestroyTensorDesc(desc)
                self.library.aclDestroyDataBuffer(buffer)
        return bool(code == 0)

    def memory(self, op: str, arguments: list[int]) -> bool:
        block, at, size, *rest = arguments
        to = self.address({"block": block % len(BLOCKS), "at": at})
        room = ctypes.c_size_t(size % (1 << 64))
        function = getattr(self.library, op)
        if op == "aclrtMemset":
            value, count = rest
            return bool(function(to, room, ctypes.c_int32(value % 256), _size(count)) == 0)
        source = self.address({"block": rest[0] % len(BLOCKS), "at": rest[1]})
        stream = () if op == "aclrtMemcpy" else (None,)
        return bool(function(to, room, source, _size(rest[2]), 3, *stream) == 0)


def _size(value: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(value % (1 << 64))


def _int64s(values: list[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _plain(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    if isinstance(value, dict):
        return (
            ctypes.c_void_p(value["handle"])
            if "handle" in value
            else ctypes.c_double(value["real"])
        )
    return ctypes.c_int64(value)
