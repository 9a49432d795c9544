"""FlashAttentionScore, the attention of training, and its gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, caution, describe, ints, is_meta, op
from cann_host.graph.ops.attention_arithmetic import (
    as_axes,
    as_heads,
    attend,
    band,
    need_triangle,
)
from cann_host.rules import (
    FLASH_WIDTH,
    FlashCall,
    Lengths,
    check_flash,
    flash_keys,
    flash_out_shape,
    flash_softmax_shape,
)

_LEAST = torch.finfo(torch.float32).min
_CORRECTED = 2  # inner_precise: the result of a query whose keys are all masked is 0


def flash_attention(
    call: FlashCall, query: Tensor, key: Tensor, value: Tensor, scale: float, **given: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax_max, softmax_sum and attention_out of a call that its rules accept.

    Args:
        call: the call.
        query, key, value, scale: as in `attend`.
        given: atten_mask, real_shift and sink, those that are given.
    """
    layout, keys = call.input_layout, flash_keys(call, call.key)
    q = as_heads(query, layout, call.head_num)
    k, v = (as_heads(t, layout, keys.heads) for t in (key, value))
    out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=torch.float32)
    most, total = (q.new_zeros((*q.shape[:3], 1), dtype=torch.float32) for _ in range(2))
    mask = given.get("atten_mask")
    if mask is not None and mask.dim() == 0:
        mask = None
    if mask is not None and call.sparse_mode in (2, 3, 4):
        need_triangle(mask)
    for rows, columns in _parts(call, q.shape[2], k.shape[2]):
        part = q[:, :, rows]
        if not part.numel() or not k[:, :, columns].numel():
            continue  # the kernel sets these results to 0
        counts = part.shape[2], k[:, :, columns].shape[2]
        outside, hidden = _hidden(call, mask, *counts)
        sink = given.get("sink")
        results = attend(
            part,
            k[:, :, columns],
            v[:, :, columns],
            scale,
            mask=hidden,
            outside=outside,
            shift=_shift(given),
            sink=None if sink is None else sink.float().view(-1, 1, 1),
            shift_first=call.pse_type == 1,
        )
        _correct(call, hidden, *results)
        for whole, one in zip((out, most, total), results, strict=True):
            whole[:, :, rows] = one
    attention = as_axes(out.to(query.dtype), layout).contiguous()
    return _wide(call, most), _wide(call, total), attention


