"""IncreFlashAttention, and FusedInferAttentionScore of one query token for each sequence.

Source: hicann/ops-transformer attention/incre_flash_attention/op_host,
incre_flash_attention_tiling.cpp and incre_flash_attention_tiling_check.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import MASK_SIZE, AttentionCall, key_dims, query_dims
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
        return _refuse(f"query has a head dim of {query.head} and key of {key.head}")
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


def _most_keys(call: AttentionCall) -> int:
    """How many keys a shift, a mask or scales per token must cover."""
    if call.block_table is not None:
        return call.block_table.shape[1] * call.block_size
    return max(key_dims(call, key).seq for key in call.key)


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
    if longest > _most_keys(call):
        return _refuse(
            f"actual_seq_lengths_kv has {longest}; the table has {_most_keys(call)} keys"
        )
    return None


def _check_shift(call: AttentionCall) -> Refusal | None:
    shift, query = call.pse_shift, query_dims(call)
    if shift is None:
        return None
    if shift.dtype != call.query.dtype:
        return _refuse(f"pse_shift is {shift.dtype} and query {call.query.dtype}")
    keys = _most_keys(call)
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
    if mask.shape[0] != batches:
        return _refuse(f"atten_mask has shape {mask.shape}; its first dim must be {batches}")
    needed = _most_keys(call)
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
        if tensor.shape not in allowed:
            return _refuse(f"{name} has shape {tensor.shape}; {allowed[-2]} is allowed")
    return None


def _allowed_scales(call: AttentionCall, mode: int, parts: int) -> Callable[[TensorDesc], bool]:
    """Whether a scale or offset has a shape that the mode takes.

    Args:
        call: the call.
        mode: of key and value, or antiquant_mode.
        parts: 2 if key and value have one tensor, else 1.
    """
    dims, batches = key_dims(call, call.key[0]), query_dims(call).batch
    heads, head, width = dims.heads, dims.head, dims.heads * dims.head
    keys = _most_keys(call)

    def allows(tensor: TensorDesc) -> bool:
        shape = tensor.shape
        if mode == 2:
            return shape == (heads,)
        if mode == 3:
            return len(shape) == 3 and shape[:2] == (batches, heads) and shape[2] >= keys
        if mode == 4:
            return shape == (dims.batch, call.block_size)
        if mode == 5:
            return shape == (dims.batch, heads, call.block_size)
        if mode == 1:
            if len(shape) == 2 and parts == 1:
                return shape[0] == batches and shape[1] >= keys
            return len(shape) == 3 and shape[:2] == (parts, batches) and shape[2] >= keys
        return shape in (
            (parts,),
            (parts, heads, 1, head),
            (parts, 1, heads, head),
            (parts, heads, head),
            (parts, width),
        )

    return allows


def _check_antiquant(call: AttentionCall) -> Refusal | None:
    names = ("antiquant", "key_antiquant", "value_antiquant")
    scales = {name: getattr(call, f"{name}_scale") for name in names}
    offsets = {name: getattr(call, f"{name}_offset") for name in names}
    if call.key[0].dtype != "int8":
        given = [f"{n}_scale" for n in names if scales[n]] + [
            f"{n}_offset" for n in names if offsets[n]
        ]
        if given:
            return _refuse(f"{given[0]} is given and key is {call.key[0].dtype}")
        return None
    key, value = (scales[n] for n in names[1:])
    if (key is None) != (value is None) or (offsets[names[1]] is None) != (
        offsets[names[2]] is None
    ):
        return _refuse("only one of key and value has a scale or an offset of its own")
    if key is None and offsets[names[1]] is not None:
        return _refuse("key_antiquant_offset is given and key_antiquant_scale is not")
    if key is None:
        if call.antiquant_mode not in (0, 1):
            return _refuse(f"antiquant_mode is {call.antiquant_mode}; 0 or 1 is allowed")
        if scales["antiquant"] is None:
            return _refuse("key is int8 and antiquant_scale is not given")
        return _check_scale(call, "antiquant", call.antiquant_mode, 2)
    modes = call.key_antiquant_mode, call.value_antiquant_mode
    if modes[0] != modes[1] and modes != (0, 1):
        return _refuse(f"key_antiquant_mode is {modes[0]} and value_antiquant_mode {modes[1]}")
    if not 0 <= modes[0] <= 5:
        return _refuse(f"key_antiquant_mode is {modes[0]}; 0 to 5 is allowed")
    if modes[0] in (4, 5) and not call.is_paged:
        return _refuse(f"key_antiquant_mode is {modes[0]} and block_table is not given")
    return _check_scale(call, "key_antiquant", modes[0], 1) or _check_scale(
        call, "value_antiquant", modes[1], 1
    )


def _check_scale(call: AttentionCall, name: str, mode: int, parts: int) -> Refusal | None:
    scale: TensorDesc = getattr(call, f"{name}_scale")
    offset: TensorDesc | None = getattr(call, f"{name}_offset")
    allows = _allowed_scales(call, mode, parts)
    for what, tensor in (("scale", scale), ("offset", offset)):
        if tensor is not None and not allows(tensor):
            return _refuse(f"{name}_{what} has shape {tensor.shape}; not one of mode {mode}")
    dtype = "float32" if mode in (1, 3, 4, 5) else call.query.dtype
    if scale.dtype != dtype:
        return _refuse(f"{name}_scale is {scale.dtype}; mode {mode} takes {dtype}")
    if offset is not None and offset.dtype != scale.dtype:
        return _refuse(f"{name}_offset is {offset.dtype} and {name}_scale {scale.dtype}")
    return None


_CHECKS: tuple[Callable[[AttentionCall], Refusal | None], ...] = (
    check_list_and_prefix,
    _check_heads,
    _check_lengths,
    _check_paged,
    _check_shift,
    _check_mask,
    _check_quant,
    _check_antiquant,
)


def check_incre(call: AttentionCall) -> Refusal | None:
    """Why a call is refused; None if it is accepted. `check_out` came before."""
    for check in _CHECKS:
        refusal = check(call)
        if refusal is not None:
            return refusal
    if call.is_paged and call.input_layout == "BSH" and call.pre_tokens < 2147483647:
        # the kernel then reads only the last pre_tokens keys
        return Refusal(
            f"pre_tokens is {call.pre_tokens}; cann_host computes a paged decode step over all "
            "keys (2147483647)",
            None,
        )
    return None
