"""What the attentions compute, for eager calls and graphs.

The scores, their softmax and the sum over the keys are float32. The probabilities are rounded to
the query's dtype before they weigh the values, and the result is rounded once, as the references of
the vendor's tests do (Ascend/op-plugin test/test_custom_ops/test_npu_fused_infer_attention_score).

Only the keys that a sequence has are read: the padding of a cache costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from cann_host.graph.executor import GraphError, caution
from cann_host.rules import (
    INCRE,
    MASK_SIZE,
    PROMPT,
    AttentionCall,
    few_tokens,
    kind_of,
    value_head,
)
from cann_host.weights import converted

__all__ = [
    "AttentionTensors",
    "as_axes",
    "as_heads",
    "attend",
    "band",
    "fused_attention",
    "need_triangle",
]

_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class AttentionTensors:
    """The tensors of a call; `optional` has those that are given, by their names in
    `AttentionCall`."""

    query: Tensor
    key: Sequence[Tensor]
    value: Sequence[Tensor]
    scale: float
    optional: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sequence:
    """The part of the tensors that is one sequence: its queries and its keys."""

    batch: int
    first_query: int
    queries: int
    first_key: int
    keys: int

    @property
    def rows(self) -> slice:
        return slice(self.first_query, self.first_query + self.queries)

    @property
    def columns(self) -> slice:
        return slice(self.first_key, self.first_key + self.keys)


def as_heads(tensor: Tensor, axes: str, heads: int) -> Tensor:
    """A view as (batch, heads, sequence, head dim).

    Args:
        tensor: with the axes in another order.
        axes: their names, as in `Layout`; packed tokens are one batch.
        heads: number of heads, for the axis H.
    """
    if "H" in axes:
        tensor = tensor.unflatten(axes.index("H"), (heads, -1))
        axes = axes.replace("H", "ND")
    axes = axes.replace("T", "S")
    tensor = tensor.permute([axes.index(axis) for axis in "BNSD" if axis in axes])
    return tensor if "B" in axes else tensor.unsqueeze(0)


def as_axes(tensor: Tensor, axes: str) -> Tensor:
    """From (batch, heads, sequence, head dim) to the order `axes`."""
    order = ["BNSD".index(axis) for axis in axes.replace("T", "S").replace("H", "ND")]
    if "B" not in axes:
        tensor, order = tensor[0], [at - 1 for at in order]
    tensor = tensor.permute(order)
    return tensor.flatten(axes.index("H")) if "H" in axes else tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    outside: Tensor | None = None,
    shift: Tensor | None = None,
    sink: Tensor | None = None,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the heads of one sequence, or of several with the same lengths.

    Args:
        query: (..., heads, queries, head dim).
        key, value: (..., kv heads, keys, head dim); each serves as many heads of the query.
        scale: of the scores.
        mask: bool, (..., heads or 1, queries, keys): scores that get the least float32. A query
            that has no other score sees each key in the same way.
        outside: bool, the keys that a query does not read; the result of a query that reads none
            is 0.
        shift: added to the scaled scores; before they are scaled, if `shift_first`.
        sink: (heads, 1, 1), a score whose key has no value.

    Returns:
        The result in float32, and the maximum and the sum of the softmax, (..., heads, queries, 1).
        Of a query that reads no key these are 0, -inf and 0.
    """
    outer, (heads, queries) = query.shape[:-3], query.shape[-3:-1]
    grouped = (*outer, key.shape[-3], -1)
    rows = query.float().reshape(*grouped, query.shape[-1])
    scores = torch.matmul(rows, key.float().mT).view(*outer, heads, queries, -1)
    if shift is not None and shift_first:
        scores += shift
    scores *= scale
    if shift is not None and not shift_first:
        scores += shift
    if mask is not None:
        scores.masked_fill_(mask, _LEAST)
    if outside is not None:
        scores.masked_fill_(outside, -torch.inf)
    most = scores.amax(-1, keepdim=True)
    if sink is not None:
        most = torch.maximum(most, sink)
    weights = scores.sub_(most.clamp(min=_LEAST)).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - most).exp_()
    weights /= total.clamp(min=torch.finfo(torch.float32).tiny)
    weights = weights.to(query.dtype).float().reshape(*grouped, weights.shape[-1])
    out = torch.matmul(weights, value.float()).view(*outer, heads, queries, -1)
    return out, most, total


