"""The CPU kernel beside torch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from lq_graph import kernels
from lq_graph.kernels import library, native

I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32

needs_kernel = pytest.mark.skipif(
    library.loaded() is None, reason="the compiled CPU kernels are not used here"
)


def _instruction_sets() -> list[tuple[str, bool]]:
    path = native.library()
    if path is None or not native.is_available():
        return []
    library = ctypes.CDLL(path)
    library.lq_targets.restype = ctypes.c_char_p
    return [(name[:-1], name.endswith("+")) for name in library.lq_targets().decode().split()]


# Those that the compiled kernel has, the best one first, each with whether this processor has it.
INSTRUCTION_SETS = _instruction_sets()


def values(*shape: int, int4: bool = False, seed: int = 0) -> Tensor:
    low, high = (-8, 8) if int4 else (-128, 128)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=I8, generator=generator)


def by_torch(x: Tensor, weight: Tensor | kernels.NzWeight, *args: Any, **options: Any) -> Tensor:
    kernel, native.matmul = native.matmul, lambda *_: None
    try:
        return kernels.quant_matmul(x, weight, *args, **options)
    finally:
        native.matmul = kernel
