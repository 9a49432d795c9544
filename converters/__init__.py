"""torchair converters of lq_graph's operators.

The folder is installed as `lq_graph.converters` (in the checkout, the link lq_graph/converters
points here). Importing it registers the converters. You rarely need this: after `import lq_graph`,
torchair finds them itself when it lowers the first graph.
"""

from __future__ import annotations

if __name__ != "lq_graph.converters":  # found in the checkout's own folder
    raise ImportError(
        f"lq_graph's converters are imported as {__name__}; what to do: import lq_graph.converters"
    )

from lq_graph.ops import OPERATORS, NotNeeded, load

from . import graph, missing, norms
from ._torchair import register_fx_node_ge_converter

__all__ = ["graph", "register"]


def register() -> None:
    """Register every converter with torchair, and those of ATen's and torch_npu's operators that it
    lacks. Registering again changes nothing.

    Source: torchair's register_fx_node_ge_converter.
    """
    for operator in OPERATORS:
        if not isinstance(operator.converter, NotNeeded):
            register_fx_node_ge_converter(operator.overload)(load(operator.converter))
    norms.register_missing()
    missing.register_missing()


register()
