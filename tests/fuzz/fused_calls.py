"""Makers of valid calls of fused operators, for `calls`."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from calls import BF16, F16, F32, I8, I32, I64, tensor


def _sum_and_norm(rng: random.Random) -> tuple[list[Any], int, int, int]:
    """x1, x2 and gamma; m, k and their dtype."""
    m, k, dtype = rng.choice((0, 1, 4)), rng.choice((8, 16, 64)), rng.choice((F16, BF16))
    return [*(tensor((m, k), dtype, b) for b in (0, 1)), tensor((k,), dtype, 2)], m, k, dtype


def _add_rms_norm_dynamic_quant(rng: random.Random) -> list[Any]:
    first, m, k, dtype = _sum_and_norm(rng)
    smooth = [tensor((k,), dtype, 3) if rng.random() < 0.5 else None for _ in range(3)]
    mask = {"flags": [1, rng.choice((0, 1))]} if rng.random() < 0.5 else None
    int4 = rng.random() < 0.3
    y = tensor((m, k // 8 if int4 else k), I32 if int4 else I8, 0, at=8192)
    x, scale = tensor((m, k), dtype, 1, at=8192), tensor((m,), F32, 4)
    return [*first, *smooth, {"real": 1e-6}, mask, y, y, x, scale, scale]


def _add_rms_norm_quant(rng: random.Random) -> list[Any]:
    first, m, k, dtype = _sum_and_norm(rng)
    size = rng.choice((1, k, k))
    scale, points = tensor((size,), F32, 3), tensor((size,), I32, 4)
    optional = [t if rng.random() < 0.5 else None for t in (scale, points, points)]
    beta = tensor((k,), dtype, 5) if rng.random() < 0.5 else None
    y, x = tensor((m, k), I8, 0, at=8192), tensor((m, k), dtype, 1, at=8192)
    return [*first, scale, *optional, beta, -1, {"real": 1e-6}, rng.choice((0, 1)), y, y, x, None]


def _rms_norm_quant(rng: random.Random) -> list[Any]:
    (x, _, gamma), m, k, dtype = _sum_and_norm(rng)
    y = tensor((m, k), I8, 1)
    return [x, gamma, gamma, tensor((1,), dtype, 3), tensor((1,), I8, 4), {"real": 1e-6}, y]


def _swi_glu(rng: random.Random) -> list[Any]:
    m, k, dtype = rng.choice((0, 1, 4)), rng.choice((2, 16, 64)), rng.choice((F16, BF16, F32))
    return [tensor((m, k), dtype, 0), -1, tensor((m, k // 2), dtype, 1)]


def _swi_glu_grad(rng: random.Random) -> list[Any]:
    x, dim, y_grad = _swi_glu(rng)
    return [y_grad, x, dim, {**x, "block": 2}]


def _dequant_swiglu_quant(rng: random.Random) -> list[Any]:
    m, k, x = rng.choice((1, 4)), rng.choice((16, 64, 128)), rng.choice((I32, I32, BF16))
    groups, dynamic = rng.choice((0, 1, 2)), rng.random() < 0.7
    rows = (groups,) if groups else ()
    weight = tensor((*rows, k), F32, 2) if x == I32 else None
    bias = tensor((*rows, k), F32 if x == BF16 else rng.choice((I32, F16)), 3)
    scale = tensor((*rows, k // 2), F32, 4)
    # what a block holds is random: its numbers are those of no group, as a rule
    index = tensor(rng.choice(((groups,), (groups, 2))), I64, 6) if groups else None
    optional = [t if rng.random() < 0.5 else None for t in (tensor((m,), F32, 5), bias)]
    quantize = [scale if not dynamic or rng.random() < 0.5 else None, None if dynamic else scale]
    numbers = [1, "dynamic" if dynamic else "static", I8, "rint", -1, rng.choice((0, 0, 1, 2, 3))]
    reals = [{"real": one} for one in (7.0, 1.702, 1.0)]
    results = [tensor((m, k // 2), I8, 1), tensor((m,), F32, 1, at=8192)]
    return [tensor((m, k), x, 0), weight, *optional, *quantize, index, *numbers, *reals, *results]


def _swi_glu_quant(rng: random.Random) -> list[Any]:
    m, k, groups = rng.choice((1, 4)), rng.choice((4, 16, 64)), rng.choice((1, 2))
    x, smooth = tensor((m, k), rng.choice((F16, F32)), 0), tensor((groups, k // 2), F32, 2)
    dynamic, dst = rng.random() < 0.5, rng.choice((I8, 29))
    index = tensor((groups,), I32, 6) if groups > 1 or rng.random() < 0.5 else None
    y = tensor((m, k // 2 if dst == I8 else k // 4), I8, 1)
    mode = "dynamic" if dynamic else "static"
    return [x, smooth, None if dynamic else smooth, index, 1, mode, rng.choice((0, 1)), dst, y,
            tensor((m,), F32, 3)]  # fmt: skip


def _norm(rng: random.Random, *, y1: int | None = None, in_place: bool = False) -> list[Any]:
    """AddRmsNorm, AddRmsNormCast, whose y1 is another dtype, and InplaceAddRmsNorm."""
    first, m, k, dtype = _sum_and_norm(rng)
    rstd, y = tensor((m, 1), F32, 3), tensor((m, k), dtype, 0, at=8192)
    if in_place:
        return [*first, {"real": 1e-6}, rstd]
    ys = [y] if y1 is None else [tensor((m, k), y1, 0, at=4096), y]
    return [*first, {"real": 1e-6}, *ys, rstd, tensor((m, k), dtype, 1, at=8192)]


def _quantize(rng: random.Random) -> list[Any]:
    m, k, out = rng.choice((1, 4)), rng.choice((8, 16, 64)), rng.choice((I8, 4, I32))
    size, dtype = rng.choice((1, k)), rng.choice((F16, BF16, F32))
    points = tensor((size,), rng.choice((I8, I32)), 3) if rng.random() < 0.5 else None
    scales = tensor((size,), BF16 if dtype == BF16 else F32, 2)
    return [tensor((m, k), dtype, 0), scales, points, out, rng.choice((1, -1)),
            tensor((m, k), out, 1)]  # fmt: skip


def _pad(rng: random.Random) -> list[Any]:
    m, k, left, right = (rng.choice((0, 1, 4)) for _ in range(4))
    dtype = rng.choice((F16, F32, I8, I32))
    return [tensor((m, k), dtype, 0), {"ints": [left, right]}, {"scalar": 1.0},
            tensor((m, k + left + right), dtype, 1)]  # fmt: skip


def _without(maker: Callable[[random.Random], list[Any]], *places: int) -> Any:
    """An older version of an operator: without the arguments at these places."""
    return lambda rng: [a for i, a in enumerate(maker(rng)) if i not in places]


MAKERS: dict[str, Callable[[random.Random], list[Any]]] = {
    "aclnnAddRmsNorm": _norm,
    "aclnnAddRmsNormCast": partial(_norm, y1=F32),
    "aclnnAddRmsNormDynamicQuantV2": _add_rms_norm_dynamic_quant,
    "aclnnAddRmsNormQuant": _without(_add_rms_norm_quant, 7, 14),
    "aclnnAddRmsNormQuantV2": _add_rms_norm_quant,
    "aclnnConstantPadNd": _pad,
    "aclnnDequantSwigluQuant": _without(_dequant_swiglu_quant, *range(9, 16)),
    "aclnnDequantSwigluQuantV2": _dequant_swiglu_quant,
    "aclnnInplaceAddRmsNorm": partial(_norm, in_place=True),
    "aclnnQuantize": _quantize,
    "aclnnRmsNormQuant": _rms_norm_quant,
    "aclnnSwiGlu": _swi_glu,
    "aclnnSwiGluGrad": _swi_glu_grad,
    "aclnnSwiGluQuantV2": _swi_glu_quant,
}
