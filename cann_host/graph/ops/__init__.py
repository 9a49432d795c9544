"""The GE operators the stand-in computes, a file for each family. Importing registers them."""

from . import attention, attention_flash, collective, layout, maths, nn, quant

__all__ = ["attention", "attention_flash", "collective", "layout", "maths", "nn", "quant"]
