"""Tensor parallelism: quantized layers split over several devices, with torch.distributed.

parallelize_module(model, mesh, {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant()})
"""

from .styles import ColwiseLinearQuant, LinearQuantStyle, RowwiseLinearQuant

__all__ = ["ColwiseLinearQuant", "LinearQuantStyle", "RowwiseLinearQuant"]
