"""Conditions on sizes that may be symbols, with every version of torch."""

from __future__ import annotations

import torch

__all__ = ["guard_or_false"]


def guard_or_false(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is true, with a guard if it has symbols. A condition that only run time
    knows counts as false.

    torch has it since 2.8. With torch 2.7, Dynamo breaks the graph at a condition that only run
    time knows: its tracer has no question that it would answer with false.
    """
    from torch.fx.experimental import symbolic_shapes as symbolic  # loads sympy: 0.3 s

    if hasattr(symbolic, "guard_or_false"):
        return symbolic.guard_or_false(condition)
    if torch.compiler.is_dynamo_compiling():
        return bool(condition)
    if symbolic.statically_known_true(condition):
        return True
    return symbolic.definitely_true(condition)  # type: ignore[attr-defined, no-any-return]
