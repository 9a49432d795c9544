"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import collective, layout, maths, nn, quant, sorting

__all__ = ["collective", "layout", "maths", "nn", "quant", "sorting"]
