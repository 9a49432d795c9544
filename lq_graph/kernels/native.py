"""The compiled CPU kernel (csrc/qgemm.cpp), if the install step built it.

It needs x86-64 with AVX-512 VNNI, and torch's OpenMP runtime, whose threads it uses. Otherwise, or
with LQ_GRAPH_NATIVE=0 (off, false, no), `matmul` returns None and numerics computes with torch: the
same numbers, slower. So a library that was built from other sources than those beside the package,
before a pull for example, is not used, with a warning instead of an error.
"""

from __future__ import annotations

import ctypes
import os
import struct
import warnings
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from . import __path__
from .errors import NotFiniteError
from .layouts import NZ_ROW_BYTES
from .memory import check_held

__all__ = ["is_available", "library", "matmul", "why_not_available"]

_LIBRARY = "liblq_graph_cpu.so"
# struct LqMatmul of csrc/call.h
_CALL = struct.Struct("16q4i")
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
# With fewer products, a second thread costs more than it saves.
_ONE_THREAD = 1 << 20
_OFF, _ON = ("0", "off", "false", "no"), ("", "1", "on", "true", "yes")
# what the kernel returns: enum Answer of csrc/call.h
_DONE, _NO_MEMORY, _NOT_FINITE = 0, 1, 2

# A child that was forked has none of its parent's OpenMP threads, and would wait for them.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _setting() -> str:
    return os.environ.get("LQ_GRAPH_NATIVE", "").strip().lower()


def _is_wanted() -> bool:
    value = _setting()
    if value not in _OFF + _ON and not value.startswith(("avx","neon","amx")):
        warnings.warn(
            f"LQ_GRAPH_NATIVE is {value!r}; allowed are {', '.join(_OFF)} (do not use the compiled "
            f"CPU kernel) and {', '.join(_ON[1:])} (use it, as without the variable). It is not "
            "used now.",
            RuntimeWarning,
            stacklevel=2,
        )
    return value not in _OFF


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