def band(queries: int, keys: int, before: int, after: int) -> Tensor | None:
    """The keys that lie outside a band along the diagonal from the first query and key.

    Args:
        queries, keys: how many.
        before, after: a query reads so many keys before and after its own.

    Returns:
        bool (queries, keys); None if there are none.
    """
    if after >= keys - 1 and before >= queries - 1:
        return None
    row = torch.arange(queries, device="cpu").unsqueeze(1)
    column = torch.arange(keys, device="cpu")
    return (column > row + after) | (column < row - before)


def fused_attention(call: AttentionCall, tensors: AttentionTensors) -> tuple[Tensor, Tensor]:
    """attention_out and softmax_lse of a call that its rules accept."""
    query = as_heads(tensors.query, call.layout.query, call.num_heads)
    values = query.new_zeros((*query.shape[:3], value_head(call)), dtype=torch.float32)
    lse = query.new_full((*query.shape[:3], 1), torch.inf, dtype=torch.float32)
    sink = tensors.optional.get("learnable_sink")
    for one in _sequences(call, tensors):
        if one.queries <= 0 or min(one.first_query, one.first_key) < 0:
            continue
        key, value = (_keys(call, tensors, name, one) for name in ("key", "value"))
        keys = key.shape[1]
        if keys == 0:
            continue
        mask, outside = _mask(call, tensors, one, keys), _outside(call, one, keys)
        if mask is not None and call.inner_precise & 2:  # rows without a key are corrected
            outside, mask = (mask if outside is None else outside | mask), None
        batch = 0 if call.is_packed else one.batch
        out, most, total = attend(
            query[batch][:, one.rows],
            key,
            value,
            tensors.scale,
            mask=mask,
            outside=outside,
            shift=_shift(tensors, one, keys),
            sink=None if sink is None else sink.float().view(-1, 1, 1),
        )
        if mask is not None and bool((most <= _LEAST).logical_and(total > 0).any()):
            caution(
                "atten_mask hides every key from a query and inner_precise is "
                f"{call.inner_precise}: the result of such a query is the mean of the values"
            )
        values[batch][:, one.rows] = out
        lse[batch][:, one.rows] = torch.where(total > 0, most + total.log(), torch.inf)
    return _finish(call, tensors, values), _finish_lse(call, lse)


def _sequences(call: AttentionCall, tensors: AttentionTensors) -> Iterator[_Sequence]:
    queries, keys = call.actual_seq_lengths, call.actual_seq_lengths_kv
    if call.is_packed:
        assert queries and queries.values is not None and keys and keys.values is not None
        bounds = list(pairwise((0, *keys.values)))
        for batch, (start, end) in enumerate(pairwise((0, *queries.values))):
            first, last = (0, keys.values[batch]) if call.is_paged else bounds[batch]
            yield _Sequence(batch, start, end - start, first, last - first)
        return
    query = as_heads(tensors.query, call.layout.query, call.num_heads)
    batches, tokens = query.shape[0], query.shape[2]
    after, kv_after = (
        _padding(tensors, name) for name in ("query_padding_size", "kv_padding_size")
    )
    for batch in range(batches):
        first_query, count, first_key = 0, tokens, 0
        if queries is not None and queries.size and kind_of(call) == PROMPT:
            count = queries.of(batch) or 0
            if after is not None:
                first_query = tokens - after - count
        tensor = tensors.key[batch if call.is_list else 0]
        full = 0 if call.is_paged else as_heads(tensor, call.layout.query, call.kv_heads).shape[2]
        has = full
        if keys is not None and keys.size:
            has = keys.of(batch) or 0
            if kv_after is not None and not call.is_paged and not call.is_list:
                first_key = full - kv_after - has
        yield _Sequence(batch, first_query, count, first_key, has)


def _padding(tensors: AttentionTensors, name: str) -> int | None:
    """How much padding follows the sequences; None if they begin at the first place."""
    size = tensors.optional.get(name)
    return None if size is None or size.numel() == 0 else max(0, int(size.reshape(-1)[0]))


