"""The CPU kernel beside torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lq_graph import kernels
from lq_graph.kernels import layer, library, native

I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32

needs_kernel = pytest.mark.skipif(
    library.loaded() is None, reason="the compiled CPU kernels are not used here"
)


_LIBRARY = library.loaded()
# Those that the compiled kernel has, the best one first, each with whether this processor has it.
INSTRUCTION_SETS = [] if _LIBRARY is None else [(n, has) for n, (has, _) in _LIBRARY.sets.items()]


@contextmanager
def without_kernel() -> Iterator[None]:
    """Inside, torch computes, as on machines without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (native, layer):
            patch.setattr(module, "loaded", lambda: None)
        yield


def values(*shape: int, int4: bool = False, seed: int = 0) -> Tensor:
    low, high = (-8, 8) if int4 else (-128, 128)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=I8, generator=generator)


def by_torch(x: Tensor, weight: Tensor | kernels.NzWeight, *args: Any, **options: Any) -> Tensor:
    with without_kernel():
        return kernels.quant_matmul(x, weight, *args, **options)
