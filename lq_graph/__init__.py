"""lq_graph: quantized linear layers (LinearQuant) from PyTorch to the Ascend NPU.

    import lq_graph
    layer = lq_graph.LinearQuant(512, 128, output_dtype=torch.float16)

The op runs eagerly on CPU and NPU, under fake tensors, in torch.compile and through torchair.
"""

from __future__ import annotations

from . import _import_torch  # noqa: F401 - first: it says why torch cannot be imported
from .analysis.compare import compare
from .analysis.explain import explain
from .checkpoints.load import CheckpointError, load_checkpoint
from .checkpoints.save import save_checkpoint
from .errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from .modules.layouts import from_fractal_nz, pack_int4, to_fractal_nz, unpack_int4
from .modules.linear_quant import LinearQuant
from .modules.prepare import use_internal_format_weight
from .modules.quantized_linear import QuantizedLinear
from .modules.vendor import convert
from .ops import dynamic_quant, linear_quant, static_quant, trans_quant_param
from .quantization.quantize import quantize
from .quantization.schemes import A4W4Dynamic, A8W8Dynamic, A8W8Static
from .rules.check import Check, check
from .rules.plan import Plan, plan
from .rules.products import get_product, set_product

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