def _load() -> tuple[Callable[[bytes, int], int] | None, str]:
    """The compiled function, or None and why: see `why_not_available`."""
    if not _is_wanted():
        return None, "off" if _setting() in _OFF else "variable"
    path = library()
    if path is None:
        return None, "absent"
    try:
        loaded = ctypes.CDLL(path)
    except OSError:
        return None, "openmp"
    sources = _sources()
    if sources is not None and sources != _built_from(loaded):
        warnings.warn(
            f"lq_graph's compiled CPU kernel ({path}) was built from other sources than "
            "the Python beside it: run pip install -e . again. Until then torch computes "
            "the same, slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, "stale"
    loaded.lq_targets.restype = ctypes.c_char_p
    supported = [name[:-1] for name in loaded.lq_targets().decode().split() if name[-1] == "+"]
    wanted = _setting()
    if not supported or (wanted not in _ON and wanted not in supported):
        return None, "processor"
    loaded.lq_use(supported[0].encode() if wanted in _ON else wanted.encode())
    function = loaded.lq_matmul
    function.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function, ""


@cache
def _kernel() -> Callable[[bytes, int], int] | None:
    """The compiled function; None if it is not used."""
    return _load()[0]


def library() -> str | None:
    """The library's file; None if it was not built."""
    # an editable install keeps the library in site-packages; the package's path lists both
    for folder in __path__:
        path = Path(folder) / "lib" / _LIBRARY
        if path.is_file():
            return str(path)
    return None


def is_available() -> bool:
    """Whether the compiled kernel is there and this processor has what it needs."""
    return _kernel() is not None


def why_not_available() -> str:
    """Why the compiled kernel is not used: "off" (by LQ_GRAPH_NATIVE), "variable" (LQ_GRAPH_NATIVE
    has another value), "absent" (not built), "openmp" (torch has no OpenMP runtime with GOMP's
    names), "stale" (built from other sources) or "processor" (no AVX-512 VNNI); "" if it is
    used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the answer says the same
        return _load()[1]


def _check_bytes(argument: str, tensor: Tensor, needed: int, width: int) -> None:
    """`check_held` of a contiguous tensor whose bytes are known: a quarter of the time."""
    if tensor.untyped_storage().nbytes() < needed + tensor.storage_offset() * width:
        check_held(argument, tensor)


def _rows_of(x: Tensor, words: int) -> Tensor:
    """x as (m, words), each row contiguous."""
    check_held("x1", x)
    rows = x.reshape(-1, words)
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def _refuse(answer: int) -> NoReturn:
    """Raise the error for an answer of the kernel other than _DONE."""
    if answer == _NOT_FINITE:
        raise NotFiniteError
    if answer == _NO_MEMORY:
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    raise RuntimeError(f"lq_graph: the CPU kernel returned {answer}; run pip install -e . again")


def matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pertoken_scale: Tensor | None,
    output_dtype: torch.dtype,
    nz_shape: tuple[int, int] | None = None,
) -> Tensor | None:
    """`numerics.quant_matmul` with the compiled kernel, or None if the kernel does not compute it.

    The arguments are those of `numerics.quant_matmul`, except the weight. For a weight with batch
    dims it returns None. A FRACTAL_NZ weight is passed as its contiguous blocks, with its ND shape,
    (n, k) or (n, k/8), as nz_shape.
    """
    # Few calls into torch: each takes a tenth of the time of a small layer.
    kernel = _kernel()
    shape, weight_shape = x.shape, nz_shape or weight.shape
    if kernel is None or len(weight_shape) != 2:
        return None
    n, words = weight_shape
    if not (n and words):
        return None
    width = x.element_size()
    bytes_in_row = words * width
    weight_row, weight_step = bytes_in_row, NZ_ROW_BYTES
    if nz_shape is not None:
        weight_row, weight_step = NZ_ROW_BYTES, weight.stride(0) * width
        _check_bytes("weight", weight, weight.nbytes, width)
    elif weight.is_contiguous():
        _check_bytes("weight", weight, n * bytes_in_row, width)
    else:
        if weight.stride(1) != 1:
            return None
        weight_row = weight.stride(0) * width
        check_held("weight", weight)
    if len(shape) == 2 and x.is_contiguous():
        rows, m, row = x, shape[0], bytes_in_row
        _check_bytes("x1", x, m * row, width)
    else:
        rows = _rows_of(x, words)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    scale_dtype = scale.dtype
    packed = scale_dtype is torch.int64 or scale_dtype is torch.uint64
    scale_size = scale.shape[0]
    if scale.is_contiguous():
        size = 8 if packed else scale_dtype.itemsize
        _check_bytes("scale", scale, scale_size * size, size)
    else:
        check_held("scale", scale)
        scale = scale.contiguous()
    if not packed and scale_dtype is not torch.float32:
        scale = scale.to(torch.float32)
    pertoken = int_bias = float_bias = 0
    if pertoken_scale is not None:
        check_held("pertoken_scale", pertoken_scale)
        if len(shape) != 2 or not pertoken_scale.is_contiguous():
            pertoken_scale = pertoken_scale.expand(shape[:-1]).contiguous()
        pertoken = pertoken_scale.data_ptr()
    if bias is not None:
        if bias.dim() != 1:
            return None
        check_held("bias", bias)
        is_int = bias.dtype is torch.int32
        bias = (bias if is_int else bias.to(torch.float32)).contiguous()
        int_bias, float_bias = (bias.data_ptr(), 0) if is_int else (0, bias.data_ptr())
    out = torch.empty(m, n, dtype=output_dtype)
    threads = 1 if _forked or m * n * bytes_in_row < _ONE_THREAD else torch.get_num_threads()
    call = _CALL.pack(
        rows.data_ptr(), weight.data_ptr(), scale.data_ptr(), 0, pertoken, int_bias, float_bias,
        out.data_ptr(), m, n, bytes_in_row, row, weight_row, 0 if scale_size == 1 else 1,
        0, weight_step, width == 4, 2 if packed else 0, _OUTPUTS[output_dtype], threads,
    )  # fmt: skip
    answer = kernel(call, len(call))
    if answer != _DONE:
        _refuse(answer)
    return out if len(shape) == 2 else out.view(*shape[:-1], n)
