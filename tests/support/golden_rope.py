"""The golden of rotary embeddings: plain numpy, from CANN's documents.

Each value is rotated in a plane with a partner: y[i] = x[i] cos[i] + sign[i] x[partner[i]] sin[i].
It shares no code with `cann_host`, on purpose. bfloat16 tensors are float32 with exact values.
"""

from __future__ import annotations

import numpy as np

from support import golden

Array = np.ndarray
F32 = np.float32


def planes(d: int, mode: str) -> tuple[list[int], list[int]]:
    """The partner and the sign of each of d values."""
    if mode == "interleave":
        return [i ^ 1 for i in range(d)], [-1 if i % 2 == 0 else 1 for i in range(d)]
    parts = {"half": 1, "interleave-half": 1, "quarter": 2}[mode]
    size = d // parts  # of a part, whose halves turn
    partner, sign = [], []
    for i in range(d):
        begin, place = i - i % size, i % size
        first = place < size // 2
        partner.append(begin + place + (size // 2 if first else -(size // 2)))
        sign.append(-1 if first else 1)
    return partner, sign


def rounded(x: Array, dtype: str, *, away: bool = False) -> Array:
    """float32 values in a dtype, as float32; away: bfloat16, half away from zero."""
    if dtype == "float16":
        return x.astype(np.float16).astype(F32)
    if dtype == "bfloat16" and away:
        bits = (np.abs(x).astype(F32).view(np.uint32) + np.uint32(0x8000)) & np.uint32(0xFFFF0000)
        return np.copysign(bits.view(F32), x)
    return golden.bfloat16(x) if dtype == "bfloat16" else x


def rotary(
    x: Array,
    cos: Array,
    sin: Array,
    mode: str = "half",
    dtype: str = "float32",
    *,
    stepwise: bool = False,
    away: bool = False,
) -> Array:
    """Of the last dim of x; cos and sin broadcast.

    Args:
        x, cos, sin: float32 values that dtype can hold.
        mode: half, interleave, quarter, interleave-half.
        dtype: of the result.
        stepwise: each product is rounded to dtype too.
        away: bfloat16 results are rounded half away from zero.
    """
    if mode == "interleave-half":  # the pairs are sorted into halves first
        order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
        x = x[..., order]
    partner, sign = planes(x.shape[-1], mode)
    straight = x.astype(F32) * cos.astype(F32)
    turned = x.astype(F32)[..., partner] * np.array(sign, F32) * sin.astype(F32)
    if stepwise:
        straight, turned = rounded(straight, dtype), rounded(turned, dtype)
    return rounded(straight + turned, dtype, away=away)


def rotary_grad(
    dy: Array, x: Array, cos: Array, sin: Array, mode: str, dtype: str
) -> tuple[Array, Array, Array]:
    """Gradients of `rotary` for x, cos and sin: each value of dy goes back to what it came from.

    Args:
        dy, x, cos, sin: float32 values that dtype can hold.
        mode: half or interleave.
        dtype: of the results.
    """
    partner, sign = planes(x.shape[-1], mode)
    cos_of, sin_of = (np.broadcast_to(t, x.shape).astype(F32) for t in (cos, sin))
    dx, dcos, dsin = (np.zeros(t.shape, F32) for t in (x, cos, sin))
    axes = tuple(axis for axis in range(x.ndim) if cos.shape[axis] == 1)
    for i, (p, s) in enumerate(zip(partner, sign, strict=True)):
        dx[..., i] += dy[..., i] * cos_of[..., i]
        dx[..., p] += dy[..., i] * sin_of[..., i] * s
    dcos += (dy * x).sum(axes, keepdims=True, dtype=np.float64)
    dsin += (dy * x[..., partner] * sign).sum(axes, keepdims=True, dtype=np.float64)
    return rounded(dx, dtype), rounded(dcos, dtype), rounded(dsin, dtype)


def apply_rotary(
    x: Array, cos: Array, sin: Array, layout: str, mode: str, dtype: str, product: str
) -> Array:
    """ApplyRotaryPosEmb of query, or of key: head by head, the first values of each.

    Args:
        x, cos, sin: in the dims of layout, cos and sin with one head.
        product: A2, 950 or 310P.
    """
    heads, d = layout.index("N"), cos.shape[-1]
    by_head = np.moveaxis(x, heads, 0).copy()
    c, s = (np.moveaxis(t, heads, 0)[0] for t in (cos, sin))
    older = product != "950"
    for head in by_head:
        head[..., :d] = rotary(
            head[..., :d],
            c,
            s,
            "half" if older else mode,
            dtype,
            stepwise=older and dtype == "float16",
            away=older,
        )
    return np.moveaxis(by_head, 0, heads)


def mrope(
    positions: Array,
    x: Array,
    cache: Array,
    section: list[int],
    head_size: int,
    mode: str,
    cache_mode: str,
    dtype: str,
) -> Array:
    """RopeWithSinCosCache of query, or of key: angle by angle.

    Args:
        positions: (tokens,), or a row of tokens for each section.
        x: (tokens, heads * head_size).
        cache: a row has D / 2 cosines, then as many sines.
        section: how many angles are of each row of positions.
        mode: half or interleave.
        cache_mode: default, one section after another; interleave, every third angle.
        dtype: of the result.
    """
    d = cache.shape[1]
    rows = positions if positions.ndim == 2 else positions[None]
    row_of = np.zeros(d // 2, int)  # the row of positions of each angle
    if positions.ndim == 2 and cache_mode == "default":
        row_of = np.repeat(np.arange(len(section)), section)
    elif positions.ndim == 2:
        for row in (1, 2):
            row_of[row : 3 * section[row] : 3] = row
    out = x.copy()
    for token, values in enumerate(out):
        angle_of = np.arange(d) // 2 if mode == "interleave" else np.arange(d) % (d // 2)
        places = rows[row_of, token]
        cos = cache[places, np.arange(d // 2)][angle_of]
        sin = cache[places, np.arange(d // 2, d)][angle_of]
        for head in values.reshape(-1, head_size):
            head[:d] = rotary(head[:d], cos, sin, mode, dtype)
    return out