def _parts(call: FlashCall, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """The rows and keys of each packed sequence; everything otherwise."""
    if not call.is_packed:
        return [(slice(0, queries), slice(0, keys))]
    assert call.actual_seq_qlen is not None and call.actual_seq_kvlen is not None
    bounds = (call.actual_seq_qlen.values or (), call.actual_seq_kvlen.values or ())
    ends = [[slice(a, b) for a, b in pairwise((0, *values))] for values in bounds]
    return list(zip(*ends, strict=True))


def _hidden(
    call: FlashCall, mask: Tensor | None, queries: int, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """The keys outside the band, and the caller's mask, of sequences with so many tokens."""
    if mask is None:
        return None, None
    mode, later, whole = call.sparse_mode, keys - queries, keys + queries
    if mode == 2:
        return band(queries, keys, whole, 0), None
    if mode == 3:
        return band(queries, keys, whole, later), None
    if mode == 4:
        return band(queries, keys, call.pre_tockens - later, call.next_tockens + later), None
    outside = band(queries, keys, call.pre_tockens, call.next_tockens) if mode == 0 else None
    return outside, mask[..., :queries, :keys].bool()


def _shift(given: dict[str, Tensor]) -> Tensor | None:
    shift = given.get("real_shift")
    return None if shift is None or shift.dim() == 0 else shift.float()


def _correct(
    call: FlashCall, hidden: Tensor | None, out: Tensor, most: Tensor, total: Tensor
) -> None:
    """The results of queries that see no key, as the kernel writes them."""
    least = most <= _LEAST
    if not bool(least.any()):
        return
    if call.inner_precise == _CORRECTED or hidden is None:
        out.masked_fill_(least, 0.0)
        most.masked_fill_(least, _LEAST)
        total.masked_fill_(least, -_LEAST)
        return
    caution(
        f"atten_mask hides every key from a query and inner_precise is {call.inner_precise}: the "
        "result of such a query is the mean of the values"
    )


def _wide(call: FlashCall, numbers: Tensor) -> Tensor:
    """softmax_max or softmax_sum: each number in a row of its own. Those of packed tokens lie, for
    each sequence, head after head, unless softmax_layout is that of the input."""
    if not call.is_packed:
        return numbers.expand(*numbers.shape[:3], FLASH_WIDTH)
    numbers = numbers[0]
    if call.softmax_layout == "same_as_input":
        return numbers.transpose(0, 1).expand(-1, -1, FLASH_WIDTH)
    parts = [numbers[:, rows].reshape(-1) for rows, _ in _parts(call, numbers.shape[1], 0)]
    flat = torch.cat([*parts, numbers.new_zeros(numbers.numel() - sum(map(len, parts)))])
    return flat.view(numbers.shape[1], numbers.shape[0], 1).expand(-1, -1, FLASH_WIDTH)


def _narrow(call: FlashCall, wide: Tensor) -> Tensor:
    """The inverse of `_wide`: (batch, heads, queries, 1)."""
    if not call.is_packed:
        return wide[..., :1]
    if call.softmax_layout == "same_as_input":
        return wide[..., :1].transpose(0, 1).unsqueeze(0)
    tokens, heads, _ = wide.shape
    flat, at = wide[..., 0].reshape(-1), 0
    numbers = wide.new_zeros(1, heads, tokens, 1)
    for rows, _ in _parts(call, tokens, 0):
        count = (rows.stop - rows.start) * heads
        numbers[0, :, rows, 0] = flat[at : at + count].view(heads, -1)
        at += count
    return numbers


def flash_gradient(
    call: FlashCall,
    tensors: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    softmax: tuple[Tensor, Tensor],
    attention: Tensor,
    scale: float,
    **given: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and real_shift, in float32.

    Args:
        call: the call of the forward.
        tensors: query, key and value.
        dy: gradient of the result.
        softmax: softmax_max and softmax_sum.
        attention: the result.
        scale, given: as in `flash_attention`.
    """
    layout, heads = call.input_layout, flash_keys(call, call.key).heads
    q, dy, out = (as_heads(t, layout, call.head_num) for t in (tensors[0], dy, attention))
    k, v = (as_heads(t, layout, heads) for t in tensors[1:])
    most, total = (_narrow(call, numbers) for numbers in softmax)
    dq, dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (q, k, v))
    mask, shift, dshift = given.get("atten_mask"), _shift(given), None
    groups = (q.shape[0], heads, -1)
    for rows, columns in _parts(call, q.shape[2], k.shape[2]):
        if not q[:, :, rows].numel() or not k[:, :, columns].numel():
            continue
        query, d_out, result = (
            t[:, :, rows].float().reshape(*groups, t.shape[3]) for t in (q, dy, out)
        )
        key, value = (t[:, :, columns].float() for t in (k, v))
        scores = (query @ key.mT).view(*q.shape[:2], -1, key.shape[2])
        if shift is not None and call.pse_type == 1:
            scores += shift
        scores *= scale
        if shift is not None and call.pse_type == 0:
            scores += shift
        outside, hidden = _hidden(call, mask, scores.shape[2], scores.shape[3])
        for part, least in ((hidden, _LEAST), (outside, -torch.inf)):
            if part is not None:
                scores.masked_fill_(part, least)
        weights = (scores - most[:, :, rows]).exp_() / total[:, :, rows]
        weights = weights.reshape(*groups, key.shape[2])
        inner = (d_out * result).sum(-1, keepdim=True)
        d_scores = weights * (d_out @ value.mT - inner)
        dq[:, :, rows] = (d_scores @ key).view_as(q[:, :, rows]) * scale
        dk[:, :, columns] = (d_scores.mT @ query) * scale
        dv[:, :, columns] = weights.mT @ d_out
        if shift is not None:
            dshift = d_scores.view_as(scores) * (scale if call.pse_type == 1 else 1.0)
            dshift = dshift.sum_to_size(shift.shape)
    return as_axes(dq, layout), as_axes(dk, layout), as_axes(dv, layout), dshift


_LENGTHS = ("prefix", "actual_seq_qlen", "actual_seq_kvlen", "q_start_idx", "kv_start_idx")


@op("FlashAttentionScore")
def _flash_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real_shift: Tensor | None = None,
    drop_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    prefix: Tensor | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    q_start_idx: Tensor | None = None,
    kv_start_idx: Tensor | None = None,
    *,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    head_num: int,
    input_layout: str,
    inner_precise: int = 1,
    sparse_mode: int = 0,
    pse_type: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given: dict[str, Any] = dict(locals())
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    fields: dict[str, Any] = {name: v for name, v in given.items() if name not in tensors}
    del fields["scale_value"]
    for name, tensor in tensors.items():
        if name in _LENGTHS:
            values = None if is_meta(tensor) else tuple(ints(tensor))
            fields[name] = Lengths(tensor.numel(), values)
        else:
            fields[name] = describe(tensor)
    call = FlashCall(executor.soc_name(), **fields, is_graph=True)
    if refusal := check_flash(call):
        raise GraphError(refusal)
    nothing = query.new_empty(0, 0, 0, 0)  # softmax_out, which the kernel does not write
    if is_meta(query):
        wide = query.new_empty(flash_softmax_shape(call), dtype=torch.float32)
        return wide, wide, nothing, query.new_empty(flash_out_shape(call))
    optional = {n: t for n, t in tensors.items() if n in ("atten_mask", "real_shift")}
    most, total, out = flash_attention(call, query, key, value, scale_value, **optional)
    return most, total, nothing, out
