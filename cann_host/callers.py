"""Compiled graphs that two threads call at once.

torchair keeps what belongs to one call in the graph: a GE graph's executor has the addresses of
inputs and outputs, a captured graph the memory of the inputs. While it compiles and runs, it does
not hold Python's lock. A second call in this time gives its inputs to the first, and the second of
two first calls frees the graph that the first compiles. So it is on a device too.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from cann_host.missing import name_operator

__all__ = ["ConcurrentCallError", "one_caller", "watch"]

# The classes of graphs by the end of their module's name, which may be in several packages, and the
# methods that change a graph.
_GRAPHS = {
    "._ge_concrete_graph.fx2ge_converter": ("GeConcreteGraph", "__call__"),
    ".core._backend": ("TorchNpuGraph", "load", "compile", "run"),
    "._acl_concrete_graph.fx2acl_converter": ("AclConcreteGraph", "__call__"),
    "._acl_concrete_graph.acl_graph": ("AclGraph", "__call__"),  # not in old versions
}


class ConcurrentCallError(RuntimeError):
    """A graph would compute with the inputs of another thread's call."""


def one_caller(kind: Any, *methods: str) -> None:
    """Refuse a call of one of the methods of a graph while another thread is in one.

    Args:
        kind: a class of graphs.
        methods: the names of methods that it defines; others are left alone.
    """
    callers: dict[int, int] = {}  # the thread that is in a graph's method, by the graph's id
    for method in methods:
        if method in vars(kind):
            setattr(kind, method, _checked(getattr(kind, method), callers))


def _checked(method: Callable[..., Any], callers: dict[int, int]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        graph, thread = id(self), threading.get_ident()
        if callers.setdefault(graph, thread) != thread:
            raise ConcurrentCallError(
                "cann_host: two threads call one compiled graph at once. torchair keeps the inputs "
                "of a call in the graph and does not check this, so a device could compute one "
                "call with the inputs of the other; this refusal is cann_host's own. What to do: "
                "hold a lock around the call, from the first one on, or compile the function once "
                "for each thread."
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            callers.pop(graph, None)

    return checked


class _Torchair(MetaPathFinder):
    """Watches the classes of graphs when their modules are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = next((_GRAPHS[end] for end in _GRAPHS if name.endswith(end)), None)
        others = [finder for finder in sys.meta_path if finder is not self]
        if found is None:
            return None
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], None] = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                kind, *methods = found
                if hasattr(module, kind):
                    one_caller(getattr(module, kind), *methods)
                if name.endswith(".fx2ge_converter"):
                    name_operator(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Watch torchair's graphs from now on: before torchair is imported."""
    sys.meta_path.insert(0, _Torchair())
