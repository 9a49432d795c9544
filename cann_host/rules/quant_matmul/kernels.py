"""Support table of the quantized matmul: one row for each kernel a family of products has.

The sources in brackets are the files that the package's docstring lists, and

    [bin]  matmul/quant_batch_matmul_v3/op_host/config/<soc>/quant_batch_matmul_v3_binary.json
"""

from __future__ import annotations

from dataclasses import dataclass

from ..descriptors import ND, NZ
from ..products import A2, A950, P310

__all__ = ["KERNELS", "Kernel"]


@dataclass(frozen=True)
class Kernel:
    """One kernel with which a family of products computes a quantized matmul.

    Attributes:
        family: see `rules.products`.
        x: dtype of x1 and x2.
        pertoken: whether pertoken_scale is given (then float32).
        scale: dtypes that scale may have.
        bias: dtypes that bias may have; it may always be absent.
        offset: whether an offset may be given.
        out: dtype of the result.
        x2_formats: formats that x2 may have.
        source: the files that the row is read from.
    """

    family: str
    x: str
    pertoken: bool
    scale: tuple[str, ...]
    bias: tuple[str, ...]
    offset: bool
    out: str
    x2_formats: tuple[str, ...]
    source: str


_PACKED = ("int64", "uint64")
_FLOATS = ("float32", "bfloat16")
_F32 = ("float32",)
_INT = ("int32",)
_PT_BF16 = ("int32", "bfloat16", "float32")
_PT_FP16 = ("int32", "float16", "float32")
_BOTH = (ND, NZ)

_PLAIN = "[check] CheckL0c2outAndL0c2ubPertensorPerchannel, [tiling] CheckDtypeOnOnlyL0c2out, [bin]"
_PT = "[check] CheckOnlyL0c2outPertoken, [tiling] CheckDtypeOnOnlyL0c2outForPertoken, [bin]"
_A4W4 = (
    "[check] CheckDtypeValidOnOnlyL0c2outForA4W4, [tiling] CheckDtypeOnOnlyL0c2outForA4W4, [bin]"
)
_L0C2UB = "[tiling] CheckDtypeOnOnlyL0c2ub, [bin] ascend310p"
_L0C2UB_PT = "[check] CheckOnlyL0c2ubPertoken, [bin] ascend310p"
_ARCH35 = "[check] CheckL0c2outOrL0c2ubPertensorPerchannel4Int8Input, [arch35], [bin] ascend950"
_ARCH35_PT = "[check] CheckL0c2outOrL0c2ubPertoken, [arch35] CheckScaleDtypeWithPertoken, [bin]"

KERNELS: tuple[Kernel, ...] = (
    # family, x, pertoken, scale, bias, offset, out, x2 formats, source
    Kernel(A2, "int8", False, _PACKED, _INT, True, "int8", _BOTH, _PLAIN),
    Kernel(A2, "int8", False, _PACKED, _INT, False, "float16", _BOTH, _PLAIN),
    Kernel(A2, "int8", False, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PLAIN),
    Kernel(A2, "int8", False, _FLOATS, _INT, False, "int32", _BOTH, _PLAIN),
    Kernel(A2, "int8", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PT),
    Kernel(A2, "int8", True, _F32, _PT_FP16, False, "float16", _BOTH, _PT),
    Kernel(A2, "int4", False, _PACKED, _INT, False, "float16", _BOTH, _A4W4),
    Kernel(A2, "int4", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _PT),
    Kernel(A2, "int4", True, _F32, _PT_FP16, False, "float16", _BOTH, _PT),
    Kernel(A950, "int8", False, _PACKED, _INT, True, "int8", _BOTH, _ARCH35),
    Kernel(A950, "int8", False, _PACKED, _INT, False, "float16", _BOTH, _ARCH35),
    Kernel(A950, "int8", False, _PACKED, _INT, False, "bfloat16", _BOTH, _ARCH35),
    Kernel(A950, "int8", False, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _ARCH35),
    Kernel(A950, "int8", False, _FLOATS, _INT, False, "int32", _BOTH, _ARCH35),
    Kernel(A950, "int8", True, _FLOATS, _PT_BF16, False, "bfloat16", _BOTH, _ARCH35_PT),
    Kernel(A950, "int8", True, _F32, _PT_FP16, False, "float16", _BOTH, _ARCH35_PT),
    Kernel(A950, "int4", False, _PACKED, _INT, False, "float16", (ND,), _ARCH35),
    Kernel(A950, "int4", True, _FLOATS, _PT_BF16, False, "bfloat16", (ND,), _ARCH35_PT),
    Kernel(A950, "int4", True, _F32, _PT_FP16, False, "float16", (ND,), _ARCH35_PT),
    Kernel(P310, "int8", False, _PACKED, _INT, True, "int8", (NZ,), _L0C2UB),
    Kernel(P310, "int8", False, _PACKED, _INT, False, "float16", (NZ,), _L0C2UB),
    Kernel(P310, "int8", True, _F32, _INT, False, "float16", (NZ,), _L0C2UB_PT),
)
