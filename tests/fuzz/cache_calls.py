"""Calls of rotary embeddings and cache updates. Block 7 of the memory is zeros, so that indices in
it are inside; those in other blocks are mostly not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from calls import BF16, F16, F32, I8, I32, I64, Json, tensor

ZEROS = 7


def _apply_rotary(rng: random.Random) -> list[Any]:
    dtype, d = rng.choice((F16, BF16, F32)), rng.choice((64, 128))
    b, s, n = rng.choice((1, 2)), rng.choice((1, 3)), rng.choice((1, 2))
    rows = (b, s) if rng.random() < 0.7 else (b * s,)
    cos = (*rows, 1, rng.choice((d, 64)))
    return [
        tensor((*rows, n, d), dtype, 0),
        tensor((*rows, 1, d), dtype, 1),
        tensor(cos, dtype, 2),
        tensor(cos, dtype, 3),
        1 if len(rows) == 2 else 4,
    ]


def _rotary(rng: random.Random) -> list[Any]:
    dtype, d = rng.choice((F16, BF16, F32)), rng.choice((8, 32, 64))
    b, s, n = (rng.choice((1, 2, 4)) for _ in range(3))
    cos = tensor((rng.choice((1, b)), s, 1, d), dtype, 2)
    x, out = (tensor((b, s, n, d), dtype, block) for block in (0, 1))
    return [x, cos, {**cos, "block": 3}, rng.choice((0, 1)), out]


def _rotary_v2(rng: random.Random) -> list[Any]:
    *first, out = _rotary(rng)
    d = out["dims"][-1]
    return [*first, tensor((d, d), out["dtype"], 2) if rng.random() < 0.3 else None, out]


def _rotary_grad(rng: random.Random) -> list[Any]:
    x, cos, sin, mode, dx = _rotary(rng)
    dcos = {**cos, "block": 4}
    given = x if rng.random() < 0.8 else None
    return [x, cos, sin, given, mode, dx, dcos, {**dcos, "block": 5}]


def _interleave_rope(rng: random.Random) -> list[Any]:
    b, n, s, dtype = rng.choice((1, 2)), rng.choice((1, 4)), rng.choice((1, 3)), F16
    cos = tensor((b, 1, s, 64), dtype, 2)
    return [tensor((b, n, s, 64), dtype, 0), cos, {**cos, "block": 3},
            tensor((b, n, s, 64), dtype, 1)]  # fmt: skip


def _mrope(rng: random.Random, *, v2: bool) -> list[Any]:
    n, heads, dtype = rng.choice((1, 3)), rng.choice((1, 2)), rng.choice((F16, BF16, F32))
    section = rng.choice((None, [0, 0, 0], [8, 12, 12], [8, 12, 12], [16, 16]))
    rows = (3, n) if section == [8, 12, 12] else (n,)
    query, key = ((n, count * 64) for count in (heads, 1))
    given = [
        tensor(rows, I64, rng.choice((ZEROS, ZEROS, ZEROS, 4))),
        tensor(query, dtype, 0),
        tensor(key, dtype, 1),
        tensor((rng.choice((1, 4)), 64), dtype, 2),
        None if section is None else {"ints": section},
        64,
        rng.choice((0, 1)),
    ]
    mode = [rng.choice((0, 1))] if v2 else []
    return [*given, *mode, tensor(query, dtype, 3), tensor(key, dtype, 5)]


def _indices(rng: random.Random, *shape: int) -> Json:
    return tensor(shape, rng.choice((I32, I64)), rng.choice((ZEROS, ZEROS, ZEROS, 6, 4)))


def _scatter_nd_update(rng: random.Random) -> list[Any]:
    var = (rng.choice((1, 4, 8)), rng.choice((1, 2)), 8)
    n, k, dtype = rng.choice((1, 2)), rng.choice((1, 1, 2)), rng.choice((F16, F32, I8))
    if rng.random() < 0.2:  # enough indices for the other way to check them
        return [tensor(var, dtype, 0), _indices(rng, 100, 1), tensor((100, *var[1:]), dtype, 1)]
    return [tensor(var, dtype, 0), _indices(rng, n, k), tensor((n, *var[k:]), dtype, 1)]


def _scatter_update(rng: random.Random) -> list[Any]:
    dtype, n = rng.choice((F16, F32, I8)), rng.choice((1, 2))
    indices = _indices(rng, n) if rng.random() < 0.7 else _indices(rng, n, 2)
    return [tensor((2, 3, 8, 4), dtype, 0), indices,
            tensor((n, 3, rng.choice((1, 2)), 4), dtype, 1), rng.choice((-2, 2))]  # fmt: skip


def _scatter_pa(rng: random.Random) -> list[Any]:
    n, heads, d = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((16, 32))
    cache = (2, 4, heads, d) if (norm := rng.random() < 0.5) else (2, heads * d // 16, 4, 16)
    rows = tensor((n, heads, d), F16, 2)
    return [rows, tensor(cache, F16, 0), _indices(rng, n), {**rows, "block": 3},
            tensor(cache, F16, 1), None, None, None, "Norm" if norm else "PA_NZ", "None",
            None, None]  # fmt: skip


def _kv(rng: random.Random, *, v2: bool) -> list[Any]:
    mode = rng.choice(("Norm", "PA", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"))
    v, int8 = v2 and rng.random() < 0.5, mode != "Norm" and rng.random() < 0.3
    kv, norm, dk, dv = (192, 192, 192, 128) if v else (576, 512, 64, 512)
    cos = tensor((1, 1, 1, 64), F16, 4)
    page = (1, 1, 2) if mode == "Norm" else (1, 2, 1)
    cache = I8 if int8 else F16
    scales = [tensor((dk,), F32, 0), tensor((dv,), F32, 1)] if int8 else [None, None]
    return [
        tensor((1, 1, 1, kv), F16, 2),
        tensor((norm,), F16, 3),
        cos,
        cos,
        tensor((1,), I64, rng.choice((ZEROS, ZEROS, 6))),
        tensor((*page, dk), cache, 0),
        tensor((*page, dv), cache, 1),
        *scales,
        None,
        None,
        *([tensor((1, 1, 1, 128), F16, 2) if v else None] if v2 else []),
        {"real": 1e-5},
        mode,
        rng.choice((0, 1)),
        tensor((1, 1, 1, dk), F16, 2),
        tensor((1, 1, 1, dv), F16, 3),
    ]


MAKERS: dict[str, Callable[[random.Random], list[Any]]] = {
    "aclnnApplyRotaryPosEmb": _apply_rotary,
    "aclnnApplyRotaryPosEmbV2": lambda rng: [
        *_apply_rotary(rng),
        rng.choice(("half", "half", "interleave", "quarter")),
    ],
    "aclnnInplaceScatterUpdate": _scatter_update,
    "aclnnInterleaveRope": _interleave_rope,
    "aclnnKvRmsNormRopeCache": lambda rng: _kv(rng, v2=False),
    "aclnnKvRmsNormRopeCacheV2": lambda rng: _kv(rng, v2=True),
    "aclnnRopeWithSinCosCache": lambda rng: _mrope(rng, v2=False),
    "aclnnRopeWithSinCosCacheV2": lambda rng: _mrope(rng, v2=True),
    "aclnnRotaryPositionEmbedding": _rotary,
    "aclnnRotaryPositionEmbeddingGrad": _rotary_grad,
    "aclnnRotaryPositionEmbeddingV2": _rotary_v2,
    "aclnnScatterNdUpdate": _scatter_nd_update,
    "aclnnScatterPaKvCache": _scatter_pa,
}
