"""Everything that Python and the native library share: the signatures of its functions, the structs
that both read, and the Python functions that it calls.

csrc/bindings.h declares the same for the compiler, and a test compares the two files. `declare`
checks a loaded library: one with structs of other sizes is refused before anything reads them.

The library calls Python functions as Python's own C code does (csrc/python.h), not through ctypes:
a ctypes callback that raises an exception returns 0, which is success, and drops the exception. A
function returns a code, 0 for success. If it does not catch an exception, for example Ctrl-C's
KeyboardInterrupt, the call fails, and the exception is raised again in the same thread when it is
back in Python. So a function catches Exception, stores a text and returns a code; it does not catch
any other BaseException.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    POINTER,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_long,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any, TypeAlias

from cann_host.options import CannHostError

__all__ = [
    "CALLBACKS",
    "CAPTURES",
    "FREED",
    "FUNCTIONS",
    "STRUCTS",
    "TRACKS",
    "WAITS",
    "AclnnExecutor",
    "GeCompile",
    "GeRelease",
    "GeRun",
    "GeTensor",
    "Replay",
    "declare",
    "give",
]


class GeTensor(ctypes.Structure):
    """A tensor that is an input of a compiled graph. Equal bytes, with equal dims, are the same
    tensor."""

    _fields_ = (
        ("data", c_void_p),
        ("size", c_size_t),
        ("dtype", c_int32),
        ("format", c_int32),
        ("dim_count", c_int32),
        ("origin_dim_count", c_int32),
        ("has_origin", c_int32),
        ("placement", c_int32),
        ("first_dim", c_uint64),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {"cann_host_ge_tensor": GeTensor}

# The Python functions. Pointers are passed as numbers; each function returns a code.
AclnnExecutor: TypeAlias = Callable[[str, int, int, int], int]  # operator, phase, words, how many
GeCompile: TypeAlias = Callable[[int, int, int, int], int]  # model, its size, summary, number
# number, GeTensors, how many, the dims of all, how many, outputs
GeRun: TypeAlias = Callable[[int, int, int, int, int, int], int]
GeRelease: TypeAlias = Callable[[int], int]  # number
Replay: TypeAlias = Callable[[int], int]  # number of the work

# name of a setter: the functions it takes, in order
CALLBACKS: dict[str, tuple[Any, ...]] = {
    "cann_host_set_aclnn_executor": (AclnnExecutor,),
    "cann_host_set_ge_executor": (GeCompile, GeRun, GeRelease),
    "cann_host_set_replay": (Replay,),
}

# name: its return type and its arguments
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cann_host_sources": (c_char_p, ()),
    "cann_host_struct_sizes": (c_char_p, ()),
    "cann_host_configure": (None, (c_char_p, c_char_p, c_int, c_uint64, c_int, c_int)),
    "cann_host_add_fault": (None, (c_char_p, c_int, c_char_p, c_long)),
    "cann_host_drop_faults": (None, (c_size_t,)),
    "cann_host_entries": (c_char_p, ()),
    "cann_host_set_error": (None, (c_char_p,)),
    "cann_host_recent_error": (c_char_p, ()),
    "cann_host_bytes_at": (c_uint64, (c_void_p,)),
    "cann_host_block_of": (c_uint64, (c_void_p, c_uint64)),
    "cann_host_prefetches": (c_uint64, ()),
    "cann_host_count_prefetch": (None, ()),
    "cann_host_state": (c_uint64, ()),
    "cann_host_track": (c_uint64, (c_void_p, c_uint64)),
    "cann_host_is_tracked": (c_int, (c_uint64,)),
    "cann_host_untrack": (None, (c_uint64,)),
    "cann_host_wrote": (None, (c_void_p, c_uint64)),
    "cann_host_has_task_queue": (c_int, ()),
    "cann_host_leave": (None, ()),
    "cann_host_captures": (c_int, (c_void_p,)),
    "cann_host_record": (c_int, (c_void_p, c_int64)),
    "cann_host_next_ended": (c_int64, ()),
    "cann_host_ge_register_op": (None, (c_char_p, c_char_p, c_char_p)),
    "cann_host_ge_fail": (None, (c_char_p,)),
    "cann_host_ge_set_static": (None, (c_void_p, c_int)),
    "cann_host_ge_add_output": (None, (c_void_p, c_int32, POINTER(c_int64), c_size_t)),
    "cann_host_ge_output": (
        c_void_p,
        (c_void_p, c_size_t, c_int32, POINTER(c_int64), c_size_t, c_size_t),
    ),
    "cann_host_hccl_run": (
        c_int,
        (c_char_p, c_int, c_int, c_int, c_uint32, c_uint64, c_void_p, c_void_p),
    ),
    "cann_host_hccl_ranks": (c_uint32, (c_char_p,)),
    "cann_host_set_keys_aside": (None, (c_void_p,)),
    "cann_host_put_keys_back": (c_char_p, (c_void_p,)),
    "cann_host_hide": (c_int, (c_void_p, c_char_p)),
    "cann_host_copy_kernel": (c_int, (c_char_p, c_char_p, c_char_p, c_uint32)),
    **{
        setter: (None, (c_void_p,) * len(functions))  # addresses of Python objects
        for setter, functions in CALLBACKS.items()
    },
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the signatures of the library's functions, and check its structs.

    Returns:
        the same library.

    Raises:
        CannHostError: it lacks a function, or a struct has another size.
    """
    todo = "it was built from other sources than the Python beside it: run pip install -e . again."
    for name, (returns, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise CannHostError(
                f"cann_host's native library ({library._name}) has no {name}; {todo}"
            ) from None
        function.restype, function.argtypes = returns, arguments
    lines = library.cann_host_struct_sizes().decode().splitlines()
    built = {name: int(size) for name, _, size in (line.partition(" ") for line in lines)}
    here = {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    if built != here:
        name = next(n for n in {**here, **built} if here.get(n) != built.get(n))
        raise CannHostError(
            f"cann_host's native library ({library._name}) has another layout: {name} has "
            f"{built.get(name, 0)} bytes there and {here.get(name, 0)} in Python; {todo}"
        )
    return library


_held: list[Callable[..., int]] = []  # the library keeps their addresses


def give(setter: Callable[..., None], *functions: Callable[..., int] | None) -> None:
    """Pass Python functions to the library.

    Args:
        setter: the library's function that takes them, one of `CALLBACKS`.
        functions: the functions that it then calls; None removes one.
    """
    _held.extend(function for function in functions if function is not None)
    setter(*(None if function is None else id(function) for function in functions))


# The low bits of cann_host_state, whose number changes when memory is freed: a graph is being
# captured; work waits, or a launch on torch_npu's task queue has failed; memory is tracked.
CAPTURES, WAITS, TRACKS = 1, 2, 4
FREED = 3  # bits below the number
