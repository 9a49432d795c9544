"""Python functions that the native library calls.

It calls them as Python's own C code would (csrc/python.h), not through ctypes: a ctypes callback
that ends in an exception returns 0, which is success, and drops the exception. A function returns a
code, 0 for success. An exception that it does not catch, a Ctrl-C's KeyboardInterrupt for example,
makes the call fail, and is raised again in the same thread as soon as that is back in Python. So a
function catches what it can give a code and a text for, an Exception, and no other BaseException.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

__all__ = ["give", "int64s"]

_held: list[Callable[..., int]] = []  # the library keeps their addresses


def give(setter: Any, *functions: Callable[..., int] | None) -> None:
    """Hand functions to the library.

    Args:
        setter: the library's function that takes them.
        functions: called with numbers and texts, pointers as numbers; None takes one away.
    """
    setter.argtypes = (ctypes.c_void_p,) * len(functions)
    setter.restype = None
    _held.extend(function for function in functions if function is not None)
    setter(*(None if function is None else id(function) for function in functions))


def int64s(address: int, count: int) -> list[int]:
    """The numbers at an address."""
    return (ctypes.c_int64 * count).from_address(address)[:]
