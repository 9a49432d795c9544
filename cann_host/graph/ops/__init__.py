"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import (
    attention,
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
)

__all__ = [
    "attention",
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
]
