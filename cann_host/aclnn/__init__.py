"""The operators of libopapi, computed by torch on CPU tensors over the same memory.

`csrc/aclnn.cpp` calls the runner twice for each operator: to check, on the caller's thread, and to
compute, on torch_npu's queue thread. An operator that is not in `OPERATORS` is not in libopapi
either.

    operator      Operator, the record of one operator
    tensors       AclTensor; the words that csrc/aclnn.cpp sends as arguments
    refusal       RefusedError
    checks        checks that several operators share
    quant_matmul  aclnnQuantMatmul*, aclnnTransQuantParam*
    activations   aclnnDynamicQuant*, aclnnAscendQuantV3, aclnnQuantize
    norms         aclnnRmsNorm, aclnnAddRmsNorm
    rope          aclnnApplyRotaryPosEmb*, aclnnRotaryPositionEmbedding*, aclnnInterleaveRope,
                  aclnnRopeWithSinCosCache*
    cache         aclnnScatterNdUpdate, aclnnInplaceScatterUpdate
    fused_norms   norms that quantize: aclnnAddRmsNormDynamicQuantV2
    fused_swiglu  aclnnSwiGlu*, aclnnDequantSwigluQuantV2, aclnnSwiGluQuantV2
    kv_cache      aclnnScatterPaKvCache, aclnnKvRmsNormRopeCache*
    copies        copies, casts of dtype and format, padding
    runner        OPERATORS; Runner, which the library calls
"""

from __future__ import annotations

from cann_host.rules import INNER

from .activations import ROUND_MODES
from .operator import Operator
from .refusal import RefusedError
from .runner import OPERATORS, Runner
from .tensors import ACL_DTYPES, BASE_FORMATS, AclTensor

__all__ = [
    "ACL_DTYPES",
    "BASE_FORMATS",
    "INNER",
    "OPERATORS",
    "ROUND_MODES",
    "AclTensor",
    "Operator",
    "RefusedError",
    "Runner",
]
