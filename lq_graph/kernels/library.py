"""The compiled CPU kernels (csrc/), if the install step built them: loading, instruction sets.

They need torch's OpenMP runtime, whose threads they use, and one of the instruction sets in
csrc/targets. Otherwise, or with LQ_GRAPH_NATIVE=0 (off, false, no), `loaded` returns None and torch
computes the same numbers, slower. So a library that was built from other sources than those beside
the package, before a pull for example, is not used, with a warning instead of an error.

LQ_GRAPH_NATIVE may also name an instruction set. Without it, the best one that the processor has is
taken.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from . import __path__

__all__ = [
    "Library",
    "instruction_sets",
    "is_forked",
    "loaded",
    "path",
    "using",
    "why_not_used",
]

NAME = "liblq_graph_cpu.so"
_OFF, _ON = ("0", "off", "false", "no"), ("", "1", "on", "true", "yes")
# A function of csrc/dispatch.cpp: it takes a struct, packed in bytes, and their number.
Function = Callable[..., int]

# A child that was forked has none of its parent's OpenMP threads, and would wait for them.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def is_forked() -> bool:
    """Whether this process was forked: then a call may use one thread only."""
    return _forked


class Library:
    """The loaded library.

    Attributes:
        sets: the instruction sets that it has, the best one first: whether this processor has it,
            and whether it is taken without being named.
        instruction_set: the one in use.
        matmul, quantize, layer, prepared_bytes, prepare: lq_matmul and so on of csrc/dispatch.cpp.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        library.lq_targets.restype = ctypes.c_char_p
        words: list[str] = library.lq_targets().decode().split()
        self.sets = {word[:-1]: (word[-1] != "-", word[-1] == "+") for word in words}
        self._use = library.lq_use
        self.instruction_set = ""
        self.matmul = self._function(library.lq_matmul)
        self.quantize = self._function(library.lq_quantize)
        self.layer = self._function(library.lq_layer)
        self.prepared_bytes = self._function(library.lq_prepared_bytes, ctypes.c_int64)
        self.prepare = self._function(library.lq_prepare, ctypes.c_int, ctypes.c_void_p)

    @staticmethod
    def _function(
        function: ctypes._NamedFuncPointer, returns: Any = ctypes.c_int, *more: Any
    ) -> Function:
        function.argtypes = (ctypes.c_char_p, ctypes.c_size_t, *more)
        function.restype = returns
        return function

    def use(self, name: str) -> None:
        """Take this instruction set for all calls from now on.

        Raises:
            ValueError: the library or the processor does not have it.
        """
        if not self._use(name.encode()):
            raise ValueError(f"instruction set {name!r}; this processor has {', '.join(self.can)}")
        self.instruction_set = name

    @property
    def can(self) -> list[str]:
        """The instruction sets that both have, the best one first."""
        return [name for name, (has, _) in self.sets.items() if has]


def _setting() -> str:
    return os.environ.get("LQ_GRAPH_NATIVE", "").strip().lower()


def _warn(why: str, allowed: str) -> None:
    warnings.warn(
        f"LQ_GRAPH_NATIVE is {_setting()!r}{why}; allowed are {', '.join(_OFF)} (do not use the "
        f"compiled CPU kernel), {', '.join(_ON[1:])} (use it, as without the variable){allowed}. "
        "It is not used now.",
        RuntimeWarning,
        stacklevel=4,
    )


def _sources() -> str | None:
    """The digest of the C++ sources beside this package, as CMakeLists.txt computes it; None in a
    wheel, which has no sources."""
    files = sorted(
        (file.as_posix(), file)
        for folder in __path__
        for file in Path(folder, "csrc").rglob("*")
        if file.suffix in (".cpp", ".h")
    )
    digests = "".join(sha256(file.read_bytes()).hexdigest() for _, file in files)
    return sha256(digests.encode()).hexdigest() if files else None


def _built_from(library: ctypes.CDLL) -> str:
    """The digest of the sources that a library was built from; "" if it is too old to have one."""
    try:
        library.lq_sources.restype = ctypes.c_char_p
    except AttributeError:
        return ""
    found: bytes = library.lq_sources()
    return found.decode()


def _open(file: str) -> ctypes.CDLL:
    """The library in a file, linked to torch's OpenMP runtime.

    Raises:
        OSError: torch has loaded none with GOMP's names.
    """
    try:
        return ctypes.CDLL(file)
    except OSError:
        # torch's wheels for aarch64 keep the names of their runtime from other libraries
        lib = Path(torch.__file__).parent / "lib"
        runtimes = [*lib.glob("libgomp*"), *lib.glob("../../torch.libs/libgomp*"), "libgomp.so.1"]
        for runtime in runtimes:
            with suppress(OSError):
                ctypes.CDLL(str(runtime), os.RTLD_GLOBAL | os.RTLD_NOLOAD)
                return ctypes.CDLL(file)
        raise


def _load() -> tuple[Library | None, str]:
    """The library and the instruction set to use; or None and why, see `why_not_used`."""
    wanted, file = _setting(), path()
    if wanted in _OFF:
        return None, "off"
    if file is None:
        if wanted not in _ON:
            _warn("", "")
            return None, "variable"
        return None, "absent"
    try:
        found = _open(file)
    except OSError:
        return None, "openmp"
    sources = _sources()
    if sources is not None and sources != _built_from(found):
        warnings.warn(
            f"lq_graph's compiled CPU kernel ({file}) was built from other sources than "
            "the Python beside it: run pip install -e . again. Until then torch computes "
            "the same, slower.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, "stale"
    library = Library(found)
    if wanted not in _ON and wanted not in library.can:
        known = wanted in library.sets
        names = f", and an instruction set of this processor: {', '.join(library.can) or 'none'}"
        _warn(", which this processor does not have" if known else "", names)
        return None, "variable"
    usual = [name for name, (_, usual) in library.sets.items() if usual]
    if wanted in _ON and not usual:
        return None, "processor"
    return library, usual[0] if wanted in _ON else wanted


@cache
def loaded() -> Library | None:
    """The compiled kernels; None if they are not used."""
    library, name = _load()
    if library is not None:
        library.use(name)
    return library


def path() -> str | None:
    """The library's file; None if it was not built."""
    # an editable install keeps the library in site-packages; the package's path lists both
    for folder in __path__:
        file = Path(folder) / "lib" / NAME
        if file.is_file():
            return str(file)
    return None


def why_not_used() -> str:
    """Why the compiled kernels are not used: "off" (by LQ_GRAPH_NATIVE), "variable"
    (LQ_GRAPH_NATIVE has another value, or names an instruction set that is not there), "absent"
    (not built), "openmp" (torch has no OpenMP runtime with GOMP's names), "stale" (built from other
    sources) or "processor" (no instruction set of csrc/targets); "" if they are used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the answer says the same
        library, why_not = _load()
    return why_not if library is None else ""


def instruction_sets() -> list[str]:
    """The instruction sets that the kernels can use here, the best one first."""
    library = loaded()
    return [] if library is None else library.can


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, the kernels use this instruction set, in all threads.

    Raises:
        ValueError: it is not one of `instruction_sets`.
    """
    library = loaded()
    if library is None:
        raise ValueError(f"instruction set {name!r}; the compiled kernels are not used")
    before = library.instruction_set
    library.use(name)
    try:
        yield
    finally:
        library.use(before)
