"""What LinearQuant supports, as data: products, rows of the support tables, limits.

No control flow beyond look-ups. `lq_graph.plan` is the only reader that decides anything;
README's table is tested against this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .numerics import INT4_PER_INT32

__all__ = [
    "A2",
    "A3",
    "ATLAS_INFERENCE",
    "FRACTAL_NZ",
    "LAST_DIM_MAX",
    "MAX_DIMS",
    "MIN_DIMS",
    "PRODUCTS",
    "ROWS",
    "STORAGE_DTYPES",
    "Product",
    "Row",
    "dtype_name",
    "product_by_name",
    "product_of_soc",
    "rows_of",
]

MIN_DIMS = 2
MAX_DIMS = 6
# "The last dim of x1 and of x2", aclnnQuantMatmulV4.md. x2 stays (n, k) here and is transposed
# by the operator, so only k is a last dim; n has no such limit.
LAST_DIM_MAX = 65535
FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ

# storage dtype of x1 and weight -> logical values per element of the last dim
STORAGE_DTYPES: dict[torch.dtype, int] = {torch.int8: 1, torch.int32: INT4_PER_INT32}


@dataclass(frozen=True)
class Product:
    """A family of Ascend chips that share one support table.

    Attributes:
        name: what the vendor's documents call it.
        key: short name, accepted by LQ_GRAPH_PRODUCT and `set_product`.
        soc_prefixes: how `torch.npu.get_device_name()` begins on it.
        ge_op: the GE operator LinearQuant lowers to.
        nz_storage: weight dtypes the product has FRACTAL_NZ kernels for in every CANN release
            (`op_host/config/<soc>/quant_batch_matmul_v3_binary.json` in hicann/ops-nn).
    """

    name: str
    key: str
    soc_prefixes: tuple[str, ...]
    ge_op: str = "QuantBatchMatmulV3"
    nz_storage: tuple[torch.dtype, ...] = (torch.int8,)

    def __str__(self) -> str:
        return self.name


ATLAS_INFERENCE = Product("Atlas inference (310P)", "310P", ("Ascend310P",))
A2 = Product("Atlas A2", "A2", ("Ascend910B",))
A3 = Product("Atlas A3", "A3", ("Ascend910_93",))
PRODUCTS = (ATLAS_INFERENCE, A2, A3)

Choice = tuple["torch.dtype | None", ...]


@dataclass(frozen=True)
class Row:
    """One row of a support table. None among the choices of an optional tensor: may be absent.

    Attributes:
        storage: dtype of x1 and of weight; int32 carries eight int4.
        folds_scale: the kernel reads the packed int64 scale (offset inside), so a float32 scale
            has to be folded with trans_quant_param before it.
        source: the document the row is taken from.
    """

    storage: torch.dtype
    scale: Choice
    offset: Choice
    bias: Choice
    pertoken_scale: Choice
    output: torch.dtype
    products: tuple[Product, ...]
    folds_scale: bool
    source: str

    def allows(self, name: str, dtype: torch.dtype | None) -> bool:
        """Whether the tensor `name` may have `dtype` (None: be absent) in this row."""
        choices: Choice = getattr(self, name)
        return dtype in choices


_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_ABSENT: Choice = (None,)
_DOC = "torch_npu.contrib.module.LinearQuant"
_ACLNN = "hicann/ops-nn matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md"
_ALL = (ATLAS_INFERENCE, A2, A3)

# Order matters where rows overlap: the first match is taken.
ROWS: tuple[Row, ...] = (
    Row(_I8, (_I64, _F32), _ABSENT, (_I32, None), _ABSENT, _F16, _ALL, True, _DOC),
    Row(_I8, (_I64, _F32), (_F32, None), (_I32, None), _ABSENT, _I8, _ALL, True, _DOC),
    Row(
        _I8,
        (_F32, _BF16),
        _ABSENT,
        (_I32, _BF16, _F32, None),
        (_F32, None),
        _BF16,
        (A2, A3),
        False,
        _DOC,
    ),
    # The module's page lists pertoken as optional here; aclnn requires it (without it, a float32
    # scale is folded and the first row applies).
    Row(_I8, (_F32,), _ABSENT, (_I32, _F16, _F32, None), (_F32,), _F16, (A2, A3), False, _ACLNN),
    Row(_I32, (_I64, _F32), _ABSENT, (_I32, None), _ABSENT, _F16, (A2, A3), True, _DOC),
    Row(_I8, (_F32, _BF16), _ABSENT, (_I32, None), _ABSENT, _I32, (A2, A3), False, _DOC),
)


@cache
def rows_of(product: Product, storage: torch.dtype | None = None) -> tuple[Row, ...]:
    """The rows a product supports, in table order, for one storage dtype or all."""
    return tuple(row for row in ROWS if product in row.products and storage in (None, row.storage))


def product_by_name(name: str) -> Product | None:
    """Find a product by key ("A2"), full name or SoC name; case does not matter."""
    wanted = name.strip().lower()
    for product in PRODUCTS:
        if wanted in (product.key.lower(), product.name.lower()):
            return product
    return product_of_soc(name.strip())


def product_of_soc(soc: str) -> Product | None:
    """The product a SoC or device name ("Ascend910B2") belongs to."""
    for product in PRODUCTS:
        if any(soc.lower().startswith(prefix.lower()) for prefix in product.soc_prefixes):
            return product
    return None


def dtype_name(dtype: torch.dtype | None) -> str:
    """How messages and tables write a dtype: "int8", "-" for absent."""
    return "-" if dtype is None else str(dtype).removeprefix("torch.")
