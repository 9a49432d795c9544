"""Attention in plain numpy, one head at a time, from the formula of the public documents.

Independent of cann_host: hicann/ops-transformer attention/fused_infer_attention_score/docs and
attention/flash_attention_score/docs, and the reference of Ascend/op-plugin's
test/test_custom_ops/test_npu_fused_infer_attention_score.py for the rounding of the probabilities.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """Values of a dtype, as float32."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).float().numpy()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    visible: Array | None = None,
    shift: Array | None = None,
    sink: Array | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Array, Array]:
    """The result of one sequence, not rounded, and the logarithm of the softmax's sum.

    Args:
        query: (heads, queries, head dim).
        key, value: (kv heads, keys, head dim).
        scale: of the scores.
        visible: bool, (queries, keys).
        shift: (heads, queries, keys).
        sink: (heads,).
        dtype: of the probabilities; the query's if it is not given.
    """
    q, k, v = (t.float().numpy() for t in (query, key, value))
    heads, queries, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[0]
    out = np.zeros((heads, queries, v.shape[2]), np.float32)
    lse = np.full((heads, queries), np.inf, np.float32)
    for head in range(heads):
        for row in range(queries):
            seen = [j for j in range(keys) if visible is None or visible[row, j]]
            if not seen:
                continue
            mine = k[head // group][seen]
            scores = (mine @ q[head, row]).astype(np.float32) * np.float32(scale)
            if shift is not None:
                scores = scores + shift[head, row, seen].astype(np.float32)
            most = scores.max() if sink is None else max(scores.max(), sink[head])
            weights = np.exp(scores - most)
            total = weights.sum() + (0 if sink is None else np.exp(sink[head] - most))
            shares = rounded(weights / total, dtype or query.dtype)
            out[head, row] = shares @ v[head // group][seen]
            lse[head, row] = most + np.log(total)
    return out, lse


def gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    scale: float,
    *,
    visible: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value of one sequence, by the derivative of the softmax."""
    q, k, v, g = (t.float().numpy() for t in (query, key, value, dy))
    heads, queries, _ = q.shape
    group = heads // k.shape[0]
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in range(heads):
        mine = head // group
        for row in range(queries):
            scores = k[mine] @ q[head, row] * np.float32(scale)
            if visible is not None:
                scores = np.where(visible[row], scores, -np.inf)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            d_shares = v[mine] @ g[head, row]
            d_scores = shares * (d_shares - (shares * d_shares).sum())
            dq[head, row] = scale * d_scores @ k[mine]
            dk[mine] += scale * np.outer(d_scores, q[head, row])
            dv[mine] += np.outer(shares, g[head, row])
    return dq, dk, dv


def visible(
    mode: int,
    queries: int,
    keys: int,
    *,
    before: int = 2147483647,
    after: int = 2147483647,
    mask: Array | None = None,
) -> Array:
    """The keys that each query sees, after the table of sparse modes in the documents."""
    seen = np.ones((queries, keys), bool)
    shift = keys - queries
    for i in range(queries):
        for j in range(keys):
            if mode == 0 and mask is not None:
                seen[i, j] = i - before <= j <= i + after and not mask[i, j]
            elif mode == 1:
                assert mask is not None
                seen[i, j] = not mask[i, j]
            elif mode == 2:
                seen[i, j] = j <= i
            elif mode == 3:
                seen[i, j] = j <= i + shift
            elif mode == 4:
                seen[i, j] = i + shift - before <= j <= i + shift + after
    return seen


def quantized(values: Array, scale: Array, offset: Array | None) -> Array:
    """int8 of the result: round half to even of value * scale + offset."""
    scaled = values * scale + (0 if offset is None else offset)
    return np.clip(np.rint(scaled), -128, 127).astype(np.int8)


def place(parts: list[Tensor], axes: str, size: int = 0, *, right: int | None = None) -> Tensor:
    """Sequences of (heads, tokens, head dim) in the layout `axes`; what is beyond them is 99.

    Args:
        parts: one for each batch.
        axes: such as BSH or TND.
        size: tokens of the axis S; the longest by default.
        right: how many tokens of padding follow a sequence that ends there, not at the beginning.
    """
    if "T" in axes:
        tokens = torch.cat(parts, 1)
        return tokens.contiguous() if axes == "NTD" else tokens.transpose(0, 1).contiguous()
    heads, _, head = parts[0].shape
    size = size or max(part.shape[1] for part in parts)
    whole = torch.full((len(parts), heads, size, head), 99.0).to(parts[0].dtype)
    for batch, part in enumerate(parts):
        start = 0 if right is None else size - right - part.shape[1]
        whole[batch, :, start : start + part.shape[1]] = part
    if axes == "NSD":
        return whole[0]
    order = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "NBSD": (1, 0, 2, 3), "SBND": (2, 0, 1, 3)}
    if "H" in axes:
        return whole.permute(order[axes.replace("H", "ND")]).flatten(2).contiguous()
    return whole.permute(order[axes]).contiguous()


def taken(whole: Tensor, axes: str, lengths: list[int], heads: int) -> list[Tensor]:
    """The sequences of a result, the inverse of `place`."""
    if "T" in axes:
        tokens = whole if axes == "NTD" else whole.transpose(0, 1)
        return list(tokens.split(lengths, 1))
    if "H" in axes:
        whole = whole.unflatten(2, (heads, -1))
        axes = axes.replace("H", "ND")
    if axes == "NSD":
        whole, axes = whole.unsqueeze(0), "BNSD"
    order = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "NBSD": (1, 0, 2, 3), "SBND": (1, 2, 0, 3)}
    bnsd = whole.permute(order[axes])
    return [bnsd[batch, :, :length] for batch, length in enumerate(lengths)]


def cached(parts: list[Tensor], kind: str, size: int, table: Tensor, blocks: int) -> Tensor:
    """Sequences in a paged cache; what is beyond them is 99.

    Args:
        parts: (kv heads, keys, head dim), one for each batch.
        kind: BSH, BNSD or NZ.
        size: of a block.
        table: the blocks of each batch.
        blocks: how many the cache has.
    """
    heads, _, head = parts[0].shape
    cache = torch.full((blocks, heads, size, head), 99.0).to(parts[0].dtype)
    for batch, part in enumerate(parts):
        for token in range(part.shape[1]):
            cache[int(table[batch, token // size]), :, token % size] = part[:, token]
    if kind == "BSH":
        return cache.transpose(1, 2).flatten(2).contiguous()
    if kind == "NZ":
        width = 32 // cache.element_size()
        return cache.unflatten(3, (-1, width)).transpose(2, 3).contiguous()
    return cache
