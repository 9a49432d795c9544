"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import cache, collective, fused_norms, fused_swiglu, layout, maths, nn, prefetch, quant, rope

__all__ = [
    "cache",
    "collective",
    "fused_norms",
    "fused_swiglu",
    "layout",
    "maths",
    "nn",
    "prefetch",
    "quant",
    "rope",
]
