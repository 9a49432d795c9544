"""The golden of cache updates: plain numpy, value by value, from CANN's documents.

It shares no code with `cann_host`, on purpose. The functions return a new array.
"""

from __future__ import annotations

import numpy as np

from support import golden_rope

Array = np.ndarray
F32 = np.float32


def scatter_nd_update(var: Array, indices: Array, updates: Array) -> Array:
    """indices (..., k) name the first k dims of var."""
    out = var.copy()
    for at in np.ndindex(indices.shape[:-1]):
        out[tuple(indices[at])] = updates[at]
    return out


def scatter_update(var: Array, indices: Array, updates: Array, axis: int) -> Array:
    """A window of each batch; indices (b,), (b, 2) or without dims."""
    out = np.moveaxis(var, axis, 1).copy()
    windows = np.moveaxis(updates, axis, 1)
    for b in range(len(windows)):
        if indices.ndim == 2:
            batch, first = indices[b]
        else:
            batch, first = b, indices.reshape(-1)[b]
        for place in range(windows.shape[1]):
            out[batch, first + place] = windows[b, place]
    return np.moveaxis(out, 1, axis)


def scatter_elements(
    data: Array, indices: Array, updates: Array, axis: int, reduction: str = "none"
) -> Array:
    out = data.copy()
    for at in np.ndindex(indices.shape):
        to = list(at)
        to[axis] = indices[at]
        if reduction == "add":
            out[tuple(to)] += updates[at]
        elif reduction == "mul":
            out[tuple(to)] *= updates[at]
        else:
            out[tuple(to)] = updates[at]
    return out


def nz_address(slot: int, head: int, place: int, heads: int, d: int, size: int, d0: int) -> int:
    """Of a value in NZ blocks of `size` tokens: (block, head, D / d0, token, d0)."""
    block, token = divmod(slot, size)
    column, rest = divmod(place, d0)
    return (((block * heads + head) * (d // d0) + column) * size + token) * d0 + rest


def write_pages(cache: Array, rows: Array, slots: Array, size: int, *, d0: int = 0) -> Array:
    """rows (tokens, heads, D) into pages of `size` tokens, each token's heads one after another;
    in NZ blocks with d0. Negative slots are skipped."""
    flat = cache.reshape(-1).copy()
    _, heads, d = rows.shape
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for head in range(heads):
            for place in range(d):
                if d0:
                    to = nz_address(slot, head, place, heads, d, size, d0)
                else:
                    to = (slot * heads + head) * d + place
                flat[to] = rows[token, head, place]
    return flat.reshape(cache.shape)


def rms_norm(x: Array, gamma: Array, epsilon: float) -> Array:
    rms = np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + epsilon)
    return (x / rms * gamma).astype(F32)


def kv_rms_norm_rope(
    kv: Array, gamma: Array, cos: Array, sin: Array, v: Array | None, epsilon: float
) -> tuple[Array, Array]:
    """The rows of k and of ckv, (B, N, S, D), before they are rounded."""
    norm, rope = len(gamma), cos.shape[-1]
    normed = rms_norm(kv[..., :norm], gamma, epsilon)
    if v is None:
        return golden_rope.rotary(kv[..., norm:], cos, sin, "interleave-half"), normed
    turned = golden_rope.rotary(normed[..., :rope], cos, sin, "interleave-half")
    return np.concatenate((turned, normed[..., rope:]), -1), v


def quantized(x: Array, scale: Array, offset: Array | None = None) -> Array:
    value = x * scale if offset is None else x * scale + offset
    return np.clip(np.rint(value), -128, 127).astype(np.int8)


def slots_of(index: Array, mode: str, b: int, s: int, size: int, length: int) -> Array:
    """The slot of each token of each batch, -1 if it is skipped."""
    slots = []
    for batch in range(b):
        for step in range(s):
            if mode == "Norm":
                place = index[batch, step]
                slots.append(-1 if place < 0 else batch * length + place)
            elif mode.startswith("PA_BLK"):
                place = index.reshape(b, -1)[batch, step // size]
                slots.append(-1 if place < 0 else place // size * size + step % size)
            else:
                slots.append(index[batch * s + step])
    return np.array(slots)
