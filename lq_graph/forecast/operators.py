"""One record for each operator: what work a call of it is, and whose figures its time rests on.

A kernel takes launch + moved / bandwidth + computed / operations per second. The sum fits the
measurements better than the larger of the two terms (bf16 products: 12 % against 16 %): a kernel
fills its pipelines before it overlaps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LinearQuantValueError
from ..rules.chips import Chip

__all__ = [
    "OPERATORS",
    "Attributes",
    "Operator",
    "Tensors",
    "Work",
    "bytes_of",
    "dtype_of",
    "operator_of",
    "work_of",
]

# dtype and shape; None for a shape that a graph does not have, which then counts no bytes
Tensors = Sequence[tuple["torch.dtype | str", "Sequence[int] | None"]]
Attributes = Mapping[str, Any]

# A core takes whole blocks of weights this wide across n: 32 columns of bf16, 64 of int8, 128 of
# int4. A product whose blocks do not fill all cores in its last round moves its bytes more slowly.
BLOCK_BYTES = 64
ROWS, MANY_ROWS = 16, 128  # what m is rounded up to: up to 128 rows, and above
# No public measurement has a short context. Two products and a softmax inside one kernel: near the
# launch of two float products and of a vector kernel.
ATTENTION_LAUNCH = 12e-6
# The attention of one token gives each core pairs of a sequence and a kv head. Few pairs of many
# positions are split further: IsFlashDecode and CheckCoreOkFlag of incre_flash_attention_tiling.cpp
# (hicann/ops-transformer).
SPLIT_PAIRS, SPLIT_POSITIONS = 0.5, 2048
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
        kind: how the work of a call is counted: "product", "attention", "write", "gather" or
            "elementwise".
        family: operators of a family share one bandwidth and one rate of the matrix unit.
        dtype: the dtype of the first input (matrix products) or output that the record is for; "":
            any.
        like: nobody has published a measurement of it; it takes the parameters of this one.
        launch: its launch in seconds, assumed; None: fitted.
    """

    name: str
    types: tuple[str, ...]
    kind: str
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
    both = (*inputs, *outputs)
    return sum(bytes_of(dtype, shape) for dtype, shape in both if shape is not None)


def _known(shape: Sequence[int] | None) -> Sequence[int]:
    if shape is None:
        raise LinearQuantValueError("forecast: the shape of a tensor is not known")
    return shape


def _matmul(inputs: Tensors, outputs: Tensors, chip: Chip) -> Work:
    """x1 (..., m, k) and weight, any layout; the output has m x n values. The time depends on the
    weight's bytes; x1 and the output move while the matrix unit computes."""
    (dtype, x1), (_, weight), *_ = inputs
    name = dtype_of(dtype)
    k = _known(x1)[-1]
    first, second, out = (math.prod(_known(shape)) for shape in (x1, weight, outputs[0][1]))
    if not first or not second or not out:
        return Work(_traffic(inputs, outputs), 0.0, 0.0)
    count = first * second / (k * k * out)  # products: a weight for each of a batch
    rows, n = first / k / count, second / k / count
    many = math.prod(_known(weight)[:-2])
    if not all(size.is_integer() for size in (count, rows, n, many / count)):
        raise LinearQuantValueError(
            f"forecast: x1 {list(_known(x1))} and weight {list(_known(weight))} do not give "
            f"{list(_known(outputs[0][1]))}"
        )
    tile = ROWS if rows <= MANY_ROWS else MANY_ROWS
    padded = count * math.ceil(rows / tile) * tile
    size = bytes_of(dtype, (1,))
    width = BLOCK_BYTES / size
    rounds = math.ceil(count * math.ceil(n / width) / chip.cores)
    return Work(
        bytes=_traffic(inputs, outputs),
        operations=2.0 * count * rows * k * n,
        moved=rounds * chip.cores * width * k * size,
        computed=2.0 * padded * k * n,
        dtype=name if name in ("int8", "int4") else "bf16",
    )


def _attention(inputs: Tensors, outputs: Tensors, chip: Chip, attributes: Attributes) -> Work:
    """query (b, s, heads, d), key and value (b, positions, kv heads, d), or with input_layout BNSD
    s and positions in third place. Several queries are causal: the last one reads all positions."""
    (_, query), (_, key), *_ = inputs
    layout = attributes.get("input_layout", "BSND")
    text = layout.decode() if isinstance(layout, bytes) else str(layout)
    where = 2 if text.startswith("BNSD") else 1
    sizes = _known(key)
    queries, positions = _known(query)[where], sizes[where]
    traffic = _traffic(inputs[:3], outputs[:1])
    operations = 4.0 * math.prod(_known(query)) * positions
    if queries > 1:
        operations *= 1 - (min(queries, positions) - 1) / (2 * positions)
        return Work(traffic, operations, 0.0, operations, "bf16")
    # the bytes of the cache count, and the cores that have no keys to read
    pairs = sizes[0] * sizes[3 - where] if len(sizes) == 4 else sizes[0]
    if not pairs or (pairs <= SPLIT_PAIRS * chip.cores and positions >= SPLIT_POSITIONS):
        return Work(traffic, operations, traffic)
    rounds = math.ceil(pairs / chip.cores)
    return Work(traffic, operations, traffic * rounds * chip.cores / pairs)


