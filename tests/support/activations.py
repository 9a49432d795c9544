"""Inputs of dynamic_quant and static_quant, and their results beside the golden."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from support import golden
from support.cases import F32, I8, I32


def make(shape: tuple[int, ...], dtype: torch.dtype, spread: float = 3.0) -> Tensor:
    """Normal values with an outlier, a row of zeros, and a row of one value."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * spread
    flat = x.view(-1, shape[-1])
    flat[0, -1] = 40.0
    if len(flat) > 2:
        flat[1] = 0
        flat[2] = -0.7
    return x.to(dtype)


def as_numpy(x: Tensor) -> np.ndarray:
    return x.cpu().float().numpy() if x.is_floating_point() else x.cpu().numpy()


def check_dynamic(
    got: tuple[Tensor, Tensor], x: Tensor, int4: bool, arithmetic: str = "multiply"
) -> None:
    values, scale = golden.dynamic_quant(as_numpy(x), 7 if int4 else 127, arithmetic)
    want = golden.pack_int4(values) if int4 else values.astype(np.int8)
    np.testing.assert_array_equal(as_numpy(got[0]), want)
    np.testing.assert_array_equal(as_numpy(got[1]), scale)
    assert got[0].dtype == (I32 if int4 else I8) and got[1].dtype == F32


def check_static(got: Tensor, x: Tensor, reciprocal: Tensor, offset: float) -> None:
    want = golden.static_quant(as_numpy(x), as_numpy(reciprocal), offset)
    np.testing.assert_array_equal(as_numpy(got), want)
    assert got.dtype == I8
