"""Paged caches of keys and values.

Source: hicann/ops-transformer 9.1.0, attention/scatter_pa_kv_cache and
posembedding/kv_rms_norm_rope_cache: documents and kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, describe, op, optional_desc
from cann_host.graph.ops.cache import last_writers
from cann_host.graph.ops.rope import rotary
from cann_host.rules import (
    A2,
    CACHE_MODES,
    INTERLEAVE_HALF,
    KvRmsNormRopeCall,
    ScatterPaCall,
    check_kv_rms_norm_rope_cache,
    check_scatter_pa_kv_cache,
    kv_rms_norm_rope_ignores,
    outside,
    soc_family,
)

_ROW_BYTES = 32  # of the last dim of NZ blocks


def check_slots(name: str, slots: Tensor, places: int) -> None:
    """Refuse a slot after the last place. Negative ones are skipped.

    Raises:
        GraphError: there is one.
    """
    if slots.numel() and int(slots.max()) >= places:
        raise GraphError(outside(name, int(slots.max()), places, "the cache"))


def write_slots(name: str, pages: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Write rows into pages of memory.

    Args:
        name: of the tensor of slots.
        pages: (pages, page size, ...), a view of the cache.
        slots: (n,), page * page size + place, in range; a row with a negative one is skipped.
        rows: (n, ...).
    """
    wanted = slots >= 0
    if not bool(wanted.all()):
        slots, rows = slots[wanted], rows[wanted]
    slots, rows = last_writers(name, slots, rows)
    size = pages.shape[1]
    pages[slots // size, slots % size] = rows


def _pages_of_nz(cache: Tensor, heads: int) -> Tensor:
    """Memory of NZ blocks as (pages, page size, heads, D / d0, d0).

    Args:
        cache: (pages, heads, D / d0, page size, d0), or with the second and third dim as one.
        heads: of the rows.
    """
    if cache.dim() == 4:
        cache = cache.unflatten(1, (heads, -1))
    return cache.permute(0, 3, 1, 2, 4)


def scatter_pa_kv_cache(
    pairs: Sequence[tuple[Tensor, Tensor]], slots: Tensor, cache_mode: str
) -> None:
    """Write keys and values into their caches.

    Args:
        pairs: rows, and their cache, for key and for value; see `ScatterPaCall`.
        slots: (tokens,).
        cache_mode: Norm, or PA_NZ.

    Raises:
        GraphError: a slot is outside.
    """
    slots = slots.long()
    all_pages = []
    for rows, cache in pairs:
        is_nz = cache_mode == "PA_NZ"
        all_pages.append(_pages_of_nz(cache, rows.shape[1]) if is_nz else cache)
        check_slots("slot_mapping", slots, all_pages[-1].shape[0] * all_pages[-1].shape[1])
    for (rows, _), pages in zip(pairs, all_pages, strict=True):
        write_slots("slot_mapping", pages, slots, rows.reshape(-1, *pages.shape[2:]))


@op("ScatterPaKvCache", writes=("key_cache", "value_cache"))
def _scatter_pa_kv_cache(
    key: Tensor,
    key_cache: Tensor,
    slot_mapping: Tensor,
    value: Tensor,
    value_cache: Tensor,
    compress_lens: Tensor | None = None,
    compress_seq_offset: Tensor | None = None,
    seq_lens: Tensor | None = None,
    *,
    cache_mode: str = "Norm",
    scatter_mode: str = "None",
    strides: Sequence[int] = (1, 1),
    offsets: Sequence[int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    del strides, offsets  # of scatter_mode Nct
    call = ScatterPaCall(
        executor.soc_name(),
        describe(key),
        describe(key_cache),
        describe(slot_mapping),
        describe(value),
        describe(value_cache),
        cache_mode,
        scatter_mode,
        any(t is not None for t in (compress_lens, compress_seq_offset, seq_lens)),
        is_graph=True,
    )
    if refusal := check_scatter_pa_kv_cache(call):
        raise GraphError(refusal)
    if not executor.is_meta(key):
        scatter_pa_kv_cache([(key, key_cache), (value, value_cache)], slot_mapping, cache_mode)
    return key_cache, value_cache


# ---- KvRmsNormRopeCache ----


def _norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    rms = torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return x / rms * gamma.float()


def _stored(x: Tensor, scale: Tensor | None, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """float32 (B, N, S, D) as its cache holds it. A scale has D values, one, or (N, D)."""
    if scale is None:
        return x.to(dtype)
    n = scale.shape[0] if scale.dim() == 2 else 1
    x = x * scale.reshape(n, 1, -1)
    if offset is not None:
        x = x + offset.reshape(offset.shape[0] if offset.dim() == 2 else 1, 1, -1)
    return x.round().clamp(-128, 127).to(torch.int8)


def _slots_of(index: Tensor, call: KvRmsNormRopeCall) -> Tensor:
    """The slot of each token of each batch, (B * S,); negative ones are skipped."""
    b, _, s, _ = call.kv.shape
    if call.mode == "Norm":
        length = call.k_cache.shape[2]
        places = index.reshape(b, s)
        check_slots("index", places, length)
        return torch.where(places < 0, -1, places + torch.arange(b)[:, None] * length).reshape(-1)
    pages, size = call.k_cache.shape[:2]
    check_slots("index", index, min(pages, call.ckv_cache.shape[0]) * size)
    if not CACHE_MODES[call.mode][0]:
        return index.reshape(-1)
    steps = torch.arange(s)
    first = index.reshape(b, -1)[:, steps // size]
    return torch.where(first < 0, -1, first // size * size + steps % size).reshape(-1)


def _pages_of(cache: Tensor, call: KvRmsNormRopeCall) -> Tensor:
    if call.mode == "Norm":
        return cache.transpose(1, 2)
    if not CACHE_MODES[call.mode][1]:
        return cache
    blocks, size, n, d = cache.shape
    d0 = _ROW_BYTES // cache.element_size()
    return _pages_of_nz(cache.view(blocks, n, d // d0, size, d0), n)


def kv_rms_norm_rope_cache(
    call: KvRmsNormRopeCall,
    tensors: Sequence[Tensor],
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    offsets: tuple[Tensor | None, Tensor | None],
    v: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor] | None:
    """Write into the caches.

    Args:
        call: that `check_kv_rms_norm_rope_cache` accepted.
        tensors: kv, gamma, cos, sin, index.
        caches, scales, offsets: of k, and of ckv; the caches are contiguous.
        v: if it is only stored.
        epsilon: of the norm.

    Returns:
        What is_output_kv asks for, k_rope and c_kv; None if the chip does not write them.

    Raises:
        GraphError: an index is outside.
    """
    kv, gamma, cos, sin, index = tensors
    is_a2 = soc_family(call.soc) == A2
    if ignored := kv_rms_norm_rope_ignores(call):
        executor.caution(ignored)
    x, d = kv.float(), cos.shape[-1]
    if v is None:
        c = _norm(x[..., : gamma.numel()], gamma, epsilon)
        k = rotary(x[..., gamma.numel() :], cos, sin, INTERLEAVE_HALF)
    else:
        normed = _norm(x, gamma, epsilon)
        k = torch.cat((rotary(normed[..., :d], cos, sin, INTERLEAVE_HALF), normed[..., d:]), -1)
        c = v.float()
    if is_a2 and v is None:
        offsets = (None, None)
    slots = _slots_of(index, call)
    for values, cache, scale, offset in zip((k, c), caches, scales, offsets, strict=True):
        rows = _stored(values, scale, offset, kv.dtype).transpose(1, 2)  # (B, S, N, D)
        pages = _pages_of(cache, call)
        write_slots("index", pages, slots, rows.reshape(-1, *pages.shape[2:]))
    unwritten = is_a2 and call.mode == "Norm" and call.scales == (None, None)
    if not call.is_output_kv or unwritten:
        return None
    return k.to(kv.dtype), c.to(kv.dtype)


@op("KvRmsNormRopeCache", writes=("k_cache", "ckv_cache"))
def _kv_rms_norm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = KvRmsNormRopeCall(
        executor.soc_name(),
        describe(kv),
        describe(gamma),
        describe(cos),
        describe(sin),
        describe(index),
        describe(k_cache),
        describe(ckv_cache),
        (optional_desc(k_rope_scale), optional_desc(c_kv_scale)),
        (optional_desc(k_rope_offset), optional_desc(c_kv_offset)),
        optional_desc(v),
        cache_mode,
        is_output_kv,
        is_graph=True,
    )
    if refusal := check_kv_rms_norm_rope_cache(call):
        raise GraphError(refusal)
    made = None
    if not executor.is_meta(kv):
        made = kv_rms_norm_rope_cache(
            call,
            (kv, gamma, cos, sin, index),
            (k_cache, ckv_cache),
            (k_rope_scale, c_kv_scale),
            (k_rope_offset, c_kv_offset),
            v,
            epsilon,
        )
    if made is None:
        shapes = ((*kv.shape[:3], d) for d in call.rope_and_norm)
        first, second = (kv.new_zeros(shape) for shape in shapes)
        made = first, second
    return k_cache, ckv_cache, *made
