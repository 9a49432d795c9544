"""What a model will take on an NPU: milliseconds a step, memory, and what binds.

`kernel_cost` forecasts one kernel (its signature is in `cost`), `forecast_model` a whole decoder.
"""

from .cost import KernelCost, kernel_cost

__all__ = ["KernelCost", "kernel_cost"]
