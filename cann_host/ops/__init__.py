"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import layout, maths, nn, quant

__all__ = ["layout", "maths", "nn", "quant"]
