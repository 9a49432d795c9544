"""lq_graph: quantized linear layers (LinearQuant) from PyTorch to the Ascend NPU.

    import lq_graph
    layer = lq_graph.LinearQuant(512, 128, output_dtype=torch.float16)

The op runs eagerly on CPU and NPU, under fake tensors, in torch.compile and through torchair.
"""

from __future__ import annotations

import os
import sys

if sys.argv[:2] == ["-m", "check"] and "lq_graph" in sys.orig_argv:
    # `python -m lq_graph check` asks no device, and must work where torch_npu has no CANN.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

try:
    import torch
except RuntimeError as error:
    # torch loads torch_npu by itself, which fails on a machine without CANN
    if "torch_npu" not in str(error):
        raise
    raise ImportError(
        "lq_graph: torch_npu is installed, but neither CANN nor cann_host is active in this "
        "process, so torch itself cannot be imported. What to do: with an NPU, source CANN's "
        "set_env.sh first; without one, run `python -m cann_host your_script.py` (a stand-in for "
        "CANN that computes on the CPU); for plain CPU use, set TORCH_DEVICE_BACKEND_AUTOLOAD=0."
    ) from None

from .check import Check, check
from .checkpoint import CheckpointError, load_checkpoint
from .checkpoint_write import save_checkpoint
from .compare import compare
from .errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from .explain import explain
from .module import LinearQuant
from .ops import dynamic_quant, linear_quant, static_quant, trans_quant_param
from .plan import Plan, plan
from .prepare import use_internal_format_weight
from .product import get_product, set_product
from .quantize import quantize
from .quantized_linear import QuantizedLinear
from .schemes import A4W4Dynamic, A8W8Dynamic, A8W8Static
from .vendor import convert
from .weights import from_fractal_nz, pack_int4, to_fractal_nz, unpack_int4

__all__ = [
    "A4W4Dynamic",
    "A8W8Dynamic",
    "A8W8Static",
    "Check",
    "CheckpointError",
    "LinearQuant",
    "LinearQuantError",
    "LinearQuantTypeError",
    "LinearQuantValueError",
    "Plan",
    "QuantizedLinear",
    "check",
    "compare",
    "convert",
    "dynamic_quant",
    "explain",
    "from_fractal_nz",
    "get_product",
    "linear_quant",
    "load_checkpoint",
    "pack_int4",
    "plan",
    "quantize",
    "save_checkpoint",
    "set_product",
    "static_quant",
    "to_fractal_nz",
    "trans_quant_param",
    "unpack_int4",
    "use_internal_format_weight",
]

__version__ = "0.1.0"

del os, sys, torch
