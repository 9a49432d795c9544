"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import attention, collective, layout, maths, nn, quant

__all__ = ["attention", "collective", "layout", "maths", "nn", "quant"]
