"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import collective, fused_norms, fused_swiglu, layout, maths, nn, prefetch, quant

__all__ = [
    "collective",
    "fused_norms",
    "fused_swiglu",
    "layout",
    "maths",
    "nn",
    "prefetch",
    "quant",
]
