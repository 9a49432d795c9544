"""One record for each operator: what work a call of it is, and whose figures its time rests on.

A kernel takes launch + moved / bandwidth + computed / operations per second. The sum fits the
measurements better than the larger of the two terms (bf16 products: 11 % against 16 %): a kernel
fills its pipelines before it overlaps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import LinearQuantValueError
from .hardware import Chip

__all__ = ["OPERATORS", "Operator", "Tensors", "Work", "bytes_of", "dtype_of", "operator_of"]

Tensors = Sequence[tuple["torch.dtype | str", Sequence[int]]]

# A core takes whole blocks of weights this wide across n: 32 columns of bf16, 64 of int8, 128 of
# int4. A product whose blocks do not fill all cores in its last round moves its bytes more slowly.
BLOCK_BYTES = 64
ROWS, MANY_ROWS = 16, 128  # what m is rounded up to: up to 128 rows, and above
# No public measurement has a short context. Two products and a softmax inside one kernel: the launch
# of two float products, and of a vector kernel, is near this.
ATTENTION_LAUNCH = 12e-6
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True)
class Work:
    """What a call does.

    Attributes:
        bytes: read and written in memory, each tensor once.
        operations: two for each multiply-accumulate.
        moved: bytes that its time depends on: with what idle cores could have moved meanwhile, and
            without what moves while the matrix unit computes.
        computed: operations that its time depends on: with the rows that fill up a tile.
        dtype: of the matrix unit, "" without one.
    """

    bytes: float
    operations: float
    moved: float
    computed: float = 0.0
    dtype: str = ""


@dataclass(frozen=True)
class Operator:
    """An operator of GE.

    Attributes:
        name: of its parameters in fitted.json, and in tables.
        types: its op types in GE graphs and in profiles.
        work: of a call, from inputs, outputs and chip.
        family: operators of a family share one bandwidth and one rate of the matrix unit.
        dtype: the dtype of the first input (matrix products) or output that the record is for; "":
            any.
        like: nobody has published a measurement of it; it takes the parameters of this one.
        launch: its launch in seconds, assumed; None: fitted.
    """

    name: str
    types: tuple[str, ...]
    work: Callable[[Tensors, Tensors, Chip], Work]
    family: str
    dtype: str = ""
    like: str = ""
    launch: float | None = None


def dtype_of(dtype: torch.dtype | str) -> str:
    """The name of a dtype as torch writes it, "bfloat16"; int4 is "int4".

    Raises:
        LinearQuantValueError: there is no such dtype.
    """
    name = str(dtype).removeprefix("torch.").lower()
    name = _SHORT.get(name, name)
    if name != "int4" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise LinearQuantValueError(f"forecast: {dtype} is not a dtype")
    return name


def bytes_of(dtype: torch.dtype | str, shape: Sequence[int]) -> float:
    """The bytes of a tensor; an int4 is half a byte.

    Raises:
        LinearQuantValueError: a size is not known.
    """
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise LinearQuantValueError(f"forecast: the sizes {list(shape)} are not all known")
    name = dtype_of(dtype)
    each = 0.5 if name == "int4" else getattr(torch, name).itemsize
    return float(each * math.prod(shape))


def _traffic(inputs: Tensors, outputs: Tensors) -> float:
    return sum(bytes_of(dtype, shape) for dtype, shape in (*inputs, *outputs))


def _matmul(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    """x1 (..., m, k) and weight, any layout; the output is (..., m, n). The time depends on the
    weight's bytes; x1 and the output move while the matrix unit computes."""
    (dtype, x1), (_, weight), *_ = inputs
    name = dtype_of(dtype)
    _, out = outputs[0]
    n = out[-1] if out else 1
    m = math.prod(out) // n if n else 0
    k = math.prod(x1) // m if m else 0
    count = math.prod(weight) // (k * n) if k * n else 0  # a batch of weights is one product each
    rows = m // count if count else m
    tile = ROWS if rows <= MANY_ROWS else MANY_ROWS
    padded = count * math.ceil(rows / tile) * tile
    size = bytes_of(dtype, (1,))
    width = int(BLOCK_BYTES / size)
    rounds = math.ceil(count * math.ceil(n / width) / chip.cores)
    return Work(
        bytes=_traffic(inputs, outputs),
        operations=2.0 * m * k * n,
        moved=rounds * chip.cores * width * k * size,
        computed=2.0 * padded * k * n,
        dtype=name if name in ("int8", "int4") else "bf16",
    )


