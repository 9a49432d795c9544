"""PromptFlashAttention, and FusedInferAttentionScore of more than one query token.

Source: hicann/ops-transformer attention/prompt_flash_attention/op_host,
prompt_flash_attention_tiling.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .attention import (
    FUSED,
    MASK_SIZE,
    AttentionCall,
    Dims,
    Lengths,
    key_dims,
    query_dims,
)
from .attention_antiquant import check_prompt_antiquant
from .descriptors import TensorDesc
from .refusal import TILING, Refusal, one_of

__all__ = ["check_list_and_prefix", "check_prompt"]

_LAYOUTS = ("BSH", "NSD", "BSND", "BNSD", "BNSD_BSND", "TND", "NTD_TND")
_MOST_HEADS, _MOST_GROUPS, _MOST_BATCHES = 256, 64, 65536
_MOST_TOKENS, _MOST_SEQUENCES = 1048576, 4096  # of TND and NTD_TND
_BLOCK_STEP, _MOST_BLOCK = 128, 1024
_WIDEST_ROW = 65535
# head dims of query, key and value that TND and NTD_TND take
_PACKED_HEADS = {(192, 192, 192), (192, 192, 128), (128, 128, 128), (64, 64, 64)}


def _refuse(text: str) -> Refusal:
    return Refusal(text, TILING)


def _check_layout(call: AttentionCall) -> Refusal | None:
    allowed = _LAYOUTS if call.kind == FUSED else _LAYOUTS[:-1]
    if call.input_layout not in allowed:
        return _refuse(f"input_layout is {call.input_layout}; {one_of(allowed)} is allowed")
    if not 0 <= call.inner_precise <= 3:
        return _refuse(f"inner_precise is {call.inner_precise}; 0 to 3 is allowed")
    if call.antiquant_mode != 0:
        return _refuse(f"antiquant_mode is {call.antiquant_mode}; 0 is allowed")
    return None


def _check_heads(call: AttentionCall) -> Refusal | None:
    query, key, value = query_dims(call), *(key_dims(call, t[0]) for t in (call.key, call.value))
    if not call.is_packed:
        if len({query.head, key.head, value.head}) != 1:
            return _refuse(
                f"query, key and value have the head dims {query.head}, {key.head} and "
                f"{value.head}; they must be equal"
            )
        step = 32 if "int8" in (call.query.dtype, call.key[0].dtype, call.out_dtype) else 16
        if call.kind == FUSED and query.head % step:
            return _refuse(f"query has a head dim of {query.head}; multiples of {step} are allowed")
        if call.query.dtype == "float16" and not call.inner_precise & 1 and query.head % 16:
            return _refuse(f"query has a head dim of {query.head} and inner_precise is 0")
    if call.num_heads > _MOST_HEADS:
        return _refuse(f"num_heads is {call.num_heads}; at most {_MOST_HEADS} is allowed")
    if call.num_heads % call.kv_heads or call.num_heads // call.kv_heads > _MOST_GROUPS:
        return _refuse(
            f"num_heads is {call.num_heads} and num_key_value_heads {call.kv_heads}; it must be a "
            f"multiple, at most {_MOST_GROUPS} times"
        )
    for name, dims, heads in (
        ("query", query, call.num_heads),
        ("key", key, call.kv_heads),
        ("value", value, call.kv_heads),
    ):
        if dims.heads != heads:
            return _refuse(f"{name} has {dims.heads} heads and the attribute says {heads}")
    if not call.is_paged and not call.is_packed and not call.is_list and key != value:
        return Refusal(
            f"key has shape {call.key[0].shape} and value {call.value[0].shape} (cann_host's own "
            "refusal; the kernel reads outside)",
            None,
        )
    return None


def _check_list(call: AttentionCall) -> Refusal | None:
    """Tensors of each batch: key and value are lists."""
    if not call.is_list:
        return None
    if call.is_packed or call.is_paged or _is_padded(call) or call.key_shared_prefix is not None:
        return _refuse("key is a list of tensors; not with TND, block_table, padding or a prefix")
    batch = query_dims(call).batch
    if len(call.key) != batch or len(call.value) != batch:
        return _refuse(
            f"key has {len(call.key)} tensors, value {len(call.value)}, query {batch} batches"
        )
    first = key_dims(call, call.key[0])
    for key, value in zip(call.key, call.value, strict=True):
        one, other = key_dims(call, key), key_dims(call, value)
        if one != other or one._replace(seq=first.seq) != first or one.batch != 1:
            return _refuse(f"key has tensors of shape {call.key[0].shape} and {key.shape}")
    return None


def _is_padded(call: AttentionCall) -> bool:
    return call.query_padding_size is not None or call.kv_padding_size is not None


def _check_padding(call: AttentionCall) -> Refusal | None:
    for name, lengths in (
        ("query_padding_size", call.actual_seq_lengths),
        ("kv_padding_size", call.actual_seq_lengths_kv),
    ):
        tensor: TensorDesc | None = getattr(call, name)
        if tensor is None:
            continue
        if call.is_packed or call.is_paged:
            return _refuse(f"{name} is given; not with TND or block_table")
        if tensor.shape != (1,):
            return _refuse(f"{name} has shape {tensor.shape}; it must be (1,)")
        if lengths is None:
            return _refuse(f"{name} is given and the actual lengths are not")
    return None


def _check_lengths(call: AttentionCall) -> Refusal | None:
    if call.is_packed:
        return None
    query = query_dims(call)
    if query.batch > _MOST_BATCHES:
        return _refuse(f"query has {query.batch} batches; at most {_MOST_BATCHES} are allowed")
    if not call.is_paged and not call.is_list:
        batches = key_dims(call, call.key[0]).batch
        if batches != query.batch:
            return _refuse(f"query has {query.batch} batches and key {batches}")
    for name, lengths in (
        ("actual_seq_lengths", call.actual_seq_lengths),
        ("actual_seq_lengths_kv", call.actual_seq_lengths_kv),
    ):
        if lengths is None or lengths.size == 0:
            continue
        if 1 < lengths.size < query.batch:
            return _refuse(f"{name} has {lengths.size} values; 1 or {query.batch} are allowed")
        for batch in range(query.batch):
            most = query.seq if name == "actual_seq_lengths" else _keys_of(call, batch)
            length = lengths.of(batch)
            if length is not None and not 0 <= length <= (most if most >= 0 else length):
                return _refuse(f"{name}[{batch}] is {length}; 0 to {most} is allowed")
    return None


def _keys_of(call: AttentionCall, batch: int) -> int:
    """Number of keys that a batch can have; -1 if the block table says."""
    if call.is_paged:
        return -1
    return key_dims(call, call.key[batch if call.is_list else 0]).seq


def _check_packed(call: AttentionCall) -> Refusal | None:
    """TND and NTD_TND."""
    if not call.is_packed:
        return None
    queries, keys = call.actual_seq_lengths, call.actual_seq_lengths_kv
    layout = f"input_layout is {call.input_layout}"
    for name, lengths in (("actual_seq_lengths", queries), ("actual_seq_lengths_kv", keys)):
        if lengths is None or lengths.size == 0:
            return _refuse(f"{layout} and {name} is not given")
        if lengths.size > _MOST_SEQUENCES:
            return _refuse(f"{name} has {lengths.size} values; at most {_MOST_SEQUENCES}")
    assert queries is not None and keys is not None
    if queries.size != keys.size:
        return _refuse(f"actual_seq_lengths has {queries.size} values and the other {keys.size}")
    query, key, value = query_dims(call), *(key_dims(call, t[0]) for t in (call.key, call.value))
    if call.query.dtype != "bfloat16" or call.key[0].dtype != "bfloat16":
        return _refuse(f"{layout} and query is {call.query.dtype}; bfloat16 is allowed")
    if call.out_dtype == "int8" or call.pse_shift is not None or call.key_shared_prefix is not None:
        return _refuse(f"{layout}; not with an int8 result, pse_shift or a prefix")
    sizes = query.head, key.head, value.head
    if sizes not in _PACKED_HEADS:
        allowed = one_of(str(heads) for heads in sorted(_PACKED_HEADS))
        return _refuse(f"{layout} and the head dims are {sizes}; {allowed} is allowed")
    if value.head == 192 and (call.num_heads != call.kv_heads or call.input_layout != "TND"):
        return _refuse(f"{layout} and value has a head dim of 192; only TND, one head for each key")
    if query.seq > _MOST_TOKENS or (not call.is_paged and key.seq > _MOST_TOKENS):
        return _refuse(f"query has {query.seq} tokens; at most {_MOST_TOKENS} are allowed")
    return _check_cumulative(call, queries, keys, query, key)


def _check_cumulative(
    call: AttentionCall, queries: Lengths, keys: Lengths, query: Dims, key: Dims
) -> Refusal | None:
    values = key_dims(call, call.value[0]).seq
    for name, lengths, total, is_cumulative in (
        ("actual_seq_lengths", queries, query.seq, True),
        ("actual_seq_lengths_kv", keys, key.seq, not call.is_paged),
        ("actual_seq_lengths_kv", keys, values, not call.is_paged),
    ):
        if lengths.values is None:
            continue
        if min(lengths.values) < 0:
            return _refuse(f"{name} is {lengths.values}; it cannot be negative")
        if is_cumulative and any(b < a for a, b in pairwise(lengths.values)):
            return _refuse(f"{name} is {lengths.values}; with {call.input_layout} it is cumulative")
        if is_cumulative and lengths.values[-1] != total:
            return _refuse(f"{name} ends with {lengths.values[-1]}; the tensor has {total} tokens")
    return None


def _check_paged(call: AttentionCall) -> Refusal | None:
    table, lengths = call.block_table, call.actual_seq_lengths_kv
    if table is None:
        return None
    size, key, value = call.block_size, call.key[0], call.value[0]
    if lengths is None or lengths.size == 0:
        return _refuse("block_table is given and actual_seq_lengths_kv is not")
    if size % _BLOCK_STEP or not _BLOCK_STEP <= size <= _MOST_BLOCK:
        return _refuse(
            f"block_size is {size}; multiples of {_BLOCK_STEP} to {_MOST_BLOCK} are allowed"
        )
    ranks = {"BSH": (3,), "BSND": (3,), "TND": (3, 4, 5), "NTD_TND": (3, 4, 5)}
    if len(key.shape) not in ranks.get(call.input_layout, (3, 4)):
        return _refuse(
            f"input_layout is {call.input_layout} and the cache has {len(key.shape)} dims"
        )
    if not call.is_packed and key.shape != value.shape:
        return _refuse(f"key has shape {key.shape} and value {value.shape}")
    cache = key_dims(call, key)
    if cache.batch != key_dims(call, value).batch or cache.seq != size:
        return _refuse(f"key has shape {key.shape}, value {value.shape} and block_size is {size}")
    if key.shape[1:-1] != value.shape[1:-1]:
        return _refuse(f"key has shape {key.shape} and value {value.shape}")
    if len(key.shape) == 3 and key.shape[2] > _WIDEST_ROW:
        return _refuse(f"key has rows of {key.shape[2]} values; at most {_WIDEST_ROW} are allowed")
    if len(key.shape) == 5 and key.shape[4] != 16:
        return _refuse(f"key has shape {key.shape}; its last dim must be 16")
    queries = call.actual_seq_lengths
    batches = queries.size if call.is_packed and queries else query_dims(call).batch
    if call.is_packed and lengths.size != batches:
        return _refuse(f"actual_seq_lengths_kv has {lengths.size} values and there are {batches}")
    if len(table.shape) != 2 or table.shape[0] != batches or 0 in table.shape:
        return _refuse(f"block_table has shape {table.shape}; it must be ({batches}, ...)")
    needed = _blocks(call, batches)
    if needed and max(needed) > table.shape[1]:
        return _refuse(f"block_table has shape {table.shape}; {max(needed)} blocks are needed")
    if sum(needed) > cache.batch:
        return _refuse(f"key has {cache.batch} blocks; {sum(needed)} are needed")
    return None


def _blocks(call: AttentionCall, batches: int) -> list[int]:
    lengths = call.actual_seq_lengths_kv
    if lengths is None or lengths.values is None:
        return []
    return [-(-(lengths.of(batch) or 0) // call.block_size) for batch in range(batches)]


def _most_keys(call: AttentionCall) -> int | None:
    """How many keys a mask and a shift must cover."""
    prefix = call.actual_shared_prefix_len
    prefix_length = 0
    if call.key_shared_prefix is not None:
        prefix_length = key_dims(call, call.key_shared_prefix).seq
        if prefix is not None and prefix.values:
            prefix_length = prefix.values[0]
    if call.is_paged:
        blocks = _blocks(call, query_dims(call).batch)
        return max(blocks) * call.block_size + prefix_length if blocks else None
    return max(key_dims(call, key).seq for key in call.key) + prefix_length


def _check_mask(call: AttentionCall) -> Refusal | None:
    mask, mode = call.atten_mask, call.sparse_mode
    if not 0 <= mode <= 4:
        return _refuse(f"sparse_mode is {mode}; 0 to 4 is allowed")
    if call.is_packed and mode not in (0, 3, 4):
        return _refuse(f"sparse_mode is {mode}; {call.input_layout} allows 0, 3 or 4")
    if mask is None or 0 in mask.shape:
        return None if mode == 0 else _refuse(f"sparse_mode is {mode} and atten_mask is not given")
    if call.is_packed and mode == 0:
        return _refuse(f"sparse_mode is 0 and {call.input_layout} takes no atten_mask")
    if len(mask.shape) not in (2, 3, 4):
        return _refuse(f"atten_mask has {len(mask.shape)} dims; 2, 3 or 4 are allowed")
    if mode >= 2:
        if mask.shape[-2:] != (MASK_SIZE, MASK_SIZE) or set(mask.shape[:-2]) - {1}:
            return _refuse(
                f"sparse_mode is {mode} and atten_mask has shape {mask.shape}; it must be "
                f"({MASK_SIZE}, {MASK_SIZE}), after dims of 1"
            )
        return None
    query, keys = query_dims(call), _most_keys(call)
    batches = mask.shape[0] if len(mask.shape) > 2 else 1
    rows, columns = mask.shape[-2:]
    if batches not in (1, query.batch) or rows < query.seq or (keys and columns < keys):
        return _refuse(
            f"atten_mask has shape {mask.shape}; it must cover {query.seq} queries and {keys} "
            f"keys of 1 or {query.batch} batches"
        )
    return None


def _check_shift(call: AttentionCall) -> Refusal | None:
    shift = call.pse_shift
    if shift is None or 0 in shift.shape:
        return None
    query, keys = query_dims(call), _most_keys(call)
    if shift.dtype != call.query.dtype:
        return _refuse(f"pse_shift is {shift.dtype} and query {call.query.dtype}")
    if (
        len(shift.shape) != 4
        or shift.shape[0] not in (1, query.batch)
        or shift.shape[1] != query.heads
        or shift.shape[2] < query.seq
        or (keys and shift.shape[3] < keys)
    ):
        return _refuse(
            f"pse_shift has shape {shift.shape}; it must be (1 or {query.batch}, {query.heads}, "
            f">= {query.seq}, >= {keys})"
        )
    return None


def _check_tokens(call: AttentionCall) -> Refusal | None:
    """pre_tokens and next_tokens, where they count."""
    before, after, mode = call.pre_tokens, call.next_tokens, call.sparse_mode
    if mode not in (0, 4) or call.atten_mask is None or (mode == 0 and _is_padded(call)):
        return None
    text = f"pre_tokens is {before} and next_tokens {after}"
    if (before < 0 and after < 0) or -after > before:
        return _refuse(f"{text}; no key would be left")
    query = query_dims(call)
    batches = range(0 if call.is_packed else query.batch)
    for batch in batches:
        queries, keys = query.seq, max(_keys_of(call, batch), 0)
        if call.actual_seq_lengths is not None:
            queries = call.actual_seq_lengths.of(batch) or 0
        if call.actual_seq_lengths_kv is not None:
            keys = call.actual_seq_lengths_kv.of(batch) or 0
        most_after, most_before = (queries, keys) if mode == 0 else (keys, queries)
        if (after < 0 and -after >= most_after) or (before < 0 and -before >= most_before):
            return _refuse(f"{text}, with {queries} queries and {keys} keys")
    return None


def _check_causal(call: AttentionCall) -> Refusal | None:
    """TND with sparse_mode 3: not more queries than keys."""
    queries, keys = call.actual_seq_lengths, call.actual_seq_lengths_kv
    if not (call.is_packed and call.sparse_mode == 3 and queries and keys):
        return None
    if queries.values is None or keys.values is None:
        return None
    counts = [b - a for a, b in pairwise((0, *queries.values))]
    others = keys.values if call.is_paged else [b - a for a, b in pairwise((0, *keys.values))]
    for batch, (count, other) in enumerate(zip(counts, others, strict=True)):
        if count > other:
            return _refuse(
                f"sparse_mode is 3 and sequence {batch} has {count} queries and {other} keys"
            )
    return None


def _check_quant(call: AttentionCall) -> Refusal | None:
    """The scale and offset of an int8 result."""
    scale, offset = call.quant_scale2, call.quant_offset2
    if call.out_dtype != "int8":
        return None
    if scale is None:
        return _refuse("attention_out is int8 and quant_scale2 is not given")
    for name in ("dequant_scale1", "quant_scale1", "dequant_scale2"):
        if getattr(call, name) is not None:
            return _refuse(f"{name} is given and query is {call.query.dtype}")
    query = query_dims(call)
    width = query.heads * query.head
    if scale.dtype not in ("float32", call.query.dtype):
        return _refuse(f"quant_scale2 is {scale.dtype} and query {call.query.dtype}")
    sizes = {"quant_scale2": scale, "quant_offset2": offset}
    for name, tensor in sizes.items():
        if tensor is not None and _count(tensor) not in (1, width):
            return _refuse(f"{name} has shape {tensor.shape}; it must have 1 or {width} values")
    if offset is not None and (offset.dtype != scale.dtype or _count(offset) != _count(scale)):
        return _refuse(f"quant_scale2 is {scale} and quant_offset2 {offset}")
    if _count(scale) > 1 and (_is_padded(call) or call.softmax_lse_flag or query.head % 32):
        return _refuse("quant_scale2 is per-channel; not with padding, softmax_lse or such a D")
    if call.sparse_mode == 4 and min(call.pre_tokens, call.next_tokens) < 0:
        return _refuse("attention_out is int8; pre_tokens and next_tokens cannot be negative")
    return None


def _count(tensor: TensorDesc) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _check_prefix(call: AttentionCall) -> Refusal | None:
    key, value, length = (
        call.key_shared_prefix,
        call.value_shared_prefix,
        call.actual_shared_prefix_len,
    )
    if key is None and value is None:
        return None
    if key is None or value is None:
        return _refuse("only one of key_shared_prefix and value_shared_prefix is given")
    if call.is_paged or _is_padded(call):
        return _refuse("key_shared_prefix is given; not with block_table or padding")
    if len(key.shape) != len(call.key[0].shape) or key.shape != value.shape or 0 in key.shape:
        return _refuse(f"key_shared_prefix has shape {key.shape} and the other {value.shape}")
    own, dims = key_dims(call, call.key[0]), key_dims(call, key)
    if dims._replace(batch=own.batch, seq=own.seq) != own or dims.batch != 1:
        return _refuse(f"key_shared_prefix has shape {key.shape} and key {call.key[0].shape}")
    if length is not None and length.size:
        if length.size != 1:
            return _refuse(f"actual_shared_prefix_len has {length.size} values; 1 is allowed")
        if length.values and not 0 <= length.values[0] <= dims.seq:
            return _refuse(f"actual_shared_prefix_len is {length.values[0]}; 0 to {dims.seq}")
    return None


def check_list_and_prefix(call: AttentionCall) -> Refusal | None:
    """What IncreFlashAttention checks in the same way."""
    return _check_list(call) or _check_prefix(call)


_CHECKS: tuple[Callable[[AttentionCall], Refusal | None], ...] = (
    _check_layout,
    _check_list,
    _check_padding,
    _check_heads,
    _check_prefix,
    _check_packed,
    _check_lengths,
    _check_paged,
    _check_mask,
    _check_shift,
    _check_tokens,
    _check_quant,
    check_prompt_antiquant,
    _check_causal,
)


def check_prompt(call: AttentionCall) -> Refusal | None:
    """Why a call is refused; None if it is accepted. `check_out` came before."""
    for check in _CHECKS:
        refusal = check(call)
        if refusal is not None:
            return refusal
    return None