def _elementwise(inputs: Tensors, outputs: Tensors) -> Work:
    moved = _traffic(inputs, outputs)
    known = [math.prod(shape) for _, shape in (*inputs, *outputs) if shape is not None]
    return Work(moved, float(max(known, default=0)), moved)


def _written(inputs: Tensors, outputs: Tensors) -> Work:
    """A write in place: what is written is read and written. A cache, which has the shape of an
    output, and the slots, which are integers, count nothing."""
    caches = {tuple(shape) for _, shape in outputs if shape is not None}
    moved = 2 * sum(
        bytes_of(dtype, shape)
        for dtype, shape in inputs
        if shape is not None
        and tuple(shape) not in caches
        and not dtype_of(dtype).startswith(("int32", "int64"))
    )
    return Work(moved, 0.0, moved)


def _gathered(outputs: Tensors) -> Work:
    """Rows of a table: only those are read."""
    moved = 2 * _traffic((), outputs)
    return Work(moved, 0.0, moved)


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "MatMul",
        ("MatMul", "MatMulV2", "MatMulV3", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"),
        "product",
        "bf16 product",
    ),
    Operator(
        "QuantBatchMatmul int8",
        ("QuantBatchMatmulV3", "QuantBatchMatmulV4"),
        "product",
        "int8 product",
    ),
    Operator(
        "QuantBatchMatmul int4",
        ("QuantBatchMatmulV3", "QuantBatchMatmulV4"),
        "product",
        "int8 product",
        dtype="int4",
        like="QuantBatchMatmul int8",
    ),
    Operator("AddRmsNorm", ("AddRmsNorm", "AddRmsNormBias"), "elementwise", "norm"),
    Operator("RmsNorm", ("RmsNorm",), "elementwise", "norm"),
    Operator(
        "AddRmsNormDynamicQuant",
        ("AddRmsNormDynamicQuant", "AddRmsNormDynamicQuantV2", "AddRmsNormQuant"),
        "elementwise",
        "norm",
    ),
    Operator("AddRmsNormCast", ("AddRmsNormCast",), "elementwise", "norm", like="AddRmsNorm"),
    Operator("DynamicQuant", ("DynamicQuant", "DynamicQuantV2"), "elementwise", "quantization"),
    Operator(
        "DynamicQuant int4",
        ("DynamicQuant", "DynamicQuantV2"),
        "elementwise",
        "quantization to int4",
        dtype="int4",
    ),
    Operator(
        "AscendQuant",
        ("AscendQuant", "AscendQuantV2", "Quantize"),
        "elementwise",
        "static quantization",
    ),
    Operator("SwiGlu", ("SwiGlu",), "elementwise", "vector"),
    Operator("DequantSwigluQuant", ("DequantSwigluQuant",), "elementwise", "vector", like="SwiGlu"),
    Operator(
        "ApplyRotaryPosEmb",
        ("ApplyRotaryPosEmb", "RotaryMul", "RotaryPositionEmbedding"),
        "elementwise",
        "vector",
        like="SwiGlu",
    ),
    Operator(
        "cache write",
        ("ScatterNdUpdate", "ScatterUpdate", "ScatterPaKvCache", "Scatter"),
        "write",
        "vector",
        like="SwiGlu",
    ),
    Operator("gather", ("GatherV2", "Gather", "Embedding"), "gather", "vector", like="elementwise"),
    Operator(
        "FusedInferAttentionScore",
        ("FusedInferAttentionScore", "IncreFlashAttention", "PromptFlashAttention"),
        "attention",
        "attention",
        launch=ATTENTION_LAUNCH,
    ),
    Operator("elementwise", ("Add", "Cast"), "elementwise", "vector"),
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


def work_of(
    operator: Operator, inputs: Tensors, outputs: Tensors, chip: Chip, attributes: Attributes
) -> Work:
    """What a call of an operator does.

    Raises:
        LinearQuantValueError: a size or dtype is not known.
    """
    if operator.kind == "product":
        return _matmul(inputs, outputs, chip)
    if operator.kind == "attention":
        return _attention(inputs, outputs, chip, attributes)
    if operator.kind == "write":
        return _written(inputs, outputs)
    return _gathered(outputs) if operator.kind == "gather" else _elementwise(inputs, outputs)
