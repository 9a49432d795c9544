"""Questions about sizes that may be symbols.

sympy takes 0.3 s to import. So torch's module of symbolic shapes is imported only for a symbol:
then it is already loaded.
"""

from __future__ import annotations

import torch

from ..kernels import guard_or_false

__all__ = ["check_equal_sizes", "known_true"]


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition is known to be true. A condition that only run time knows counts as
    false."""
    if type(condition) is bool:
        return condition
    return guard_or_false(condition)


def check_equal_sizes(a: int, b: int) -> bool:
    """Whether two sizes are equal. Sizes that only run time knows count as equal, and torch checks
    at run time that they are."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if known_true(a != b):
        return False
    torch._check(a == b)
    return True
