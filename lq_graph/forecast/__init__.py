"""What a model takes on an NPU: milliseconds a step, memory, and what binds.

`kernel_cost` forecasts one kernel (its signature is in `cost`), `forecast_model` a whole decoder.
No part of it needs an NPU, CANN or transformers.
"""

from .cost import KernelCost, kernel_cost
from .decoders import public_models
from .model import ModelForecast, forecast_model

__all__ = ["KernelCost", "ModelForecast", "forecast_model", "kernel_cost", "public_models"]
