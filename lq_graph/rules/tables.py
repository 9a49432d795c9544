"""What LinearQuant supports, as data: products, rows of the support tables, limits.

No control flow except look-ups. `rules.dtypes` finds the row of a call, and `rules.plan` makes the
Plan from it; docs/support.md is made from this file.

The same rules are written three times, on purpose: here, in cann_host's rules (what CANN's own
checks refuse) and in the tests' table (read again from the vendor's pages). None is made from
another, so a mistake in one shows in a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from ..kernels import STORAGE_DTYPES, Arithmetic
from .chips import chip_of

__all__ = [
    "A2",
    "A3",
    "ASCEND_950",
    "ATLAS_INFERENCE",
    "COLUMNS",
    "DIM_MAX",
    "FRACTAL_NZ",
    "LAST_DIM_MAX",
    "LONG_K_SINCE",
    "MAX_DIMS",
    "MIN_DIMS",
    "ND",
    "PEAKS",
    "PRODUCTS",
    "QUANT_MAX_DIMS",
    "QUANT_ROWS",
    "ROUND_MODE_SINCE",
    "ROWS",
    "STORAGE_DTYPES",
    "Peak",
    "Product",
    "QuantRow",
    "Row",
    "Since",
    "dtype_name",
    "product_by_name",
    "product_of_soc",
    "quant_rows_of",
    "rows_of",
    "storage_name",
]

MIN_DIMS = 2
MAX_DIMS = 6
# "The last dim of x1 and of x2", aclnnQuantMatmulV4.md. x2 stays (n, k) here and is transposed
# by the operator, so only k is a last dim; n has no such limit.
LAST_DIM_MAX = 65535
# A longer k, with pertoken_scale and a float scale: aclnnQuantMatmulV4.md of v9.1.0 allows it, that
# of v9.0.0 does not, nor does its aclnn_quant_matmul_v4.cpp.
LONG_K_SINCE = "9.1.0"
# round_mode 1 of trans_quant_param: aclnnTransQuantParamV3, first called by op-plugin 7.1.0.
ROUND_MODE_SINCE = "8.2.RC1"
DIM_MAX = 2**31 - 1  # quant_batch_matmul_v3_tiling.cpp (hicann/ops-nn), CheckShapeInBoundary
ND = 2  # ACL_FORMAT_ND
FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ


@dataclass(frozen=True, eq=False)  # one object each: looked up by identity on every call
class Product:
    """A family of Ascend chips that share one support table.

    Attributes:
        name: what the vendor's documents call it.
        key: short name, accepted by LQ_GRAPH_PRODUCT and `set_product`.
        soc_prefixes: how `torch.npu.get_device_name()` begins on it.
        since: the first CANN release that has rows for it.
        ge_op: the GE operator LinearQuant lowers to.
        nz_storage: weight dtypes for which the product has FRACTAL_NZ kernels in every CANN release
            (`op_host/config/<soc>/quant_batch_matmul_v3_binary.json` in hicann/ops-nn).
        int4_nz_since: the CANN release that brought FRACTAL_NZ kernels for int4 weights; None if no
            public release has them.
        graphs_take_nz_only: whether the kernels take no ND weight; in an eager call aclnn casts it.
        limits_k: whether k is limited to LAST_DIM_MAX.
        empty_m: whether an x1 without rows is allowed; the output then has no rows either.
        dynamic_quant: the arithmetic of its DynamicQuant kernels for rows of usual length; see
            `kernels.for_rows`.
        dynamic_quant_k: what k must be a multiple of in dynamic_quant.
        cuts_scale: whether its kernels multiply by a float32 scale of one value on the way out of
            the matrix unit, which keeps 19 bits of it; see `kernels.is_cut`.
    """

    name: str
    key: str
    soc_prefixes: tuple[str, ...]
    since: str
    ge_op: str = "QuantBatchMatmulV3"
    nz_storage: tuple[torch.dtype, ...] = (torch.int8,)
    int4_nz_since: str | None = None
    graphs_take_nz_only: bool = False
    limits_k: bool = True
    empty_m: bool = False
    dynamic_quant: Arithmetic = Arithmetic.MULTIPLY
    dynamic_quant_k: int = 1
    cuts_scale: bool = False

    def __str__(self) -> str:
        return self.name


# since: npu_quant_matmul's pages of 6.0.RC1 (A2, 310P; op-plugin 5.0.rc3 has no such operator) and
# of 6.0.0 (A3)
# int4_nz_since: the lists of kernels; v8.5.0 has none, v9.0.0 has them. aclnnQuantMatmulWeightNz.md
# has the same rows.
# graphs_take_nz_only: CheckDtypeOnOnlyL0c2ub (quant_batch_matmul_v3_tiling.cpp), and the list of
# kernels for ascend310p; TransposeAndTransDataForInputs (aclnn_quant_matmul_v5.cpp) for eager calls
# dynamic_quant: dynamic_quant_tiling_310P.cpp (hicann/ops-nn), CorrectNumCopyRow
ATLAS_INFERENCE = Product(
    "Atlas inference (310P)",
    "310P",
    ("Ascend310P",),
    since="8.0.RC1",
    graphs_take_nz_only=True,
    dynamic_quant=Arithmetic.HALF,
    dynamic_quant_k=32,
)
A2 = Product("Atlas A2", "A2", ("Ascend910B",), since="8.0.RC1", int4_nz_since="9.0.0")
A3 = Product("Atlas A3", "A3", ("Ascend910_93",), since="8.0.0", int4_nz_since="9.0.0")
# arch35: aclnnQuantMatmulV4.md and V5.md, sections Ascend 950PR / 950DT. torchair lowers to V4
# there; GE turns the integer cases back into V3 (quant_batch_matmul_v4_to_v3_fusion_pass.cpp).
# cuts_scale: op_kernel/arch35/qbmm_cube_on_the_fly.h and adaptive_sliding_window_cube_tiling.cpp
# (op_host/op_tiling/arch35), IsCapable; tests/assets/qbmmv3_kernel_golden.py computes the same.
# since: aclnnQuantMatmulV4.md of v8.5.0, and its kernels, there for the SoC ascend910_95; the page
# of 8.3.RC1 does not name the product.
ASCEND_950 = Product(
    "Ascend 950",
    "950",
    ("Ascend950", "Ascend910_95"),
    since="8.5.0",
    ge_op="QuantBatchMatmulV4",
    limits_k=False,
    empty_m=True,
    dynamic_quant=Arithmetic.DIVIDE,
    cuts_scale=True,
)
PRODUCTS = (ATLAS_INFERENCE, A2, A3, ASCEND_950)


@dataclass(frozen=True)
class Peak:
    """Published peak figures of one chip of a product, for estimates.

    Attributes:
        chip: which.
        int8_ops: dense int8 operations per second; a multiply-accumulate is two.
        bytes_per_second: memory bandwidth.
        source: where the figures are published.
    """

    chip: str
    int8_ops: float
    bytes_per_second: float
    source: str

    def __str__(self) -> str:
        tops, gigabytes = self.int8_ops / 1e12, self.bytes_per_second / 1e9
        return f"{self.chip} at {tops:g} TOPS int8 and {gigabytes:g} GB/s ({self.source})"


def _peak(key: str) -> Peak:
    chip = chip_of(key)
    return Peak(chip.name, chip.int8_ops, chip.bytes_per_second, chip.source)


PEAKS: dict[str, Peak] = {product.key: _peak(product.key) for product in PRODUCTS}

Choice = tuple["torch.dtype | None", ...]

# The columns of a row besides x1's dtype, in the order in which a refusal blames them: the column
# that is easiest to change comes first.
COLUMNS = ("offset", "pertoken_scale", "bias", "scale", "output_dtype")


@dataclass(frozen=True)
class Since:
    """The CANN release that brought a row, or dtypes of one of its columns.

    Attributes:
        cann: the release, as the vendor writes it: "8.0.RC3".
        products: to which products; empty: to all that have the row.
        column, dtypes: the dtypes of a column of COLUMNS that came with it; empty: the whole row.
    """

    cann: str
    products: tuple[Product, ...] = ()
    column: str = ""
    dtypes: Choice = ()


@dataclass(frozen=True)
class Row:
    """One row of a support table. None among the choices of an optional tensor: may be absent.

    Attributes:
        storage: dtype of x1 and of weight; int32 carries eight int4.
        scale, offset, bias, pertoken_scale: dtypes each tensor may have.
        output_dtype: the one dtype of the result, as a choice like the others.
        products: those that have the row.
        folds_scale: the kernel reads the packed int64 scale (with the offset inside), so
            trans_quant_param must fold a float32 scale first.
        source: the document the row is taken from.
        since: releases that are later than the product's.
    """

    storage: torch.dtype
    scale: Choice
    offset: Choice
    bias: Choice
    pertoken_scale: Choice
    output_dtype: Choice
    products: tuple[Product, ...]
    folds_scale: bool
    source: str
    since: tuple[Since, ...] = ()

    @property
    def output(self) -> torch.dtype:
        """The dtype of the result."""
        (dtype,) = self.output_dtype
        assert dtype is not None
        return dtype

    def choices(self, column: str) -> Choice:
        """The dtypes (None: absent) a column of COLUMNS may have in this row."""
        found: Choice = getattr(self, column)
        return found

    def misses(self, given: Mapping[str, torch.dtype | None]) -> tuple[str, ...]:
        """The columns whose given dtype this row does not have."""
        return tuple(column for column in COLUMNS if given[column] not in self.choices(column))


_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_ABSENT: Choice = (None,)
_INT_BIAS: Choice = (_I32, None)
_BF16_BIAS: Choice = (_I32, _BF16, _F32, None)
_F16_BIAS: Choice = (_I32, _F16, _F32, None)
_MODULE = "torch_npu.contrib.module.LinearQuant, support table"
_ACLNN = "hicann/ops-nn matmul/quant_batch_matmul_v3/docs/aclnnQuantMatmulV4.md, "
_ALL = (ATLAS_INFERENCE, A2, A3, ASCEND_950)
_NEWER = (A2, A3, ASCEND_950)

# The order matters if rows overlap: the first match counts.
# fmt: off
ROWS: tuple[Row, ...] = (
    # storage, scale, offset, bias, pertoken_scale, output, products, folds_scale, source, since
    Row(_I8, (_I64, _F32), _ABSENT, _INT_BIAS, _ABSENT, (_F16,), _ALL, True, _MODULE),
    Row(_I8, (_I64, _F32), (_F32, None), _INT_BIAS, _ABSENT, (_I8,), _ALL, True, _MODULE),
    # npu_quant_matmul's page of 6.0.RC1 says that pertoken_scale cannot be used yet, and has int32
    # bias only; 6.0.RC2 has both and bfloat16 bias; the table of 6.0.0 adds float32 bias.
    Row(_I8, (_F32, _BF16), _ABSENT, _BF16_BIAS, (_F32, None), (_BF16,), _NEWER, False, _MODULE,
        (Since("8.0.RC2", (), "pertoken_scale", (_F32,)), Since("8.0.RC2", (), "bias", (_BF16,)),
         Since("8.0.0", (), "bias", (_F32,)))),
    # The vendor's page lists pertoken_scale as optional here; aclnn requires it (without it, a
    # float32 scale is folded and the first row applies). As above; the row itself is in the table
    # of 6.0.0, and pages before have no table.
    Row(_I8, (_F32,), _ABSENT, _F16_BIAS, (_F32,), (_F16,), _NEWER, False, _ACLNN + "row 4",
        (Since("8.0.RC2"), Since("8.0.0", (), "bias", (_F16, _F32)))),
    # int32 x1: the page of 6.0.RC3 has it, that of 6.0.RC2 int8 only. 950: documents and kernels of
    # v9.1.0 have int4, those of v9.0.0 have not; the same for the other int4 rows.
    Row(_I32, (_I64, _F32), _ABSENT, _INT_BIAS, _ABSENT, (_F16,), _NEWER, True, _MODULE,
        (Since("8.0.RC3"), Since("9.1.0", (ASCEND_950,)))),
    # op-plugin 7.0.0 has int32 output, 6.0.0 has not, nor has the table of its page. 950: the
    # documents of v8.5.0 have the row, its operator definition and kernels have not.
    Row(_I8, (_F32, _BF16), _ABSENT, _INT_BIAS, _ABSENT, (_I32,), _NEWER, False, _MODULE,
        (Since("8.1.RC1"), Since("9.0.0", (ASCEND_950,)))),
    # Newer than the vendor's page: test_npu_quant_matmul.py of op-plugin 7.0.0 has int4 with
    # pertoken_scale, that of 6.0.0 has not, nor has the table of its page.
    Row(_I32, (_F32, _BF16), _ABSENT, _BF16_BIAS, (_F32,), (_BF16,), _NEWER, False,
        _ACLNN + "A4W4 with pertokenScaleOptional, bfloat16",
        (Since("8.1.RC1"), Since("9.1.0", (ASCEND_950,)))),
    Row(_I32, (_F32,), _ABSENT, _F16_BIAS, (_F32,), (_F16,), _NEWER, False,
        _ACLNN + "A4W4 with pertokenScaleOptional, float16",
        (Since("8.1.RC1"), Since("9.1.0", (ASCEND_950,)))),
    Row(_I8, (_I64,), _ABSENT, _INT_BIAS, _ABSENT, (_BF16,), (ASCEND_950,), True,
        _ACLNN + "Ascend 950PR/950DT, row 1"),
)
# fmt: on


@dataclass(frozen=True)
class QuantRow:
    """One row of the table of an operator that quantizes activations.

    Attributes:
        op: "dynamic_quant" or "static_quant".
        x: dtypes of the input.
        output_dtype: int8, or int32 carrying eight int4.
        products: those that have the row.
        source: the document the row is taken from.
        since: releases that are later than the product's.
    """

    op: str
    x: tuple[torch.dtype, ...]
    output_dtype: torch.dtype
    products: tuple[Product, ...]
    source: str
    since: tuple[Since, ...] = ()


_DYNAMIC = "hicann/ops-nn quant/dynamic_quant/op_host/dynamic_quant_def.cpp"
_STATIC = "hicann/ops-nn quant/ascend_quant_v2/op_host/ascend_quant_v2_def.cpp"
QUANT_MAX_DIMS = 8  # aclnnDynamicQuant.md, aclnnAscendQuantV3.md

# aclnnDynamicQuant's pages name A2 alone up to 8.0.0, A3 from 8.1.RC1 on, 310P from 8.2.RC1 on.
# op-plugin 6.0.rc1 has neither operator, 6.0.rc2 has both. npu_dynamic_quant's page of 6.0.RC3 has
# int8 only, that of 6.0.0 int4 too.
# fmt: off
QUANT_ROWS: tuple[QuantRow, ...] = (
    QuantRow("dynamic_quant", (_F16,), _I8, (ATLAS_INFERENCE,), _DYNAMIC, (Since("8.2.RC1"),)),
    QuantRow("dynamic_quant", (_F16, _BF16), _I8, _NEWER, _DYNAMIC,
             (Since("8.0.RC2"), Since("8.1.RC1", (A3,)))),
    QuantRow("dynamic_quant", (_F16, _BF16), _I32, _NEWER, _DYNAMIC,
             (Since("8.0.0"), Since("8.1.RC1", (A3,)))),
    QuantRow("static_quant", (_F16, _F32), _I8, (ATLAS_INFERENCE,), _STATIC, (Since("8.0.RC2"),)),
    QuantRow("static_quant", (_F16, _BF16, _F32), _I8, _NEWER, _STATIC, (Since("8.0.RC2"),)),
)
# fmt: on


@cache
def quant_rows_of(product: Product, op: str) -> tuple[QuantRow, ...]:
    """The rows a product has of one quantizing operator."""
    return tuple(row for row in QUANT_ROWS if row.op == op and product in row.products)


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
    """A dtype as messages and tables write it: "int8", "-" for absent."""
    return "-" if dtype is None else str(dtype).removeprefix("torch.")


def storage_name(dtype: torch.dtype) -> str:
    """The dtype of x1 and weight as messages write it: "int8", "int32 (int4)"."""
    return f"{dtype_name(dtype)} (int4)" if dtype == torch.int32 else dtype_name(dtype)
