"""The compiled CPU kernel (csrc/qgemm.cpp), where there is one.

It needs x86-64 with AVX-512 VNNI, and the OpenMP runtime of torch, whose threads it takes. Anywhere
else, or with LQ_GRAPH_NATIVE=0, `matmul` answers None, and numerics computes with torch.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["is_available", "matmul"]

_LIBRARY = "liblq_graph_cpu.so"
# struct LqMatmul of csrc/qgemm.cpp
_CALL = struct.Struct("14q4i")
_OUTPUTS = {torch.int32: 0, torch.int8: 1, torch.float16: 2, torch.bfloat16: 3}
# Below so many products a second thread costs more than it does.
_ONE_THREAD = 1 << 20


@cache
def _kernel() -> Callable[[bytes], int] | None:
    """The compiled function; None where there is none, or the processor lacks something."""
    if os.environ.get("LQ_GRAPH_NATIVE") == "0":
        return None
    import lq_graph

    # an editable install keeps the library in site-packages; the package's path lists both
    for folder in lq_graph.__path__:
        path = Path(folder) / "lib" / _LIBRARY
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # torch brought no OpenMP runtime that answers to GOMP's names
                return None
            if not library.lq_matmul_supported():
                return None
            function = library.lq_matmul
            function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int
            found: Callable[[bytes], int] = function
            return found
    return None


def is_available() -> bool:
    """Whether the compiled kernel is there and this processor has what it needs."""
    return _kernel() is not None


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
    width = x.element_size()
    weight_row, weight_step = words * width, 32
    if nz_shape is not None:
        weight_row, weight_step = 32, weight.stride(0) * width
    elif not weight.is_contiguous():
        if weight.stride(1) != 1:
            return None
        weight_row = weight.stride(0) * width
    if len(shape) == 2 and x.is_contiguous():
        rows, m, row = x, shape[0], words * width
    else:
        rows = x.reshape(-1, words)
        if rows.stride(1) != 1:
            rows = rows.clone(memory_format=torch.contiguous_format)
        m, row = rows.shape[0], rows.stride(0) * width
    if not m:
        return None
    scale_dtype = scale.dtype
    packed = scale_dtype is torch.int64 or scale_dtype is torch.uint64
    if not packed and scale_dtype is not torch.float32:
        scale = scale.to(torch.float32)
    if not scale.is_contiguous():
        scale = scale.contiguous()
    pertoken = int_bias = float_bias = 0
    if pertoken_scale is not None:
        if len(shape) != 2 or not pertoken_scale.is_contiguous():
            pertoken_scale = pertoken_scale.expand(shape[:-1]).contiguous()
        pertoken = pertoken_scale.data_ptr()
    if bias is not None:
        if bias.dim() != 1:
            return None
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
        words * width,
        row,
        weight_row,
        0 if scale.shape[0] == 1 else 1,
        weight_step,
        width == 4,
        packed,
        _OUTPUTS[output_dtype],
        1 if m * n * words * width < _ONE_THREAD else torch.get_num_threads(),
    )
    if kernel(call):
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    return out if len(shape) == 2 else out.view(*shape[:-1], n)
