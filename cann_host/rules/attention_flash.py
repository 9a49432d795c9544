"""FlashAttentionScore, the attention of training.

Source: hicann/ops-transformer attention/flash_attention_score/op_host: the definition,
flash_attention_score_tiling_general.cpp, and op_api for an eager call.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from .attention import MASK_SIZE, Dims, Lengths, dims_of
from .descriptors import TensorDesc
from .products import A2, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "FLASH_WIDTH",
    "FlashCall",
    "check_flash",
    "flash_dims",
    "flash_keys",
    "flash_out_shape",
    "flash_softmax_shape",
]

FLASH_WIDTH = 8  # each value of softmax_max and softmax_sum is stored so many times
_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
_DTYPES = ("float16", "bfloat16", "float32")
_WIDEST_HEAD = 768
_SHIFT_BY_HEAD = 1024  # rows of a shift that a kernel shares between the queries


class FlashCall(NamedTuple):
    """A call, with the names of the graph operator.

    Attributes:
        soc: name of the chip.
        prefix: lengths of the prefixes of sparse_mode 5 and 6.
        pse_type: what is done with real_shift: 0 adds it to the scaled scores, 1 before.
        attention_out, softmax: of an eager call; None in a graph, which derives them.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    query: TensorDesc
    key: TensorDesc
    value: TensorDesc
    real_shift: TensorDesc | None = None
    drop_mask: TensorDesc | None = None
    padding_mask: TensorDesc | None = None
    atten_mask: TensorDesc | None = None
    sink: TensorDesc | None = None
    query_rope: TensorDesc | None = None
    key_rope: TensorDesc | None = None
    prefix: Lengths | None = None
    actual_seq_qlen: Lengths | None = None
    actual_seq_kvlen: Lengths | None = None
    q_start_idx: Lengths | None = None
    kv_start_idx: Lengths | None = None
    keep_prob: float = 1.0
    pre_tockens: int = 2147483647
    next_tockens: int = 2147483647
    head_num: int = 1
    input_layout: str = "BSH"
    inner_precise: int = 0
    sparse_mode: int = 0
    pse_type: int = 1
    softmax_layout: str = ""
    attention_out: TensorDesc | None = None
    softmax_max: TensorDesc | None = None
    softmax_sum: TensorDesc | None = None
    is_graph: bool = False

    @property
    def is_packed(self) -> bool:
        return self.input_layout == "TND"


def flash_dims(call: FlashCall) -> Dims:
    """Sizes of the query."""
    return dims_of(call.input_layout, call.query.shape, call.head_num)


def flash_keys(call: FlashCall, tensor: TensorDesc) -> Dims:
    """Sizes of the key or value. With the axis H, the key's has the query's head dim."""
    layout, head = call.input_layout, flash_dims(call).head
    heads = call.key.shape[2] // head if "H" in layout and head else 0
    return dims_of(layout, tensor.shape, heads or 1)


def flash_out_shape(call: FlashCall) -> tuple[int, ...]:
    query, value = flash_dims(call), flash_keys(call, call.value).head
    sizes = {"B": query.batch, "N": query.heads, "S": query.seq, "T": query.seq, "D": value}
    sizes["H"] = query.heads * value
    return tuple(sizes[axis] for axis in call.input_layout)


def flash_softmax_shape(call: FlashCall) -> tuple[int, ...]:
    query = flash_dims(call)
    if call.is_packed:
        return query.seq, query.heads, FLASH_WIDTH
    return query.batch, query.heads, query.seq, FLASH_WIDTH


def _check_inputs(call: FlashCall) -> Refusal | None:
    wrong = NO_KERNEL if call.is_graph else INVALID
    query, key, value = call.query, call.key, call.value
    if query.dtype not in _DTYPES:
        return Refusal(f"query is {query.dtype}; {call.soc} allows {one_of(_DTYPES)}", wrong)
    if not query.dtype == key.dtype == value.dtype:
        return Refusal(f"query is {query.dtype}, key {key.dtype} and value {value.dtype}", wrong)
    shift = call.real_shift
    if shift is not None and call.pse_type in (0, 1) and shift.dtype != query.dtype:
        return Refusal(f"real_shift is {shift.dtype} and query {query.dtype}", wrong)
    code = TILING if call.is_graph else INVALID
    if call.head_num <= 0:
        return Refusal(f"head_num is {call.head_num}; it must be positive", code)
    rank = len(call.input_layout)
    if call.input_layout not in _LAYOUTS or any(len(t.shape) != rank for t in (query, key, value)):
        return Refusal(
            f"input_layout is {call.input_layout}, and query, key and value have "
            f"{len(query.shape)}, {len(key.shape)} and {len(value.shape)} dims; one of "
            f"{', '.join(_LAYOUTS)} is allowed",
            code,
        )
    dims, keys, values = flash_dims(call), flash_keys(call, key), flash_keys(call, value)
    if dims.head != keys.head or keys.head < values.head:
        return Refusal(
            f"query, key and value have the head dims {dims.head}, {keys.head} and {values.head}; "
            "the key's is the query's, and the value's not larger",
            code,
        )
    if dims.head > _WIDEST_HEAD:
        return Refusal(
            f"query has a head dim of {dims.head}; at most {_WIDEST_HEAD} is allowed", code
        )
    return None


