"""Makes our operators known to torchair without importing it.

torchair finds a converter as the attribute `_ge_converter` of the operator, at the moment a
graph is lowered (seen in 6.0.rc3 to torch_npu 2.13's). We put a placeholder there that imports
`lq_graph.converters`, whose registration replaces the placeholder, and hands the call on. So
`import lq_graph` works before or after torchair, or without it.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from torch._ops import OpOverload

__all__ = ["install", "load"]

_ATTRIBUTE = "_ge_converter"


def load() -> ModuleType:
    """`lq_graph.converters`, imported late: it imports torchair."""
    return importlib.import_module("lq_graph.converters")


class _Placeholder:
    """Stands for the converter of one operator until torchair asks for it."""

    # torchair passes meta_outputs to converters that declare it
    require_meta = True

    def __init__(self, op: OpOverload) -> None:
        self._op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        load().register()  # replaces self
        return getattr(self._op, _ATTRIBUTE)(*args, **kwargs)


def install(*ops: OpOverload) -> None:
    """Put a placeholder on each operator that has no converter yet."""
    for op in ops:
        if not hasattr(op, _ATTRIBUTE):
            setattr(op, _ATTRIBUTE, _Placeholder(op))
