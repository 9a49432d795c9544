"""Makers of valid calls of attention, for `calls`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from calls import BF16, F16, F32, tensor

BOOL = 12
MOST = 2147483647


def _qkv(rng: random.Random, dtypes: tuple[int, ...]) -> tuple[list[Any], list[int], int]:
    """query, key and value in BNSD; batch, heads, queries, keys and head dim; their dtype."""
    batch, kv, group = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2))
    queries, keys, head = rng.choice((1, 3)), rng.choice((0, 1, 5)), rng.choice((16, 32))
    dtype = rng.choice(dtypes)
    query = tensor((batch, kv * group, queries, head), dtype, 0)
    others = [tensor((batch, kv, keys, head), dtype, block) for block in (1, 2)]
    return [query, *others], [batch, kv * group, queries, keys, head], dtype


def _mask(rng: random.Random, sizes: list[int]) -> Any:
    batch, _, queries, keys, _ = sizes
    shapes = ((queries, keys), (batch, 1, queries, keys))
    return tensor(rng.choice(shapes), BOOL, 3) if rng.random() < 0.6 else None


def _flash(rng: random.Random) -> list[Any]:
    inputs, sizes, dtype = _qkv(rng, (F16, BF16, F32))
    batch, heads, queries, keys, head = sizes
    shift = tensor((1, heads, queries, keys), dtype, 4) if rng.random() < 0.3 else None
    numbers = [{"real": 0.5}, {"real": 1.0}, MOST, MOST, heads, "BNSD", 0, rng.choice((0, 0, 1))]
    softmax = [tensor((batch, heads, queries, 8), F32, 0, at=at) for at in (8192, 12288)]
    out = tensor((batch, heads, queries, head), dtype, 1, at=8192)
    return [*inputs, shift, None, None, _mask(rng, sizes), None, *numbers, *softmax, None, out]


def _flash_gradient(rng: random.Random) -> list[Any]:
    *forward, most, total, _, out = _flash(rng)
    inputs, masks, prefix, numbers = forward[:3], forward[3:7], forward[7], forward[8:]
    dy = {**out, "at": 12288}
    gradients = [{**one, "at": 2048 if one["block"] == 2 else 4096} for one in inputs]
    dshift = {**masks[0], "at": 512} if masks[0] else None
    softmax = [most, total, None, out]
    return [*inputs, dy, *masks, *softmax, prefix, *numbers, *gradients, dshift]


def _prompt(rng: random.Random) -> list[Any]:
    inputs, sizes, dtype = _qkv(rng, (F16, BF16))
    batch, heads, queries, _, head = sizes
    kv = inputs[1]["dims"][1]
    mask = _mask(rng, sizes)
    numbers = [heads, {"real": 0.5}, MOST, MOST, "BNSD", kv, rng.choice((0, 0, 1)), 0]
    out = tensor((batch, heads, queries, head), dtype, 1, at=8192)
    return [*inputs, None, mask, *[None] * 7, *numbers, out]


MAKERS: dict[str, Callable[[random.Random], list[Any]]] = {
    "aclnnFlashAttentionScore": _flash,
    "aclnnFlashAttentionScoreGrad": _flash_gradient,
    "aclnnPromptFlashAttentionV3": _prompt,
}