def _check_unsupported(call: FlashCall) -> Refusal | None:
    """What CANN takes and cann_host does not compute."""
    if soc_family(call.soc) != A2:
        return Refusal(f"cann_host has no rules of FlashAttentionScore for {call.soc}", None)
    if call.query_rope is not None or call.key_rope is not None:
        return Refusal("cann_host does not compute attention with query_rope (MLA)", None)
    if call.drop_mask is not None or 0 < call.keep_prob < 1:
        return Refusal(f"keep_prob is {call.keep_prob}; cann_host computes no dropout", None)
    if call.atten_mask is not None and 5 <= call.sparse_mode <= 8:
        return Refusal(f"cann_host does not compute sparse_mode {call.sparse_mode}", None)
    if call.real_shift is not None and call.pse_type in (2, 3):
        return Refusal(f"cann_host does not compute pse_type {call.pse_type}", None)
    shift = call.real_shift
    if shift is not None and (
        call.is_packed or (len(shift.shape) == 4 and shift.shape[2] == _SHIFT_BY_HEAD)
    ):
        return Refusal(f"cann_host does not compute real_shift of shape {shift.shape}", None)
    return None


def _check_heads(call: FlashCall) -> Refusal | None:
    query, key, value = flash_dims(call), *(flash_keys(call, t) for t in (call.key, call.value))
    if not 0 < call.keep_prob <= 1:
        return Refusal(f"keep_prob is {call.keep_prob}; above 0, at most 1 is allowed", TILING)
    if not 0 <= call.sparse_mode <= 8 or not 0 <= call.pse_type <= 3:
        return Refusal(
            f"sparse_mode is {call.sparse_mode} and pse_type {call.pse_type}; 0 to 8 and 0 to 3 "
            "are allowed",
            TILING,
        )
    if "H" in call.input_layout and call.query.shape[2] % call.head_num:
        return Refusal(
            f"query has rows of {call.query.shape[2]} and head_num is {call.head_num}", TILING
        )
    if query.heads != call.head_num:
        return Refusal(f"query has {query.heads} heads and head_num is {call.head_num}", TILING)
    if key.heads and query.heads % key.heads:
        return Refusal(f"query has {query.heads} heads and key {key.heads}; not a multiple", TILING)
    if "H" in call.input_layout and query.head and call.key.shape[2] % query.head:
        return Refusal(f"key has shape {call.key.shape} and a head dim of {query.head}", TILING)
    if "H" in call.input_layout and key.heads and call.value.shape[2] % key.heads:
        return Refusal(f"value has shape {call.value.shape} and the key {key.heads} heads", TILING)
    if query.batch != key.batch or key._replace(head=value.head) != value:
        return Refusal(
            f"query has shape {call.query.shape}, key {call.key.shape} and value "
            f"{call.value.shape}",
            TILING,
        )
    return None


def _check_lengths(call: FlashCall) -> Refusal | None:
    queries, keys = call.actual_seq_qlen, call.actual_seq_kvlen
    if not call.is_packed:
        return None
    if queries is None or keys is None or queries.size != keys.size:
        return Refusal("input_layout is TND; the lengths of both must be given, as many", TILING)
    query, key = flash_dims(call), flash_keys(call, call.key)
    for name, lengths, tokens in (
        ("actual_seq_qlen", queries, query.seq),
        ("actual_seq_kvlen", keys, key.seq),
    ):
        if lengths.values is None:
            continue
        sizes = [max(0, b - a) for a, b in pairwise((0, *lengths.values))]
        if sum(sizes) > tokens:
            return Refusal(f"{name} is {lengths.values}; the tensor has {tokens} tokens", TILING)
        if lengths.values[0] < 0 or any(b < a for a, b in pairwise(lengths.values)):
            # the kernel takes such a sequence for empty
            return Refusal(f"cann_host computes no decreasing {name}: {lengths.values}", None)
    return None


