"""The name of the layer that an error comes from, looked up when there is an error.

A module does not know its name. While a model runs, its modules are in the frames of Python's
stack: each is a `self`. So nothing is stored in the layers, a copied or renamed model has the right
names, and a call without an error pays nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

import torch
from torch import nn

from ..errors import LinearQuantError
from .compat import run_as_it_is

__all__ = ["WRAPPERS", "live_modules", "name_of", "named"]

E = TypeVar("E", bound=LinearQuantError)
# where torch.compile and torch.export hold a model
WRAPPERS = ("_orig_mod", "_export_root")


def named(error: E, *layer: nn.Module) -> E:
    """The error, its text beginning with the name of the layer whose forward runs. It has no
    traceback: the sentence says all, and the frames in lq_graph would stand above it.

    Args:
        layer: the layer itself, if it is one of lq_graph.
    """
    if torch.compiler.is_dynamo_compiling():  # the call comes again, outside of the graph
        return error
    if not error.layer and (name := name_of(live_modules(*layer))):
        error = error.in_layer("", name)
    return error.with_traceback(None)


run_as_it_is(named)


def live_modules(*found_before: nn.Module) -> list[nn.Module]:
    """The modules that run in this thread, the innermost first; none twice in a row.

    Only frames of methods outside lq_graph are read: until Python 3.13, a frame keeps the locals
    that were read until it ends. A function of the user's that catches the error would keep tensors
    that it deletes, and a frame of lq_graph holds the error, which holds the frame.

    Args:
        found_before: the first of them.
    """
    found = [*found_before]
    for frame in _frames():
        is_method = frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self"
        if is_method and not frame.f_globals.get("__name__", "").startswith("lq_graph."):
            own = frame.f_locals.get("self")
            if isinstance(own, nn.Module) and not (found and found[-1] is own):
                found.append(own)
    return found


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def name_of(modules: list[nn.Module]) -> str:
    """The name of the first module in the last one that holds it; empty if none holds it.

    A layer that a model holds several times gets the name by which it was called: of each module on
    the way, the name in its caller.

    Args:
        modules: the innermost first, as from `live_modules`.
    """
    whole = [at for at, module in enumerate(modules) if getattr(module, "is_whole_layer", False)]
    chain = modules[whole[-1] if whole else 0 :]
    inner = chain[0] if chain else None
    parts: list[str] = []
    for module in chain[1:]:
        name = next((name for name, one in module.named_modules() if one is inner), "")
        if name:
            parts.insert(0, name)
            inner = module
    return ".".join(part for part in ".".join(parts).split(".") if part and part not in WRAPPERS)
