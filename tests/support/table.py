"""The vendor's support tables, written again by hand; lq_graph.rules.tables is compared with them.

Written from the pages of torch_npu.contrib.module.LinearQuant (310P, A2, A3) and of
aclnnQuantMatmulV4 (950, and A4W4 with a per-token scale). None: may be absent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

I8, I32, I64 = torch.int8, torch.int32, torch.int64
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
NO = None
DType = torch.dtype | None

# how a sentence of plan()'s may end
WHAT_ACLNN_DOES = (
    "(aclnn would report 161002)",
    "(aclnn would report 561002, with a FRACTAL_NZ weight 161002)",
    "(aclnn would take the offset and not read it)",
    "(the newest aclnn takes one in some calls, but no graph does)",
)


class Combination(NamedTuple):
    """The dtypes of one call; None: absent."""

    x: torch.dtype
    scale: torch.dtype
    offset: DType
    bias: DType
    pertoken_scale: DType
    output_dtype: torch.dtype


class Row(NamedTuple):
    products: str
    x: torch.dtype
    scale: tuple[torch.dtype, ...]
    offset: tuple[DType, ...]
    bias: tuple[DType, ...]
    pertoken_scale: tuple[DType, ...]
    output_dtype: torch.dtype

    def combinations(self) -> Iterator[Combination]:
        choices = (self.scale, self.offset, self.bias, self.pertoken_scale)
        for scale, offset, bias, pertoken in product(*choices):
            yield Combination(self.x, scale, offset, bias, pertoken, self.output_dtype)

    def has(self, c: Combination) -> bool:
        """Whether a call is one of the row."""
        return c in set(self.combinations())


TABLE = [
    Row("310P A2 A3 950", I8, (I64, F32), (NO,), (I32, NO), (NO,), F16),
    Row("310P A2 A3 950", I8, (I64, F32), (F32, NO), (I32, NO), (NO,), I8),
    Row("A2 A3 950", I8, (F32, BF16), (NO,), (I32, BF16, F32, NO), (F32, NO), BF16),
    Row("A2 A3 950", I8, (F32,), (NO,), (I32, F16, F32, NO), (F32,), F16),
    Row("A2 A3 950", I32, (I64, F32), (NO,), (I32, NO), (NO,), F16),
    Row("A2 A3 950", I8, (F32, BF16), (NO,), (I32, NO), (NO,), I32),
    Row("A2 A3 950", I32, (F32, BF16), (NO,), (I32, BF16, F32, NO), (F32,), BF16),
    Row("A2 A3 950", I32, (F32,), (NO,), (I32, F16, F32, NO), (F32,), F16),
    Row("950", I8, (I64,), (NO,), (I32, NO), (NO,), BF16),
]
PRODUCTS = ("310P", "A2", "A3", "950")

# CANN's releases, in order, and the one that brought each row of TABLE to its products. Read again
# from the pages of npu_quant_matmul (6.0.RC1 to 7.1.0) and the tags of hicann/ops-nn.
CANN = (
    "8.0.RC1", "8.0.RC2", "8.0.RC3", "8.0.0", "8.1.RC1", "8.2.RC1", "8.3.RC1", "8.5.0", "9.0.0",
    "9.1.0",
)  # fmt: skip
SINCE = [
    {"310P": "8.0.RC1", "A2": "8.0.RC1", "A3": "8.0.0", "950": "8.5.0"},
    {"310P": "8.0.RC1", "A2": "8.0.RC1", "A3": "8.0.0", "950": "8.5.0"},
    {"A2": "8.0.RC1", "A3": "8.0.0", "950": "8.5.0"},
    {"A2": "8.0.RC2", "A3": "8.0.0", "950": "8.5.0"},
    {"A2": "8.0.RC3", "A3": "8.0.0", "950": "9.1.0"},
    {"A2": "8.1.RC1", "A3": "8.1.RC1", "950": "9.0.0"},
    {"A2": "8.1.RC1", "A3": "8.1.RC1", "950": "9.1.0"},
    {"A2": "8.1.RC1", "A3": "8.1.RC1", "950": "9.1.0"},
    {"950": "8.5.0"},
]
# by operator, output and product
QUANT_SINCE = {
    ("dynamic_quant", I8): {"310P": "8.2.RC1", "A2": "8.0.RC2", "A3": "8.1.RC1", "950": "8.5.0"},
    ("dynamic_quant", I32): {"A2": "8.0.0", "A3": "8.1.RC1", "950": "8.5.0"},
    ("static_quant", I8): {"310P": "8.0.RC2", "A2": "8.0.RC2", "A3": "8.0.0", "950": "8.5.0"},
}


def since(c: Combination, product: str) -> str:
    """The release that a legal call needs on a product."""
    (row,) = (i for i, row in enumerate(TABLE) if row.has(c) and product in row.products.split())
    needed = [SINCE[row][product]]
    if c.x == I8 and c.output_dtype in (F16, BF16):
        if c.pertoken_scale or c.bias == BF16:
            needed.append("8.0.RC2")
        if c.bias in (F16, F32):
            needed.append("8.0.0")
    return max(needed, key=CANN.index)


LEGAL = {
    key: {c for row in TABLE if key in row.products.split() for c in row.combinations()}
    for key in PRODUCTS
}

# every value a field is changed to
_ANY = (F32, BF16, F16, I8, I32, I64, torch.float64, torch.uint8)
FIELDS: dict[str, tuple[DType, ...]] = {
    "x": (I8, I32, F32, F16, BF16, I64, torch.uint8),
    "scale": _ANY,
    "offset": (*_ANY, NO),
    "bias": (*_ANY, NO),
    "pertoken_scale": (*_ANY, NO),
    "output_dtype": _ANY,
}


def mutations(legal: Combination) -> Iterator[tuple[str, Combination]]:
    """Every combination that differs from a legal one in one field."""
    for field, values in FIELDS.items():
        for value in values:
            if value != getattr(legal, field):
                yield field, legal._replace(**{field: value})  # type: ignore[arg-type]
