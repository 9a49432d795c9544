"""What CANN refuses in a quantized matmul and the operators around it, as tables and checks.

The stand-in must refuse what a device refuses; otherwise a pass on it would be worth nothing. Both
compiled graphs (`cann_host.graph`) and eager calls (`cann_host.aclnn`) use these rules.

The rules are written from CANN's public operator sources. They share nothing with `lq_graph.rules`,
on purpose, so each checks the other: do not import one from the other.

    descriptors        TensorDesc, what a rule reads of a tensor
    products           SoC name -> family of products
    refusal            Refusal: the reason and CANN's error code
    quant_matmul       QuantBatchMatmulV3, aclnnQuantMatmul*, and their support table
    trans_quant_param  TransQuantParamV2
    activation_dtypes  what DynamicQuant and AscendQuant have in common
    dynamic_quant      DynamicQuant, DynamicQuantV2
    static_quant       AscendQuantV2, aclnnQuantize
    norms              RmsNorm, AddRmsNorm, LayerNormV4
    definitions        dtypes of activations and other graph operators
    attention          FusedInferAttentionScore: layouts, dtypes; attention_check has its check,
                       attention_prompt and attention_incre the two sets of rules behind it
    attention_flash    FlashAttentionScore

A check takes one record of the call and returns None or a `Refusal`. A refusal of CANN has CANN's
code. If CANN takes a call, but its kernel then reads outside its inputs, or the stand-in does not
compute it, the refusal is cann_host's own and has no code.

Sources: the public repository hicann/ops-nn, for each operator its definition, tiling, InferShape
and the checks of its aclnn functions; each module names its files. tests/support/cann_tables.py
compares the rules with CANN's public tests.
"""

from __future__ import annotations

from .attention import (
    FUSED,
    INCRE,
    MASK_SIZE,
    PROMPT,
    AttentionCall,
    Lengths,
    kind_of,
    lse_shape,
    out_shape,
    query_dims,
    value_head,
)
from .attention_antiquant import few_tokens
from .attention_check import check_attention
from .attention_flash import (
    FLASH_WIDTH,
    FlashCall,
    check_flash,
    flash_dims,
    flash_keys,
    flash_out_shape,
    flash_softmax_shape,
)
from .definitions import DEFINED, check_definition
from .descriptors import ND, NZ, TensorDesc
from .dynamic_quant import (
    QUANT_MODES,
    DynamicQuantCall,
    check_dynamic_quant,
    dynamic_quant_ignores,
    dynamic_quant_scale_shape,
)
from .norms import RmsNormCall, check_layer_norm, check_rms_norm
from .products import A2, A950, P310, soc_family
from .quant_matmul import KERNELS, Kernel, QuantMatmulCall, check_quant_matmul
from .refusal import INNER, INVALID, NO_KERNEL, NULL_POINTER, TILING, Refusal
from .static_quant import (
    AscendQuantCall,
    QuantizeCall,
    ascend_quant_axis,
    check_ascend_quant,
    check_quantize,
)
from .trans_quant_param import (
    PackedWords,
    TransQuantParamCall,
    check_trans_quant_param,
    packed_words,
    trans_quant_param_shape,
)

__all__ = [
    "A2",
    "A950",
    "DEFINED",
    "FLASH_WIDTH",
    "FUSED",
    "INCRE",
    "INNER",
    "INVALID",
    "KERNELS",
    "MASK_SIZE",
    "ND",
    "NO_KERNEL",
    "NULL_POINTER",
    "NZ",
    "P310",
    "PROMPT",
    "QUANT_MODES",
    "TILING",
    "AscendQuantCall",
    "AttentionCall",
    "DynamicQuantCall",
    "FlashCall",
    "Kernel",
    "Lengths",
    "PackedWords",
    "QuantMatmulCall",
    "QuantizeCall",
    "Refusal",
    "RmsNormCall",
    "TensorDesc",
    "TransQuantParamCall",
    "ascend_quant_axis",
    "check_ascend_quant",
    "check_attention",
    "check_definition",
    "check_dynamic_quant",
    "check_flash",
    "check_layer_norm",
    "check_quant_matmul",
    "check_quantize",
    "check_rms_norm",
    "check_trans_quant_param",
    "dynamic_quant_ignores",
    "dynamic_quant_scale_shape",
    "few_tokens",
    "flash_dims",
    "flash_keys",
    "flash_out_shape",
    "flash_softmax_shape",
    "kind_of",
    "lse_shape",
    "out_shape",
    "packed_words",
    "query_dims",
    "soc_family",
    "trans_quant_param_shape",
    "value_head",
]
