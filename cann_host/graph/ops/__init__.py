"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import cache, collective, kv_cache, layout, maths, nn, quant, rope

__all__ = ["cache", "collective", "kv_cache", "layout", "maths", "nn", "quant", "rope"]
