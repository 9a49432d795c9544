"""Shapes and refusals of a static graph, before it runs: each step is computed on meta tensors.

The layers of a decoder are the same steps again and again, so a step with the operator, attributes
and kinds of inputs of an earlier one has its results.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import FractalNZ, Int4
from cann_host.graph.program import Step

__all__ = ["Inference"]

_FEW = 64  # values of a constant that are compared


class Inference:
    """Computes the steps of one graph on meta tensors."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def result(self, step: Step, values: Sequence[Any]) -> Any:
        """What the step's function returns; see `executor.compute_op`.

        Args:
            step: any.
            values: of its sources: meta tensors, and the constants that are known.
        """
        key = (step.op.type, *step.inputs, repr(step.attrs), *map(_kind, values))
        if key in self._known:
            return self._known[key]
        told = executor.cautions()
        result = step.compute(*values, compiling=True)
        is_known = all(map(executor.is_meta, executor.as_list(result)))
        if is_known and told == executor.cautions():  # a caution is for each node
            self._known[key] = result
        return result


def _kind(value: Any) -> Hashable:
    """What a function may read of a value while a graph is compiled."""
    if isinstance(value, FractalNZ):
        if value.weight is not None or not value.is_meta:
            return id(value)
        return _kind(value.like), value.storage_shape, value.swapped
    if isinstance(value, Int4):
        return _kind(value.held), value.swapped
    if not isinstance(value, Tensor):
        return id(value)  # None
    kind = value.dtype, value.shape, value.stride(), value.storage_offset()
    if value.is_meta:
        return kind
    return (*kind, str(value.tolist())) if value.numel() <= _FEW else id(value)
