"""The quantized matmul: QuantBatchMatmulV3 in a graph, aclnnQuantMatmul* in an eager call.

Sources, in hicann/ops-nn under matmul/quant_batch_matmul_v3:

    [check]  op_api/quant_matmul_checker.cpp                     dtype and shape checks of aclnn
    [tiling] op_host/op_tiling/quant_batch_matmul_v3_tiling.cpp  the same of the graph operator
    [arch35] op_host/op_tiling/arch35/quant_batch_matmul_v3_checker.cpp  and of Ascend 950's
    [v5]     ../quant_batch_matmul_v4/op_host/op_api/aclnn_quant_matmul_v5.cpp
    [nz]     op_api/aclnn_quant_matmul_v4.cpp                    aclnnQuantMatmulWeightNz is here
    [arch20] op_host/op_tiling/arch20                            pertoken on 310P
    [def]    op_host/quant_batch_matmul_v3_def.cpp               dtypes of the graph operator
    [base]   op_host/op_tiling/quant_batch_matmul_v3_tiling_base.cpp
    [doc]    docs/aclnnQuantMatmulV4.md
    [proto]  op_graph/quant_batch_matmul_v3_proto.h

    call     QuantMatmulCall
    kernels  KERNELS, the support table
    dtypes   the row of the table for a call
    shapes   formats and shapes

The checks run in CANN's order, so that a call with two faults gets CANN's code.
"""

from __future__ import annotations

from functools import lru_cache

from ..descriptors import ND
from ..products import A950, SOC_PREFIXES
from ..refusal import NO_KERNEL, Refusal
from .call import Entry, QuantMatmulCall
from .dtypes import check_dtypes
from .kernels import KERNELS, Kernel
from .shapes import check_formats_and_shapes

__all__ = ["KERNELS", "Entry", "Kernel", "QuantMatmulCall", "check_quant_matmul"]


@lru_cache(maxsize=4096)  # a model makes the same few calls again and again
def check_quant_matmul(call: QuantMatmulCall) -> Refusal | None:
    """Why CANN, or cann_host, refuses a quantized matmul; None if it is accepted."""
    if call.family is None:
        known = ", ".join(prefix for prefix, _ in SOC_PREFIXES)
        reason = f"cann_host has no rules for this SoC; it knows {known}"
        return call.refused(reason, NO_KERNEL)
    if _returns_at_once(call):
        return None
    return check_dtypes(call) or check_formats_and_shapes(call)


def _returns_at_once(call: QuantMatmulCall) -> bool:
    """Whether an eager call on 950 has an empty result, for which [v5] returns before any other
    check; with a FRACTAL_NZ x2 for m = 0 only."""
    x1, x2 = call.x1, call.x2
    if call.family != A950 or call.is_graph or min(len(x1.shape), len(x2.shape)) < 2:
        return False
    return x1.rows == 0 or (x2.columns == 0 and x2.format == ND)
