"""The compiled CPU kernel (csrc/qgemm.cpp), where there is one.

It needs x86-64 with AVX-512 VNNI, and the OpenMP runtime of torch, whose threads it takes. Anywhere
else, or with LQ_GRAPH_NATIVE=0 (off, false, no), `matmul` answers None, and numerics computes with
torch: the same numbers, slower. So a library that was built from other sources than those beside
the package, before a pull for example, is left alone with a warning, not an error.
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

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import LinearQuantValueError
from . import __path__

__all__ = ["is_available", "matmul", "refuse_not_finite", "refuse_shortened"]

_LIBRARY = "liblq_graph_cpu.so"
# struct LqMatmul of csrc/qgemm.cpp
_CALL = struct.Struct("14q4i")
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
# Below so many products a second thread costs more than it does.
_ONE_THREAD = 1 << 20
_OFF, _ON = ("0", "off", "false", "no"), ("", "1", "on", "true", "yes")
# what the kernel answers, enum Answer of csrc/qgemm.cpp; other numbers than these cannot be
_DONE, _NO_MEMORY, _NOT_FINITE = 0, 1, 2

# A child that was forked has none of its parent's OpenMP threads, and would wait for them.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def _is_wanted() -> bool:
    value = os.environ.get("LQ_GRAPH_NATIVE", "").strip().lower()
    if value not in _OFF + _ON:
        warnings.warn(
            f"LQ_GRAPH_NATIVE is {value!r}; allowed are {', '.join(_OFF)} (the compiled CPU kernel "
            f"is not used) and {', '.join(_ON[1:])} (it is, also without the variable). It is not "
            "used now.",
            RuntimeWarning,
            stacklevel=2,
        )
    return value in _ON


def _sources() -> str | None:
    """What the C++ sources beside this package are, in one word, as CMakeLists.txt computes it.
    None in a wheel, which has none."""
    files = sorted(
        (file.as_posix(), file)
        for folder in __path__
        for file in Path(folder, "csrc").rglob("*")
        if file.suffix in (".cpp", ".h")
    )
    digests = "".join(sha256(file.read_bytes()).hexdigest() for _, file in files)
    return sha256(digests.encode()).hexdigest() if files else None


def _built_from(library: ctypes.CDLL) -> str:
    """The same of a library; "" for one that does not say, being older."""
    try:
        library.lq_matmul_sources.restype = ctypes.c_char_p
    except AttributeError:
        return ""
    found: bytes = library.lq_matmul_sources()
    return found.decode()


@cache
def _kernel() -> Callable[[bytes, int], int] | None:
    """The compiled function; None where there is none, or the processor lacks something."""
    if not _is_wanted():
        return None
    # an editable install keeps the library in site-packages; the package's path lists both
    for folder in __path__:
        path = Path(folder) / "lib" / _LIBRARY
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # torch brought no OpenMP runtime that answers to GOMP's names
                return None
            sources = _sources()
            if sources is not None and sources != _built_from(library):
                warnings.warn(
                    f"lq_graph's compiled CPU kernel ({path}) was built from other sources than "
                    "the Python beside it: run pip install -e . again. Until then torch computes "
                    "the same, slower.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            if not library.lq_matmul_supported():
                return None
            function = library.lq_matmul
            function.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
            function.restype = ctypes.c_int
            found: Callable[[bytes, int], int] = function
            return found
    return None


def is_available() -> bool:
    """Whether the compiled kernel is there and this processor has what it needs."""
    return _kernel() is not None


def refuse_not_finite() -> None:
    """Refuse a packed scale that holds infinity or NaN.

    Raises:
        LinearQuantValueError: always.
    """
    raise LinearQuantValueError(
        "linear_quant: the packed scale holds NaN or infinity; what the chip makes of them is not "
        "published, so it is not computed here. What to do: check the calibration that produced "
        "the scale."
    )


def refuse_shortened(name: str, tensor: Tensor, op: str = "linear_quant") -> None:
    """Refuse a tensor whose storage does not hold what its shape says: it would be read beyond its
    end. Such are left by untyped_storage().resize_, with which FSDP frees parameters.

    Raises:
        LinearQuantValueError: it is such a tensor.
    """
    if type(tensor) not in (Tensor, Parameter) or not tensor.numel():
        return  # a subclass may have no memory of its own
    # What a kernel reads. torch checks this when a storage is set, not when it shrinks.
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    held, needed = tensor.untyped_storage().nbytes(), (last + 1) * tensor.element_size()
    if held < needed:
        raise LinearQuantValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)} and needs {needed} bytes of "
            f"memory; its storage holds {held}. What to do: make it whole first; its owner has "
            "freed it (FSDP does between forwards), or called untyped_storage().resize_."
        )


def _check_held(name: str, tensor: Tensor, needed: int, width: int) -> None:
    """`refuse_shortened` of a contiguous tensor whose bytes are known: a quarter of the time."""
    if tensor.untyped_storage().nbytes() < needed + tensor.storage_offset() * width:
        refuse_shortened(name, tensor)


def matmul(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    pertoken_scale: Tensor | None,
    output_dtype: torch.dtype,
    nz_shape: tuple[int, int] | None = None,
) -> Tensor | None:
    """What `numerics.quant_matmul` computes, or None where this kernel does not do it.

    Args:
        x: int8 (..., m, k), or int32 (..., m, k/8) carrying int4.
        weight: its dtype, (n, k) or (n, k/8); with more dims the answer is None.
        scale, bias, pertoken_scale, output_dtype: as in `numerics.quant_matmul`.
        nz_shape: the ND shape, (n, k) or (n, k/8), of a weight that is given as its FRACTAL_NZ
            blocks, contiguous: (k/c0, n/16, 16, c0), rounded up, rows of 32 bytes.
    """
    # Few calls into torch: each is a tenth of what a small layer takes.
    kernel = _kernel()
    shape, weight_shape = x.shape, nz_shape or weight.shape
    if kernel is None or len(weight_shape) != 2:
        return None
    n, words = weight_shape
    if not (n and words):
        return None
    width = x.element_size()
    bytes_in_row = words * width
    weight_row, weight_step = bytes_in_row, 32
    if nz_shape is not None:
        weight_row, weight_step = 32, weight.stride(0) * width
        _check_held("weight", weight, weight.nbytes, width)
    elif weight.is_contiguous():
        _check_held("weight", weight, n * bytes_in_row, width)
    else:
        if weight.stride(1) != 1:
            return None
        weight_row = weight.stride(0) * width
        refuse_shortened("weight", weight)
    if len(shape) == 2 and x.is_contiguous():
        rows, m, row = x, shape[0], bytes_in_row
        _check_held("x1", x, m * row, width)
    else:
        refuse_shortened("x1", x)
        rows = x.reshape(-1, words)
        if rows.stride(1) != 1:
            rows = rows.clone(memory_format=torch.contiguous_format)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    scale_dtype = scale.dtype
    packed = scale_dtype is torch.int64 or scale_dtype is torch.uint64
    scale_size = scale.shape[0]
    if scale.is_contiguous():
        size = 8 if packed else scale_dtype.itemsize
        _check_held("scale", scale, scale_size * size, size)
    else:
        refuse_shortened("scale", scale)
        scale = scale.contiguous()
    if not packed and scale_dtype is not torch.float32:
        scale = scale.to(torch.float32)
    pertoken = int_bias = float_bias = 0
    if pertoken_scale is not None:
        refuse_shortened("pertoken_scale", pertoken_scale)
        if len(shape) != 2 or not pertoken_scale.is_contiguous():
            pertoken_scale = pertoken_scale.expand(shape[:-1]).contiguous()
        pertoken = pertoken_scale.data_ptr()
    if bias is not None:
        if bias.dim() != 1:
            return None
        refuse_shortened("bias", bias)
        if bias.dtype is torch.int32:
            bias = bias.contiguous()
            int_bias = bias.data_ptr()
        else:
            bias = bias.to(torch.float32).contiguous()
            float_bias = bias.data_ptr()
    out = torch.empty(m, n, dtype=output_dtype)
    call = _CALL.pack(
        rows.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        pertoken,
        int_bias,
        float_bias,
        out.data_ptr(),
        m,
        n,
        bytes_in_row,
        row,
        weight_row,
        0 if scale_size == 1 else 1,
        weight_step,
        width == 4,
        packed,
        _OUTPUTS[output_dtype],
        1 if _forked or m * n * bytes_in_row < _ONE_THREAD else torch.get_num_threads(),
    )
    answer = kernel(call, len(call))
    if answer == _NOT_FINITE:
        refuse_not_finite()
    if answer == _NO_MEMORY:
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    if answer != _DONE:
        raise RuntimeError(f"lq_graph: the CPU kernel answers {answer}; run pip install -e . again")
    return out if len(shape) == 2 else out.view(*shape[:-1], n)
