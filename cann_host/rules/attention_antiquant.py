"""The scales and offsets of an int8 key and value.

Source: hicann/ops-transformer attention/prompt_flash_attention/op_host/
prompt_flash_attention_tiling.cpp and attention/incre_flash_attention/op_host/
incre_flash_attention_tiling.cpp, incre_flash_attention_tiling_check.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import AttentionCall, key_dims, query_dims
from .descriptors import TensorDesc
from .refusal import TILING, Refusal

__all__ = ["check_incre_antiquant", "check_prompt_antiquant", "few_tokens", "most_keys"]

_FEW_TOKENS = 16
_SEPARATE = ("key_antiquant", "value_antiquant")


def _refuse(text: str) -> Refusal:
    return Refusal(text, TILING)


def few_tokens(call: AttentionCall) -> bool:
    """Whether a kernel never stores the dequantized key and value: separate scales need it."""
    return query_dims(call).seq <= _FEW_TOKENS


# ---- many query tokens ----


def check_prompt_antiquant(call: AttentionCall) -> Refusal | None:
    """Why the scales of PromptFlashAttention are refused; None if they are accepted."""
    separate = [n for n in _SEPARATE if getattr(call, f"{n}_scale") is not None]
    if call.key[0].dtype != "int8":
        if separate:
            return _refuse(f"{separate[0]}_scale is given and key is {call.key[0].dtype}")
        return None
    if separate:
        return _check_separate(call) if few_tokens(call) else _check_paged(call)
    if call.query.dtype == "bfloat16":
        return _refuse("key is int8 and key_antiquant_scale or value_antiquant_scale is not given")
    if call.antiquant_scale is None:
        return _refuse("key is int8 and antiquant_scale is not given")
    if call.is_paged:
        return _refuse("block_table is given; the antiquantization must be separate")
    return _check_shapes(call, ("antiquant",), ((2,), _channels(call, 2)))


def _channels(call: AttentionCall, parts: int) -> tuple[int, ...]:
    """Shape of a number for each channel, in the layout of the query."""
    dims = key_dims(call, call.key[0])
    shapes = {"BSH": (parts, dims.heads * dims.head), "BSND": (parts, dims.heads, dims.head)}
    return shapes.get(call.input_layout, (parts, dims.heads, 1, dims.head))


def _check_shapes(
    call: AttentionCall, names: tuple[str, ...], allowed: tuple[tuple[int, ...], ...]
) -> Refusal | None:
    for name in names:
        for what in ("scale", "offset"):
            tensor: TensorDesc | None = getattr(call, f"{name}_{what}")
            if tensor is not None and tensor.shape not in allowed:
                shapes = " or ".join(map(str, allowed))
                return _refuse(f"{name}_{what} has shape {tensor.shape}; {shapes} is allowed")
    return None


def _check_pairs(call: AttentionCall) -> Refusal | None:
    for what, needed in (("scale", True), ("offset", False)):
        given = [getattr(call, f"{name}_{what}") is not None for name in _SEPARATE]
        if given[0] != given[1] or (needed and not given[0]):
            return _refuse(f"only one of key and value has a {what} of its own")
    return None


def _check_separate(call: AttentionCall) -> Refusal | None:
    mode, other = call.key_antiquant_mode, call.value_antiquant_mode
    if mode != other or mode not in (0, 1):
        return _refuse(f"key_antiquant_mode is {mode} and value_antiquant_mode {other}; 0 or 1")
    padded = call.query_padding_size is not None or call.kv_padding_size is not None
    if call.is_list or padded:
        return _refuse("key_antiquant_scale is given; not with lists of tensors or padding")
    if call.is_paged:
        return Refusal("cann_host does not compute separate scales of few paged queries", None)
    refusal = _check_pairs(call)
    if refusal is not None:
        return refusal
    dims = key_dims(call, call.key[0])
    heads, head = dims.heads, dims.head
    channels = ((heads, head), (heads, 1, head), (heads * head,))
    return _check_shapes(call, _SEPARATE, channels if mode == 0 else ((dims.batch, dims.seq),))


def _check_paged(call: AttentionCall) -> Refusal | None:
    """More than a few query tokens: only a paged cache of float16 queries."""
    if not call.is_paged or call.query.dtype != "float16":
        return _refuse(
            f"key_antiquant_scale is given and query has {query_dims(call).seq} tokens; at most "
            f"{_FEW_TOKENS} are allowed"
        )
    if call.input_layout not in ("BSH", "BSND") or call.inner_precise != 1:
        return _refuse("an int8 paged cache takes BSH or BSND, and inner_precise 1")
    if call.sparse_mode != 3 or call.atten_mask is None or call.pse_shift is not None:
        return _refuse("an int8 paged cache takes sparse_mode 3 with its mask, and no pse_shift")
    if call.key_antiquant_mode or call.value_antiquant_mode:
        return _refuse("an int8 paged cache takes key_antiquant_mode and value_antiquant_mode 0")
    return _check_pairs(call) or _check_shapes(call, _SEPARATE, (_channels(call, 1),))


# ---- one query token ----


def most_keys(call: AttentionCall) -> int:
    """How many keys a shift, a mask or scales per token must cover."""
    if call.block_table is not None:
        return call.block_table.shape[1] * call.block_size
    return max(key_dims(call, key).seq for key in call.key)


def _allowed_scales(call: AttentionCall, mode: int, parts: int) -> Callable[[TensorDesc], bool]:
    """Whether a scale or offset has a shape that the mode takes.

    Args:
        call: the call.
        mode: of key and value, or antiquant_mode.
        parts: 2 if key and value have one tensor, else 1.
    """
    dims, batches = key_dims(call, call.key[0]), query_dims(call).batch
    heads, head, width = dims.heads, dims.head, dims.heads * dims.head
    keys = most_keys(call)

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


def check_incre_antiquant(call: AttentionCall) -> Refusal | None:
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