def _keys(call: AttentionCall, tensors: AttentionTensors, name: str, one: _Sequence) -> Tensor:
    """The keys or values of a sequence as (kv heads, keys, head dim), after those of the prefix."""
    given = tensors.key if name == "key" else tensors.value
    blocks = _blocks(call, tensors, one)
    if blocks is not None:
        rows = _gathered(given[0], blocks, call.kv_heads)[:, : one.keys]
    else:
        tensor = as_heads(given[one.batch if call.is_list else 0], call.layout.query, call.kv_heads)
        batch = 0 if call.is_packed or call.is_list else one.batch
        rows = tensor[batch][:, one.columns]
    if rows.dtype == torch.int8:
        rows = _antiquantized(call, tensors, name, rows, one, blocks)
    prefix = tensors.optional.get(f"{name}_shared_prefix")
    if prefix is None:
        return rows
    first = as_heads(prefix, call.layout.query, call.kv_heads)[0]
    length = call.actual_shared_prefix_len
    if length is not None and length.values:
        first = first[:, : length.values[0]]
    return torch.cat((first, rows), 1)


def _blocks(call: AttentionCall, tensors: AttentionTensors, one: _Sequence) -> Tensor | None:
    """The blocks of a paged cache that hold a sequence."""
    if not call.is_paged:
        return None
    count = -(-one.keys // call.block_size)
    table = tensors.optional["block_table"][one.batch, :count].long()
    blocks = tensors.key[0].shape[0]
    if count and not 0 <= int(table.min()) <= int(table.max()) < blocks:
        raise GraphError(
            f"block_table[{one.batch}] has block {int(table.min())} to {int(table.max())} and the "
            f"cache {blocks} blocks (cann_host's own refusal; the kernel reads outside)"
        )
    return table


def _gathered(cache: Tensor, blocks: Tensor, heads: int) -> Tensor:
    """Blocks of a paged cache as (kv heads, keys, head dim)."""
    rows = cache.index_select(0, blocks)
    if rows.dim() == 3:  # (blocks, block size, H)
        rows = rows.unflatten(2, (heads, -1)).transpose(1, 2)
    if rows.dim() == 5:  # FRACTAL_NZ: (blocks, heads, D / width, block size, width)
        rows = rows.permute(0, 1, 3, 2, 4).flatten(3)
    merged: Tensor = rows.transpose(0, 1).flatten(1, 2)
    return merged


def _antiquantized(
    call: AttentionCall,
    tensors: AttentionTensors,
    name: str,
    rows: Tensor,
    one: _Sequence,
    blocks: Tensor | None,
) -> Tensor:
    """(rows + offset) * scale.

    The kernels of more than a few query tokens, and those of joint scales, store the result as
    float16 (aclnnFusedInferAttentionScoreV4.md); the others do not store it.
    """
    own = f"{name}_antiquant_scale" in tensors.optional
    mode = getattr(call, f"{name}_antiquant_mode") if own else call.antiquant_mode
    numbers: list[Tensor | None] = []
    for what in ("scale", "offset"):
        given = tensors.optional.get(f"{name}_antiquant_{what}" if own else f"antiquant_{what}")
        if given is not None:
            if not own:  # key and value share a tensor
                given = given[int(name == "value")]
            given = _spread(mode, given.float(), rows, one, blocks)
        numbers.append(given)
    scale, offset = numbers
    result = rows.float() if offset is None else rows.float() + offset
    result = result if scale is None else result * scale
    stored = kind_of(call) == PROMPT and not (own and few_tokens(call))
    return result.to(torch.float16) if stored else result


def _spread(
    mode: int, given: Tensor, rows: Tensor, one: _Sequence, blocks: Tensor | None
) -> Tensor:
    """A scale or offset, to be broadcast over (kv heads, keys, head dim)."""
    heads, keys, _ = rows.shape
    if mode == 0:  # per-channel, or per-tensor
        return given if given.numel() == 1 else given.reshape(heads, 1, -1)
    if mode == 1:  # per-token
        return given.reshape(-1, given.shape[-1])[one.batch, one.columns].view(1, keys, 1)
    if mode == 2:  # per-tensor and head
        return given.view(heads, 1, 1)
    if mode == 3:  # per-token and head
        return given[one.batch][:, one.columns].unsqueeze(2)
    assert blocks is not None  # 4 and 5: per-token, and head, in blocks as the cache
    paged = given[blocks].view(1, -1) if mode == 4 else given[blocks].transpose(0, 1).flatten(1)
    return paged[:, :keys].unsqueeze(2)


def _outside(call: AttentionCall, one: _Sequence, keys: int) -> Tensor | None:
    """The keys outside the band of sparse_mode. One query of IncreFlashAttention has none."""
    mode, masked = call.sparse_mode, call.atten_mask is not None
    if not masked or kind_of(call) == INCRE:
        return None
    queries, later = one.queries, keys - one.queries
    padded = call.query_padding_size is not None or call.kv_padding_size is not None
    if mode == 0 and not padded:
        return band(queries, keys, call.pre_tokens, call.next_tokens)
    if mode == 2:
        return band(queries, keys, keys + queries, 0)
    if mode == 3:
        return band(queries, keys, keys + queries, later)
    if mode == 4:
        return band(queries, keys, call.pre_tokens - later, call.next_tokens + later)
    return None


def _mask(
    call: AttentionCall, tensors: AttentionTensors, one: _Sequence, keys: int
) -> Tensor | None:
    """The caller's mask of a sequence, (queries or 1, keys)."""
    mask = tensors.optional.get("atten_mask")
    if mask is None or mask.numel() == 0:
        return None
    columns = slice(one.first_key, one.first_key + keys)
    if kind_of(call) == INCRE:
        if call.sparse_mode == 3:
            return None
        return mask.reshape(-1, mask.shape[-1])[one.batch, columns].bool().unsqueeze(0)
    if call.sparse_mode >= 2:
        need_triangle(mask)
        return None
    if mask.dim() > 2:
        mask = mask[one.batch if mask.shape[0] > 1 else 0]
    if mask.dim() > 2:
        mask = mask[0]
    return mask[one.rows, columns].bool()


def need_triangle(mask: Tensor) -> None:
    """Refuse a mask that is not the triangle that sparse_mode 2 to 4 need.

    A kernel reads it in blocks, at the distance between its queries and keys: so anywhere. The
    answer is kept until the bytes of the mask are written; to look costs a decode step more than
    its attention.
    """
    mask = mask.reshape(MASK_SIZE, MASK_SIZE)
    if mask.is_contiguous():
        kind = "is a triangle", mask.dtype
        is_one = converted(kind, mask.data_ptr(), mask.nbytes, lambda: _is_triangle(mask))
    else:
        is_one = _is_triangle(mask)
    if not is_one:
        raise GraphError(
            "atten_mask is not the triangle of torch.triu(torch.ones(2048, 2048), 1); cann_host "
            "computes sparse_mode 2, 3 and 4 with no other"
        )


def _is_triangle(mask: Tensor) -> Tensor:
    return (mask.bool() == torch.ones_like(mask, dtype=torch.bool).triu_(1)).all()


def _shift(tensors: AttentionTensors, one: _Sequence, keys: int) -> Tensor | None:
    shift = tensors.optional.get("pse_shift")
    if shift is None or shift.numel() == 0:
        return None
    columns = slice(one.first_key, one.first_key + keys)
    return shift[one.batch if shift.shape[0] > 1 else 0][:, one.rows, columns].float()


def _finish(call: AttentionCall, tensors: AttentionTensors, values: Tensor) -> Tensor:
    """The result in its dtype and layout."""
    if call.out_dtype == "int8":
        scale, offset = (tensors.optional.get(f"quant_{n}2") for n in ("scale", "offset"))
        assert scale is not None
        each = (values.shape[1], 1, values.shape[3])  # per-channel
        values = values * (scale.float() if scale.numel() == 1 else scale.float().view(each))
        if offset is not None:
            values += offset.float() if offset.numel() == 1 else offset.float().view(each)
        values = values.round().clamp_(-128, 127)
    dtype = torch.int8 if call.out_dtype == "int8" else tensors.query.dtype
    return as_axes(values.to(dtype), call.layout.out).contiguous()


def _finish_lse(call: AttentionCall, lse: Tensor) -> Tensor:
    return lse[0].transpose(0, 1).contiguous() if call.is_packed else lse
