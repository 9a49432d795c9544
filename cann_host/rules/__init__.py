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
    rope               ApplyRotaryPosEmb, RotaryPositionEmbedding, InterleaveRope
    rope_grad          RotaryPositionEmbeddingGrad, RotaryMulGrad
    mrope              RopeWithSinCosCache
    cache              ScatterNdUpdate, Scatter, ScatterElements
    norms              RmsNorm, AddRmsNorm, AddRmsNormCast, LayerNormV4
    fused_norms        norms that quantize: AddRmsNormDynamicQuant, AddRmsNormQuant, RmsNormQuant
    fused_swiglu       SwiGlu, SwiGluGrad, DequantSwigluQuant, SwiGluQuant
    kv_cache           ScatterPaKvCache, KvRmsNormRopeCache
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
from .cache import (
    ScatterCall,
    check_scatter_elements,
    check_scatter_nd_update,
    check_scatter_update,
    outside,
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
from .fused_norms import (
    AddRmsNormDynamicQuantCall,
    AddRmsNormQuantCall,
    RmsNormQuantCall,
    check_add_rms_norm_dynamic_quant,
    check_add_rms_norm_quant,
    check_rms_norm_quant,
)
from .fused_swiglu import (
    DequantSwigluQuantCall,
    SwiGluCall,
    SwiGluGradCall,
    SwiGluQuantCall,
    check_dequant_swiglu_quant,
    check_group_list,
    check_swi_glu,
    check_swi_glu_grad,
    check_swi_glu_quant,
    dequant_swiglu_quant_ignores,
)
from .kv_cache import (
    CACHE_MODES,
    KvRmsNormRopeCall,
    ScatterPaCall,
    check_kv_rms_norm_rope_cache,
    check_scatter_pa_kv_cache,
    kv_rms_norm_rope_ignores,
)
from .mrope import MropeCall, check_mrope
from .norms import RmsNormCall, check_add_rms_norm_cast, check_layer_norm, check_rms_norm
from .products import A2, A950, P310, soc_family
from .quant_matmul import KERNELS, Kernel, QuantMatmulCall, check_quant_matmul
from .refusal import INNER, INVALID, NO_KERNEL, NULL_POINTER, TILING, Refusal
from .rope import (
    HALF,
    INTERLEAVE,
    INTERLEAVE_HALF,
    LAYOUTS,
    QUARTER,
    ROTARY_MODES,
    ApplyRotaryCall,
    RotaryCall,
    apply_rotary_ignores,
    check_apply_rotary,
    check_interleave_rope,
    check_rotary,
    check_rotary_mul,
    rotary_ignores,
)
from .rope_grad import RotaryGradCall, check_rotary_grad, check_rotary_mul_grad
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
    "CACHE_MODES",
    "DEFINED",
    "FLASH_WIDTH",
    "FUSED",
    "HALF",
    "INCRE",
    "INNER",
    "INTERLEAVE",
    "INTERLEAVE_HALF",
    "INVALID",
    "KERNELS",
    "LAYOUTS",
    "MASK_SIZE",
    "ND",
    "NO_KERNEL",
    "NULL_POINTER",
    "NZ",
    "P310",
    "PROMPT",
    "QUANT_MODES",
    "QUARTER",
    "ROTARY_MODES",
    "TILING",
    "AddRmsNormDynamicQuantCall",
    "AddRmsNormQuantCall",
    "ApplyRotaryCall",
    "AscendQuantCall",
    "AttentionCall",
    "DequantSwigluQuantCall",
    "DynamicQuantCall",
    "FlashCall",
    "Kernel",
    "KvRmsNormRopeCall",
    "Lengths",
    "MropeCall",
    "PackedWords",
    "QuantMatmulCall",
    "QuantizeCall",
    "Refusal",
    "RmsNormCall",
    "RmsNormQuantCall",
    "RotaryCall",
    "RotaryGradCall",
    "ScatterCall",
    "ScatterPaCall",
    "SwiGluCall",
    "SwiGluGradCall",
    "SwiGluQuantCall",
    "TensorDesc",
    "TransQuantParamCall",
    "apply_rotary_ignores",
    "ascend_quant_axis",
    "check_add_rms_norm_cast",
    "check_add_rms_norm_dynamic_quant",
    "check_add_rms_norm_quant",
    "check_apply_rotary",
    "check_ascend_quant",
    "check_attention",
    "check_definition",
    "check_dequant_swiglu_quant",
    "check_dynamic_quant",
    "check_flash",
    "check_group_list",
    "check_interleave_rope",
    "check_kv_rms_norm_rope_cache",
    "check_layer_norm",
    "check_mrope",
    "check_quant_matmul",
    "check_quantize",
    "check_rms_norm",
    "check_rms_norm_quant",
    "check_rotary",
    "check_rotary_grad",
    "check_rotary_mul",
    "check_rotary_mul_grad",
    "check_scatter_elements",
    "check_scatter_nd_update",
    "check_scatter_pa_kv_cache",
    "check_scatter_update",
    "check_swi_glu",
    "check_swi_glu_grad",
    "check_swi_glu_quant",
    "check_trans_quant_param",
    "dequant_swiglu_quant_ignores",
    "dynamic_quant_ignores",
    "dynamic_quant_scale_shape",
    "few_tokens",
    "flash_dims",
    "flash_keys",
    "flash_out_shape",
    "flash_softmax_shape",
    "kind_of",
    "kv_rms_norm_rope_ignores",
    "lse_shape",
    "out_shape",
    "outside",
    "packed_words",
    "query_dims",
    "rotary_ignores",
    "soc_family",
    "trans_quant_param_shape",
    "value_head",
]
