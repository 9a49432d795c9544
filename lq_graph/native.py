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
_CALL = struct.Struct("13q4i")
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
) -> Tensor | None:
    """What `numerics.quant_matmul` computes, or None where this kernel does not do it.

    Args:
        x: int8 (..., m, k), or int32 (..., m, k/8) carrying int4.
        weight: its dtype, (n, k) or (n, k/8); with more dims the answer is None.
        scale, bias, pertoken_scale, output_dtype: as in `numerics.quant_matmul`.
    """
    kernel = _kernel()
    if kernel is None or weight.dim() != 2 or weight.stride(1) != 1 or not x.numel():
        return None
    if bias is not None and bias.dim() != 1:
        return None
    n, words = weight.shape
    rows = x if x.dim() == 2 else x.reshape(-1, words)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
        if rows.stride(1) != 1:  # a dim of 1 may have any stride
            return None
    if pertoken_scale is not None and (x.dim() != 2 or pertoken_scale.stride(0) != 1):
        pertoken_scale = pertoken_scale.expand(x.shape[:-1]).reshape(-1).contiguous()
    packed = scale.dtype in (torch.int64, torch.uint64)
    if not packed:
        scale = scale.to(torch.float32)
    if scale.shape[0] > 1 and scale.stride(0) != 1:
        scale = scale.contiguous()
    int_bias = float_bias = 0
    if bias is not None:
        bias = bias.contiguous()
        if bias.dtype == torch.int32:
            int_bias = bias.data_ptr()
        else:
            bias = bias.to(torch.float32)
            float_bias = bias.data_ptr()
    m = rows.shape[0]
    out = torch.empty(m, n, dtype=output_dtype)
    width = x.element_size()
    call = _CALL.pack(
        rows.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        0 if pertoken_scale is None else pertoken_scale.data_ptr(),
        int_bias,
        float_bias,
        out.data_ptr(),
        m,
        n,
        words * width,
        rows.stride(0) * width,
        weight.stride(0) * width,
        0 if scale.shape[0] == 1 else 1,
        width == 4,
        packed,
        _OUTPUTS[output_dtype],
        1 if m * n * words * width < _ONE_THREAD else torch.get_num_threads(),
    )
    if kernel(call):
        raise MemoryError("lq_graph: no memory for the CPU kernel's accumulators")
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)
