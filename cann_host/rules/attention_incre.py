"""IncreFlashAttention, and FusedInferAttentionScore of one query token for each sequence.

Source: hicann/ops-transformer attention/incre_flash_attention/op_host,
incre_flash_attention_tiling.cpp and incre_flash_attention_tiling_check.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import MASK_SIZE, AttentionCall, key_dims, query_dims
from .attention_antiquant import check_incre_antiquant, most_keys
from .attention_prompt import check_list_and_prefix
from .descriptors import TensorDesc
from .refusal import TILING, Refusal, one_of

__all__ = ["check_incre"]

_LAYOUTS = ("BSH", "BSND", "BNSD")
_MOST_BATCHES, _MOST_GROUPS, _MOST_KV_HEADS, _MOST_BLOCK = 65536, 64, 256, 512
_WIDEST_ROW = 65535
# dtype of the cache: block_size is a multiple
_BLOCK_STEP = {"float16": 16, "bfloat16": 16, "int8": 32}


def _refuse(text: str) -> Refusal:
    return Refusal(text, TILING)


def _check_heads(call: AttentionCall) -> Refusal | None:
    query, key = query_dims(call), key_dims(call, call.key[0])
    if call.input_layout not in _LAYOUTS:
        return _refuse(f"input_layout is {call.input_layout}; {one_of(_LAYOUTS)} is allowed")
    if query.seq != 1:
        return _refuse(f"query has {query.seq} tokens; 1 is allowed")
    if call.kv_heads > call.num_heads or call.num_heads % call.kv_heads:
        return _refuse(
            f"num_heads is {call.num_heads} and num_key_value_heads {call.kv_heads}; it must be a "
            "multiple"
        )
    if call.num_heads // call.kv_heads > _MOST_GROUPS or call.kv_heads > _MOST_KV_HEADS:
        return _refuse(
            f"num_heads is {call.num_heads} and num_key_value_heads {call.kv_heads}; at most "
            f"{_MOST_GROUPS} times, and {_MOST_KV_HEADS} of the second"
        )
    if query.batch > _MOST_BATCHES:
        return _refuse(f"query has {query.batch} batches; at most {_MOST_BATCHES} are allowed")
    for name, dims, heads in (
        ("query", query, call.num_heads),
        ("key", key, call.kv_heads),
    ):
        if dims.heads != heads:
            return _refuse(f"{name} has {dims.heads} heads and the attribute says {heads}")
    if key.head != query.head:
        text = f"query has a head dim of {query.head} and key of {key.head}"
        return _refuse(text) if not call.is_paged else Refusal(f"{text}; not in cann_host", None)
    if call.inner_precise not in (0, 1):
        return _refuse(f"inner_precise is {call.inner_precise}; 0 or 1 is allowed")
    if call.key[0].shape != call.value[0].shape:
        return _refuse(f"key has shape {call.key[0].shape} and value {call.value[0].shape}")
    if not call.is_paged and not call.is_list and key.batch != query.batch:
        return _refuse(f"query has {query.batch} batches and key {key.batch}")
    return None


def _check_lengths(call: AttentionCall) -> Refusal | None:
    lengths, batches = call.actual_seq_lengths_kv, query_dims(call).batch
    if lengths is None:
        if call.is_paged:
            return _refuse("block_table is given and actual_seq_lengths_kv is not")
        return None
    if lengths.size == 0:
        return None
    if lengths.size != 1 and lengths.size < batches:
        return _refuse(
            f"actual_seq_lengths_kv has {lengths.size} values; 1 or {batches} are allowed"
        )
    for batch in range(batches):
        length = lengths.of(batch)
        if length is None:
            break
        most = length
        if not call.is_paged:
            most = key_dims(call, call.key[batch if call.is_list else 0]).seq
        if not 0 <= length <= most:
            return _refuse(f"actual_seq_lengths_kv[{batch}] is {length}; 0 to {most} is allowed")
    return None


def _check_paged(call: AttentionCall) -> Refusal | None:
    table, key = call.block_table, call.key[0]
    if table is None:
        return None
    batches, cache, size = query_dims(call).batch, key_dims(call, key), call.block_size
    if len(key.shape) == 5:
        return Refusal("cann_host does not compute one query with a cache of 5 dims", None)
    if len(key.shape) == 4 and call.input_layout != "BNSD":
        return _refuse(f"input_layout is {call.input_layout} and the cache has 4 dims")
    step = _BLOCK_STEP.get(key.dtype, 1)
    if not 0 < size <= _MOST_BLOCK or size % step:
        return _refuse(
            f"block_size is {size}; multiples of {step} to {_MOST_BLOCK} for {key.dtype}"
        )
    if len(key.shape) == 3 and key.shape[2] > _WIDEST_ROW:
        return _refuse(f"key has rows of {key.shape[2]} values; at most {_WIDEST_ROW} are allowed")
    if len(table.shape) != 2 or 0 in table.shape:
        return _refuse(f"block_table has shape {table.shape}; it must be ({batches}, ...)")
    # the kernel would read outside the table or the cache
    if table.shape[0] < batches or cache.seq != size:
        return Refusal(
            f"block_table has shape {table.shape}, key {key.shape} and block_size is {size} "
            "(cann_host's own refusal; the kernel reads outside)",
            None,
        )
    lengths = call.actual_seq_lengths_kv
    longest = max(lengths.values, default=0) if lengths and lengths.values else 0
    if longest > most_keys(call):
        return _refuse(f"actual_seq_lengths_kv has {longest}; the table has {most_keys(call)} keys")
    return None


def _check_shift(call: AttentionCall) -> Refusal | None:
    shift, query = call.pse_shift, query_dims(call)
    if shift is None:
        return None
    if shift.dtype != call.query.dtype:
        return _refuse(f"pse_shift is {shift.dtype} and query {call.query.dtype}")
    keys = most_keys(call)
    if (
        len(shift.shape) != 4
        or shift.shape[0] not in (1, query.batch)
        or shift.shape[1:3] != (query.heads, 1)
        or shift.shape[3] < keys
    ):
        return _refuse(
            f"pse_shift has shape {shift.shape}; it must be (1 or {query.batch}, {query.heads}, 1, "
            f">= {keys})"
        )
    return None


def _check_mask(call: AttentionCall) -> Refusal | None:
    mask, mode = call.atten_mask, call.sparse_mode
    if mask is None or 0 in mask.shape:
        return None
    if mode == 4:
        return Refusal("cann_host does not compute sparse_mode 4 for one query", None)
    if mode == 3:
        if mask.shape != (MASK_SIZE, MASK_SIZE):
            return _refuse(
                f"sparse_mode is 3 and atten_mask has shape {mask.shape}; it must be "
                f"({MASK_SIZE}, {MASK_SIZE})"
            )
        return None
    batches, lengths = query_dims(call).batch, call.actual_seq_lengths_kv
    if not mask.shape or mask.shape[0] != batches:
        return _refuse(f"atten_mask has shape {mask.shape}; its first dim must be {batches}")
    needed = most_keys(call)
    if not call.is_paged and lengths is not None and lengths.values:
        needed = max(lengths.values[: max(batches, 1)])
    if mask.shape[-1] < needed:
        return _refuse(f"atten_mask has shape {mask.shape}; it must cover {needed} keys")
    return None


def _check_quant(call: AttentionCall) -> Refusal | None:
    scale, offset, query = call.quant_scale2, call.quant_offset2, query_dims(call)
    for name in ("dequant_scale1", "quant_scale1", "dequant_scale2"):
        if getattr(call, name) is not None:
            return _refuse(f"{name} is given and query is {call.query.dtype}")
    if call.out_dtype != "int8":
        if scale is not None or offset is not None:
            return _refuse(f"quant_scale2 is given and attention_out is {call.out_dtype}")
        return None
    if scale is None:
        return _refuse("attention_out is int8 and quant_scale2 is not given")
    if scale.dtype == "float16" or scale.dtype not in ("float32", call.query.dtype):
        return _refuse(f"quant_scale2 is {scale.dtype} and query {call.query.dtype}")
    if offset is not None and offset.dtype != scale.dtype:
        return _refuse(f"quant_scale2 is {scale.dtype} and quant_offset2 {offset.dtype}")
    heads, head = query.heads, query.head
    width = heads * head
    allowed = (
        (1, heads, 1, head),
        (1, 1, heads, head),
        (heads, 1, head),
        (1, heads, head),
        (1, 1, width),
        (1, width),
        (heads, head),
        (width,),
    )
    for name, tensor in (("quant_scale2", scale), ("quant_offset2", offset)):
        if tensor is None or set(tensor.shape) <= {1}:
            continue
        if tensor.shape not in allowed and len(tensor.shape) <= 4:
            return _refuse(f"{name} has shape {tensor.shape}; {allowed[-2]} is allowed")
    return None


_CHECKS: tuple[Callable[[AttentionCall], Refusal | None], ...] = (
    check_list_and_prefix,
    _check_heads,
    _check_lengths,
    _check_paged,
    _check_shift,
    _check_mask,
    _check_quant,
    check_incre_antiquant,
)


def check_incre(call: AttentionCall) -> Refusal | None:
    """Why a call is refused; None if it is accepted. `check_out` came before."""
    for check in _CHECKS:
        refusal = check(call)
        if refusal is not None:
            return refusal
    for name in ("quant_scale2", "quant_offset2"):
        tensor: TensorDesc | None = getattr(call, name)
        if tensor is not None and len(tensor.shape) > 4:
            return Refusal(f"cann_host computes no {name} of shape {tensor.shape}", None)
    if call.is_paged and call.input_layout == "BSH" and call.pre_tokens < 2147483647:
        # the kernel then reads only the last pre_tokens keys
        return Refusal(
            f"pre_tokens is {call.pre_tokens}; cann_host computes a paged decode step over all "
            "keys (2147483647)",
            None,
        )
    return None
