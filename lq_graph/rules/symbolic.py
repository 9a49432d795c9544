"""Sizes that may be symbols: questions about them, and a cache of what is decided from them.

sympy takes 0.3 s to import. So torch's module of symbolic shapes is imported only for a symbol:
then it is already loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import LinearQuantTypeError
from ..kernels import guard_or_false

__all__ = ["cached_decision", "check_equal_sizes", "known_true"]

_Arguments = ParamSpec("_Arguments")
_Decision = TypeVar("_Decision")


def cached_decision(decide: Callable[_Arguments, _Decision]) -> Callable[_Arguments, _Decision]:
    """`decide`, cached if its arguments hold no symbols: a model makes the same few calls again and
    again. A refusal is not cached."""
    cached = lru_cache(maxsize=4096)(decide)

    @wraps(decide)
    def decided(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Decision:
        try:
            return cached(*args, **kwargs)
        except TypeError as error:
            if isinstance(error, LinearQuantTypeError):
                raise
            return decide(*args, **kwargs)  # symbolic sizes cannot be a key

    return decided


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
