"""lq_graph: quantized linear layers (LinearQuant) from PyTorch to the Ascend NPU.

    import lq_graph
    layer = lq_graph.LinearQuant(512, 128, output_dtype=torch.float16)

The operators run eagerly on CPU and NPU, under fake tensors, in torch.compile and through torchair.

`import lq_graph` registers the operators. It loads torch, lq_graph.ops and nothing else: a public
name is imported when it is first read (PEP 562). `python -m lq_graph` loads them when a command
needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _import_torch

if TYPE_CHECKING:  # for mypy and IDEs; at run time _HOMES says the same
    from .analysis.check_model import ModelCheck, check_model
    from .analysis.compare import compare
    from .analysis.explain import explain
    from .checkpoints.files import CheckpointError
    from .checkpoints.inspect import inspect
    from .checkpoints.load import load_checkpoint
    from .checkpoints.save import save_checkpoint
    from .errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
    from .forecast.model import forecast_model
    from .fusion.options import set_fusion
    from .fusion.passes import fuse
    from .integrations.config import Config
    from .modules.fusion_options import get_fusion
    from .modules.layouts import from_fractal_nz, pack_int4, to_fractal_nz, unpack_int4
    from .modules.linear_quant import LinearQuant
    from .modules.merge import merge
    from .modules.prepare import use_internal_format_weight
    from .modules.prepare_cpu import prepare_for_cpu
    from .modules.quantized_linear import QuantizedLinear
    from .modules.vendor import convert
    from .ops import dynamic_quant, linear_quant, static_quant, trans_quant_param
    from .quantization.quantize import quantize
    from .quantization.schemes import A4W4Dynamic, A8W8Dynamic, A8W8Static
    from .quantization.smooth import smooth
    from .rules.check import Check, check
    from .rules.plan import Plan, plan
    from .rules.products import get_cann_version, get_product, set_cann_version, set_product

__all__ = [
    "A4W4Dynamic",
    "A8W8Dynamic",
    "A8W8Static",
    "Check",
    "CheckpointError",
    "Config",
    "LinearQuant",
    "LinearQuantError",
    "LinearQuantTypeError",
    "LinearQuantValueError",
    "ModelCheck",
    "Plan",
    "QuantizedLinear",
    "check",
    "check_model",
    "compare",
    "convert",
    "dynamic_quant",
    "explain",
    "forecast_model",
    "from_fractal_nz",
    "fuse",
    "get_cann_version",
    "get_fusion",
    "get_product",
    "inspect",
    "linear_quant",
    "load_checkpoint",
    "merge",
    "pack_int4",
    "plan",
    "prepare_for_cpu",
    "quantize",
    "save_checkpoint",
    "set_cann_version",
    "set_fusion",
    "set_product",
    "smooth",
    "static_quant",
    "to_fractal_nz",
    "trans_quant_param",
    "unpack_int4",
    "use_internal_format_weight",
]

__version__ = "0.1.0"

_HOMES = {
    "analysis.check_model": ("ModelCheck", "check_model"),
    "analysis.compare": ("compare",),
    "analysis.explain": ("explain",),
    "checkpoints.files": ("CheckpointError",),
    "checkpoints.inspect": ("inspect",),
    "checkpoints.load": ("load_checkpoint",),
    "checkpoints.save": ("save_checkpoint",),
    "errors": ("LinearQuantError", "LinearQuantTypeError", "LinearQuantValueError"),
    "forecast.model": ("forecast_model",),
    "fusion.options": ("set_fusion",),
    "fusion.passes": ("fuse",),
    "integrations.config": ("Config",),
    "modules.fusion_options": ("get_fusion",),
    "modules.layouts": ("from_fractal_nz", "pack_int4", "to_fractal_nz", "unpack_int4"),
    "modules.linear_quant": ("LinearQuant",),
    "modules.merge": ("merge",),
    "modules.prepare": ("use_internal_format_weight",),
    "modules.prepare_cpu": ("prepare_for_cpu",),
    "modules.quantized_linear": ("QuantizedLinear",),
    "modules.vendor": ("convert",),
    "ops": ("dynamic_quant", "linear_quant", "static_quant", "trans_quant_param"),
    "quantization.quantize": ("quantize",),
    "quantization.schemes": ("A4W4Dynamic", "A8W8Dynamic", "A8W8Static"),
    "quantization.smooth": ("smooth",),
    "rules.check": ("Check", "check"),
    "rules.plan": ("Plan", "plan"),
    "rules.products": (
        "get_cann_version",
        "get_product",
        "set_cann_version",
        "set_product",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:  # with __getattr__, mypy would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value  # from now on an ordinary attribute
        return value


def _start() -> None:
    """Import torch, and register the operators."""
    _import_torch.import_torch()  # first: it says why torch cannot be imported
    ops = import_module(".ops", __name__)
    globals().update((name, getattr(ops, name)) for name in _HOMES["ops"])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if _import_torch.AT_ONCE:
    _start()
