"""Lowering of ATen's operators that torchair has by name only: its converters raise
NotImplementedError. Models of transformers call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._torchair import Tensor, TensorSpec, ge, register_fx_node_ge_converter

__all__ = ["register_missing"]


def repeat_interleave(
    self: Tensor,
    repeats: int,
    dim: int | None = None,
    *,
    output_size: int | None = None,
    meta_outputs: TensorSpec | None = None,
) -> Any:
    """NB: aten::repeat_interleave.self_int(Tensor self, SymInt repeats, int? dim=None, *,
    SymInt? output_size=None) -> Tensor

    Each value several times, next to each other: one Tile between two views. cos and sin of GPT-J,
    GLM, Cohere and ERNIE are made so.
    """
    if dim is None or not isinstance(repeats, int):
        raise NotImplementedError("aten::repeat_interleave in a GE graph takes dim, and a number")
    sizes = list(self.symsize)
    dim %= len(sizes)
    sizes[dim] = sizes[dim] * repeats
    unknown = sum(not isinstance(size, int) for size in sizes)
    if unknown > 1:
        raise NotImplementedError("aten::repeat_interleave in a GE graph with two unknown sizes")
    rows = ge.Unsqueeze(self, axes=[dim + 1])
    tiled = ge.Tile(rows, [repeats if i == dim + 1 else 1 for i in range(len(sizes) + 1)])
    return ge.Reshape(tiled, [size if isinstance(size, int) else -1 for size in sizes])


_CONVERTERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.repeat_interleave.self_int: repeat_interleave,
}


_OURS = "_lq_graph"  # attribute of a converter


def _after(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """torchair's converter, and ours where that is not implemented."""
    theirs = getattr(theirs, "__wrapped__", theirs)  # torchair wraps what this returns

    def convert(*args: Any, meta_outputs: TensorSpec | None = None, **kwargs: Any) -> Any:
        try:
            return theirs(*args, meta_outputs=meta_outputs, **kwargs)
        except NotImplementedError:
            return ours(*args, meta_outputs=meta_outputs, **kwargs)

    return convert


def register_missing() -> None:
    """Register the converters, each after torchair's own."""
    for overload, ours in _CONVERTERS.items():
        theirs = getattr(overload, "_ge_converter", None)
        if getattr(theirs, _OURS, False):
            continue
        converter = ours if theirs is None else _after(theirs, ours)
        setattr(converter, _OURS, True)  # torchair wraps it, and keeps its attributes
        register_fx_node_ge_converter(overload)(converter)