def _longest(lengths: Lengths | None) -> int | None:
    if lengths is None or lengths.values is None:
        return None
    return max((b - a for a, b in pairwise((0, *lengths.values))), default=0)


def _check_mask(call: FlashCall) -> Refusal | None:
    mask = call.atten_mask
    if mask is None or not mask.shape:
        return None
    if mask.dtype not in ("bool", "uint8"):
        return Refusal(f"atten_mask is {mask.dtype}; bool or uint8 is allowed", TILING)
    query, key = flash_dims(call), flash_keys(call, call.key)
    if call.sparse_mode in (2, 3, 4):
        if mask.shape[-2:] != (MASK_SIZE, MASK_SIZE) or set(mask.shape[:-2]) - {1}:
            return Refusal(
                f"sparse_mode is {call.sparse_mode} and atten_mask has shape {mask.shape}; it must "
                f"be ({MASK_SIZE}, {MASK_SIZE})",
                TILING,
            )
        return None
    rows: int | None = query.seq
    columns: int | None = key.seq
    if call.is_packed:
        rows, columns = _longest(call.actual_seq_qlen), _longest(call.actual_seq_kvlen)
        if mask.shape == (query.seq, key.seq) != (rows, columns):
            return Refusal("cann_host does not compute a mask of all tokens", None)
    outer = ((), (1, 1), (query.batch, 1), (query.batch, query.heads))
    if len(mask.shape) not in (2, 4) or mask.shape[:-2] not in outer:
        allowed = one_of(str((*sizes, rows, columns)) for sizes in outer)
        return Refusal(f"atten_mask has shape {mask.shape}; {allowed} is allowed", TILING)
    if rows is not None and mask.shape[-2:] != (rows, columns):
        return Refusal(
            f"atten_mask has shape {mask.shape}; its last dims must be {(rows, columns)}", TILING
        )
    return None


def _check_shift(call: FlashCall) -> Refusal | None:
    shift = call.real_shift
    if shift is None or not shift.shape:
        return None
    query, key = flash_dims(call), flash_keys(call, call.key)
    if (
        len(shift.shape) != 4
        or shift.shape[0] not in (1, query.batch)
        or shift.shape[1] != query.heads
        or shift.shape[2] not in (1, query.seq)
        or shift.shape[3] != key.seq
    ):
        return Refusal(
            f"real_shift has shape {shift.shape}; it must be (1 or {query.batch}, {query.heads}, 1 "
            f"or {query.seq}, {key.seq})",
            TILING,
        )
    return None


def _check_tokens(call: FlashCall) -> Refusal | None:
    """pre_tockens and next_tockens of sparse_mode 0 and 4."""
    mask = call.atten_mask
    if mask is None or not mask.shape or call.is_packed or call.sparse_mode not in (0, 4):
        return None
    queries, keys = flash_dims(call).seq, flash_keys(call, call.key).seq
    before, after = call.pre_tockens, call.next_tockens
    if call.sparse_mode == 4:
        before, after = before + queries - keys, after + keys - queries
    bad = before < 0 and after < 0
    bad = bad or (before < 0 <= after and not (after >= -before and -before < keys))
    bad = bad or (after < 0 <= before and not (-after <= before and -after < queries))
    if bad:
        return Refusal(
            f"pre_tockens is {call.pre_tockens} and next_tockens {call.next_tockens}, with "
            f"{queries} queries and {keys} keys: no key would be left",
            TILING,
        )
    return None


def _check_outputs(call: FlashCall) -> Refusal | None:
    """The results of an eager call, which CANN copies its own into."""
    out = call.attention_out
    if out is None:
        return None
    expected = flash_out_shape(call)
    if out.shape != expected or out.dtype != call.query.dtype:
        return Refusal(f"attention_out is {out}; it must be {call.query.dtype} {expected}", INVALID)
    expected = flash_softmax_shape(call)
    for name, tensor in (("softmax_max", call.softmax_max), ("softmax_sum", call.softmax_sum)):
        if tensor is not None and (tensor.shape != expected or tensor.dtype != "float32"):
            return Refusal(f"{name} is {tensor}; it must be float32 {expected}", INVALID)
    return None


_CHECKS: tuple[Callable[[FlashCall], Refusal | None], ...] = (
    _check_inputs,
    _check_unsupported,
    _check_heads,
    _check_lengths,
    _check_mask,
    _check_shift,
    _check_tokens,
    _check_outputs,
)


def check_flash(call: FlashCall) -> Refusal | None:
    """Why a call is refused; None if it is accepted."""
    for check in _CHECKS:
        refusal = check(call)
        if refusal is not None:
            return refusal
    return None
