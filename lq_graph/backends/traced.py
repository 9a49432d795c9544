"""Checks while Dynamo traces, so that a compiled call raises our error.

Dynamo turns an error of a fake kernel into a TorchRuntimeError of its own, some hundred lines below
the call, with our sentence inside a longer one. A check that Dynamo runs beside the graph, by its
`comptime`, may raise what it likes. This one raises an error of our class that Dynamo passes on
without its own frames.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ..errors import LinearQuantError
from ..rules.formats import check_graph_format
from .compat import TraceContext, backend_of, error_of_trace, fakes_of, modules_of
from .compat_npu import lowers_to_ge
from .layer_names import WRAPPERS, live_modules, name_of

__all__ = ["check_format_traced", "check_traced"]


def check_traced(check: Callable[..., Any], *args: Any) -> None:  # noqa: ARG001 - _run reads them
    """Call `check(*args)` while Dynamo traces, with fake tensors; nothing in the graph is left of
    it. Dynamo inlines this function: call it only if `torch.compiler.is_dynamo_compiling()`.

    If this version of Dynamo does not show the arguments, nothing is checked: the fake kernels
    refuse the call.

    Args:
        check: a function of a module; it raises a LinearQuantError or returns.
        args: tensors, and values that are known while Dynamo traces.
    """
    torch._dynamo.comptime.comptime(_run)


def _run(trace: TraceContext) -> None:
    try:
        check = trace.get_local("check").as_python_constant()
        args = fakes_of(trace.get_local("args"))
    except Exception:
        return
    if args is None:
        return
    try:
        check(*args)
    except LinearQuantError as error:
        raise _named(trace, error) from None
    except Exception:
        return  # a question about sizes that only the graph can ask


def check_format_traced(weight_format: int) -> None:  # noqa: ARG001 - _run_format reads it
    """Refuse a weight's format that the graph which Dynamo traces for the NPU does not take."""
    torch._dynamo.comptime.comptime(_run_format)


def _run_format(trace: TraceContext) -> None:
    if not lowers_to_ge(backend_of(trace)):
        return
    try:
        check_graph_format(trace.get_local("weight_format").as_python_constant())
    except LinearQuantError as error:
        raise _named(trace, error) from None


def _named(trace: TraceContext, error: LinearQuantError) -> LinearQuantError:
    name = _name(trace)
    return error_of_trace(error.in_layer("", name) if name else error)


def _name(trace: TraceContext) -> str:
    """The name of the layer that Dynamo traces: of the compiled module in the model that calls it,
    and of the layer in the compiled module."""
    running = live_modules()
    outer, path = name_of(running), ""
    if any(getattr(module, "is_whole_layer", False) for module in running):
        return outer
    for written, kind in modules_of(trace):
        path = written
        if getattr(kind, "is_whole_layer", False):
            break
    return ".".join(filter(None, (outer, _qualified(path))))


def _qualified(path: str) -> str:
    """A module's name from how Dynamo writes it: "L['self']._modules['layers']._modules['0'].mlp"
    is "layers.0.mlp", as "L['self'].layers.0.mlp" and "getattr(L['self'].layers[0], 'mlp')" are."""
    _, _, steps = path.partition("]")
    parts = re.findall(r"[^\s.,()\[\]']+", steps)
    return ".".join(part for part in parts if part not in ("_modules", *WRAPPERS))