def _attention(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    """query (b, heads, s, d), key and value (b, kv heads, positions, d). Several queries are taken
    to be causal over their own positions, so half of the square is computed."""
    (_, query), (_, key), *_ = inputs
    positions = key[-2]
    queries = query[-2]
    operations = 4.0 * math.prod(query) * positions
    if queries > 1:  # positions before the queries are all read
        operations *= 1 - (min(queries, positions) - 1) / (2 * positions)
    moved = _traffic(inputs, outputs)
    if queries == 1:  # vector units and small products: the cache's bytes count
        return Work(moved, operations, moved)
    return Work(moved, operations, 0.0, operations, "bf16")


def _elementwise(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    moved = _traffic(inputs, outputs)
    elements = max((math.prod(shape) for _, shape in (*inputs, *outputs)), default=0)
    return Work(moved, float(elements), moved)


def _written(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    """A write in place: the updates are read and written; the cache around them is not touched."""
    updates = [(dtype_of(dtype), tuple(shape)) for dtype, shape in inputs]
    for dtype, shape in outputs:  # what is written into: an input and an output
        if (target := (dtype_of(dtype), tuple(shape))) in updates:
            updates.remove(target)
    moved = 2 * _traffic(updates, ())
    return Work(moved, 0.0, moved)


def _gathered(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    """Rows of a table: only those are read."""
    moved = 2 * sum(bytes_of(*output) for output in outputs)
    return Work(moved, 0.0, moved)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "MatMul",
        ("MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"),
        _matmul,
        "bf16 product",
    ),
    Operator(
        "QuantBatchMatmul int8",
        ("QuantBatchMatmulV3", "QuantBatchMatmulV4"),
        _matmul,
        "int8 product",
    ),
    Operator(
        "QuantBatchMatmul int4",
        ("QuantBatchMatmulV3", "QuantBatchMatmulV4"),
        _matmul,
        "int8 product",
        dtype="int4",
        like="QuantBatchMatmul int8",
    ),
    Operator("AddRmsNorm", ("AddRmsNorm", "AddRmsNormBias"), _elementwise, "norm"),
    Operator("RmsNorm", ("RmsNorm",), _elementwise, "norm"),
    Operator(
        "AddRmsNormDynamicQuant",
        ("AddRmsNormDynamicQuant", "AddRmsNormDynamicQuantV2", "AddRmsNormQuant"),
        _elementwise,
        "norm",
    ),
    Operator("AddRmsNormCast", ("AddRmsNormCast",), _elementwise, "norm", like="AddRmsNorm"),
    Operator("DynamicQuant", ("DynamicQuant", "DynamicQuantV2"), _elementwise, "quantization"),
    Operator(
        "DynamicQuant int4",
        ("DynamicQuant", "DynamicQuantV2"),
        _elementwise,
        "quantization to int4",
        dtype="int4",
    ),
    Operator(
        "AscendQuant",
        ("AscendQuant", "AscendQuantV2", "Quantize"),
        _elementwise,
        "static quantization",
    ),
    Operator("SwiGlu", ("SwiGlu",), _elementwise, "vector"),
    Operator("DequantSwigluQuant", ("DequantSwigluQuant",), _elementwise, "vector", like="SwiGlu"),
    Operator(
        "ApplyRotaryPosEmb",
        ("ApplyRotaryPosEmb", "RotaryMul", "RotaryPositionEmbedding"),
        _elementwise,
        "vector",
        like="SwiGlu",
    ),
    Operator(
        "cache write",
        ("ScatterNdUpdate", "ScatterUpdate", "ScatterPaKvCache", "Scatter"),
        _written,
        "vector",
        like="SwiGlu",
    ),
    Operator(
        "gather", ("GatherV2", "Gather", "Embedding"), _gathered, "vector", like="elementwise"
    ),
    Operator(
        "FusedInferAttentionScore",
        ("FusedInferAttentionScore", "IncreFlashAttention", "PromptFlashAttention"),
        _attention,
        "attention",
        launch=ATTENTION_LAUNCH,
    ),
    Operator("elementwise", ("Add", "Cast"), _elementwise, "vector"),
)
_BY_TYPE: dict[str, list[Operator]] = {}
for _one in OPERATORS:
    for _type in _one.types:
        _BY_TYPE.setdefault(_type, []).append(_one)
DEFAULT = OPERATORS[-1]


def operator_of(op_type: str, inputs: Tensors, outputs: Tensors) -> tuple[Operator, bool]:
    """The record of a call, and whether it is one for this op type (else the default's)."""
    found = _BY_TYPE.get(op_type)
    if found is None:
        return DEFAULT, False
    dtypes = {dtype_of(dtype) for dtype, _ in (*inputs[:1], *outputs[:1])}
    for one in found:
        if one.dtype and one.dtype in dtypes:
            return one, True
    return next(one for one in found if not one.dtype), True
