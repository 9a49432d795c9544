"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import (
    attention,
    attention_flash,
    cache,
    collective,
    fused_norms,
    fused_swiglu,
    kv_cache,
    layout,
    maths,
    nn,
    prefetch,
    quant,
    rope,
    sorting,
)

__all__ = [
    "attention",
    "attention_flash",
    "cache",
    "collective",
    "fused_norms",
    "fused_swiglu",
    "kv_cache",
    "layout",
    "maths",
    "nn",
    "prefetch",
    "quant",
    "rope",
    "sorting",
]
