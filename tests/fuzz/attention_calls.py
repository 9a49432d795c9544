"""Makers of valid calls of attention, for `calls`. Each function's arguments are in the order of
cann_host's own table; a name that a maker does not give is absent."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from cache_calls import ZEROS
from calls import BF16, F16, F32, I8, I32, Json, tensor

from cann_host.aclnn import attention, attention_flash

BOOL = 12
MOST = 2147483647
PAGE = 128  # keys in a block of a paged cache


def _shape(layout: str, batch: int, heads: int, rows: int, head: int) -> tuple[int, ...]:
    sizes = {"B": batch, "N": heads, "S": rows, "D": head, "H": heads * head, "T": batch * rows}
    return tuple(sizes[axis] for axis in layout)


def _ends(batch: int, rows: int) -> Json:
    return {"ints": [rows * (number + 1) for number in range(batch)]}


def _mask(rng: random.Random, batch: int, queries: int, keys: int) -> Json | None:
    shapes = ((queries, keys), (batch, 1, queries, keys))
    return tensor(rng.choice(shapes), BOOL, 5) if rng.random() < 0.5 else None


def _fused(rng: random.Random, name: str) -> list[Any]:
    is_prompt, is_step = "Prompt" in name, "Incre" in name
    layouts = ("BNSD", "BSND", "BSH") if is_prompt or is_step else ("BNSD", "BSND", "BSH", "TND")
    layout, dtype = rng.choice(layouts), rng.choice((F16, BF16))
    batch, kv, group = (rng.choice((1, 2)) for _ in range(3))
    packed = layout == "TND"
    rows, head = 1 if is_step else rng.choice((1, 1, 3)), 64 if packed else rng.choice((16, 32))
    keys = rng.choice((1, 5, 0) if not packed else (1, 3))
    heads = kv * group
    out = tensor(_shape(layout, batch, heads, rows, head), dtype, 2, at=2048)
    given: Json = {
        "query": tensor(_shape(layout, batch, heads, rows, head), dtype, 2),
        "attention_out": out,
        "num_heads": heads,
        "scale": {"real": 0.5},
        "pre_tokens": MOST,
        "next_tokens": MOST,
        "input_layout": layout,
        "num_key_value_heads": kv,
    }
    shape = _shape(layout, batch, kv, keys, head)
    lengths = _ends(batch, keys) if packed else {"ints": [rng.randrange(keys + 1)] * batch}
    if not is_prompt and rng.random() < 0.4:  # one page for each sequence
        batch_keys = rng.randrange(1, 40)
        shape = (batch, kv, PAGE, 16) if rng.random() < 0.7 else (batch, PAGE, kv * 16)
        if not packed:
            given["query"] = tensor(_shape(layout, batch, heads, rows, 16), dtype, 2)
            given["attention_out"] = {**given["query"], "at": 2048}
        else:
            shape = (1, PAGE, kv * 64)
            kv_rows = 64
            batch_keys = min(batch_keys, kv_rows)
        given["block_table"] = tensor((batch, 1), I32, rng.choice((ZEROS, ZEROS, 6)))
        given["block_size"], lengths = PAGE, {"ints": [batch_keys] * batch}
        given["actual_seq_lengths_kv"] = lengths
    elif packed or rng.random() < 0.5:
        given["actual_seq_lengths_kv"] = lengths
    if packed:
        given["actual_seq_lengths"] = _ends(batch, rows)
    elif rng.random() < 0.5:
        given["atten_mask"] = _mask(rng, batch, rows, max(keys, 1))
    kind = dtype
    if rows == 1 and not is_prompt and not packed and rng.random() < 0.3:
        kind = I8
        given["antiquant_scale"] = tensor((2,), dtype, 3)
        given["antiquant_offset"] = tensor((2,), dtype, 4) if rng.random() < 0.5 else None
    key, value = tensor(shape, kind, 0), tensor(shape, kind, 1)
    given |= {"key": key, "value": value}
    if not is_prompt:
        given |= {"key": {"tensors": [key]}, "value": {"tensors": [value]}}
    if not (is_prompt or is_step) and rng.random() < 0.4:
        lse = (batch * rows, heads, 1) if packed else (batch, heads, rows, 1)
        given |= {"softmax_lse_flag": 1, "softmax_lse": tensor(lse, F32, 3, at=2048)}
    return [given.get(one) for one in attention._FUNCTIONS[name]]


def _flash_given(rng: random.Random, packed: bool) -> Json:
    """The arguments of FlashAttentionScore by their names."""
    batch, kv, group = (rng.choice((1, 2)) for _ in range(3))
    rows, keys, head = rng.choice((1, 3)), rng.choice((1, 5)), rng.choice((16, 32))
    layout = "TND" if packed else rng.choice(("BNSD", "BNSD", "BSND", "BSH"))
    dtype, heads = rng.choice((F16, BF16, F32)), kv * group
    query, key = (_shape(layout, batch, n, s, head) for n, s in ((heads, rows), (kv, keys)))
    softmax = (batch * rows, heads, 8) if packed else (batch, heads, rows, 8)
    given: Json = {
        "query": tensor(query, dtype, 0),
        "key": tensor(key, dtype, 1),
        "value": tensor(key, dtype, 2),
        "scale_value": {"real": 0.5},
        "keep_prob": {"real": 1.0},
        "pre_tockens": MOST,
        "next_tockens": MOST,
        "head_num": heads,
        "input_layout": layout,
        "sparse_mode": 0 if packed else rng.choice((0, 0, 1)),
        "pse_type": 1,
        "softmax_layout": rng.choice(("", "same_as_input", None)),
        "softmax_max": tensor(softmax, F32, 0, at=8192),
        "softmax_sum": tensor(softmax, F32, 0, at=12288),
        "attention_out": tensor(query, dtype, 1, at=8192),
    }
    if packed:
        given |= {"actual_seq_qlen": _ends(batch, rows), "actual_seq_kvlen": _ends(batch, keys)}
        return given
    given["atten_mask"] = _mask(rng, batch, rows, keys)
    if rng.random() < 0.3:
        given["real_shift"] = tensor((1, heads, rows, keys), dtype, 4)
    return given


def _flash(rng: random.Random, name: str) -> list[Any]:
    given = _flash_given(rng, "VarLen" in name)
    return [given.get(one) for one in attention_flash._FUNCTIONS[name]]


def _flash_gradient(rng: random.Random, name: str) -> list[Any]:
    given = _flash_given(rng, "Unpadding" in name)
    given["attention_in"] = given["attention_out"]
    given["dy"] = {**given["attention_in"], "at": 12288}
    given["dq"] = {**given["query"], "at": 4096}
    given["dk"], given["dv"] = (
        {**given[one], "at": at} for one, at in (("key", 4096), ("value", 2048))
    )
    if given.get("real_shift"):
        given["dpse"] = {**given["real_shift"], "at": 512}
    return [given.get(one) for one in attention_flash._GRADIENT_FUNCTIONS[name]]


Maker = Callable[[random.Random], list[Any]]
MAKERS: dict[str, Maker] = {
    name: partial(maker, name=name)
    for maker, names in (
        (_fused, attention._FUNCTIONS),
        (_flash, attention_flash._FUNCTIONS),
        (_flash_gradient, attention_flash._GRADIENT_FUNCTIONS),
    )
    for name in names
}
