"""torchair converters of lq_graph's operators.

The folder is installed as `lq_graph.converters` (in the checkout, the link lq_graph/converters
points here); importing that registers them. It is rarely needed: `import lq_graph` arranges that
torchair finds them when it lowers the first graph.
"""

from __future__ import annotations

if __name__ != "lq_graph.converters":  # found in the checkout's own folder
    raise ImportError(
        f"lq_graph's converters are imported as {__name__}; what to do: import lq_graph.converters"
    )

import torch

import lq_graph  # noqa: F401  (defines the operators)

from . import graph
from . import linear_quant as _builders
from ._torchair import register_fx_node_ge_converter

__all__ = ["graph", "register"]


def register() -> None:
    """Register every converter with torchair; registering again changes nothing.

    Source: torchair's register_fx_node_ge_converter.
    """
    ops = torch.ops.lq_graph
    for op, builder in (
        (ops.linear_quant.default, _builders.linear_quant),
        (ops.trans_quant_param.default, _builders.trans_quant_param),
        (ops.dynamic_quant.default, _builders.dynamic_quant),
        (ops.static_quant.default, _builders.static_quant),
    ):
        register_fx_node_ge_converter(op)(builder)


register()
