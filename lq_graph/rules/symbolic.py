"""Questions about sizes that may be symbols."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import guard_or_false

__all__ = ["differ", "sure"]


def sure(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is known to hold; what only run time can tell counts as no."""
    return condition if type(condition) is bool else guard_or_false(condition)


def differ(a: int, b: int) -> bool:
    """a != b. Sizes only known at run time are taken to agree, and recorded as such."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    if sure(a != b):
        return True
    torch._check(a == b)
    return False
