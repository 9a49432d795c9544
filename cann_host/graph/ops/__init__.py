"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import cache, collective, layout, maths, nn, quant, rope

__all__ = ["cache", "collective", "layout", "maths", "nn", "quant", "rope"]
