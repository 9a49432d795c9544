"""What the inference attentions have in common: layouts, dtypes, the record of a call.

FusedInferAttentionScore sends a call to the rules of PromptFlashAttention or, for one query token
of a sequence, to those of IncreFlashAttention.

Source: hicann/ops-transformer attention/fused_infer_attention_score/op_host,
fused_infer_attention_score_def.cpp and fused_infer_attention_score_tiling.cpp.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "FUSED",
    "INCRE",
    "LAYOUTS",
    "MASK_SIZE",
    "PROMPT",
    "AttentionCall",
    "Dims",
    "Layout",
    "Lengths",
    "check_attention_dtypes",
    "check_out",
    "check_unsupported",
    "dims_of",
    "key_dims",
    "kind_of",
    "lse_shape",
    "out_shape",
    "query_dims",
    "value_head",
]

FUSED, PROMPT, INCRE = "FusedInferAttentionScore", "PromptFlashAttention", "IncreFlashAttention"
MASK_SIZE = 2048  # rows and columns of the mask that sparse_mode 2, 3 and 4 read


class Layout(NamedTuple):
    """The order of the axes: B batch, S sequence, N heads, D head dim, H = N * D, T tokens."""

    query: str
    out: str


# input_layout: the axes of query, key and value, and those of the result. With a block table the
# key and the value have a layout of their own.
LAYOUTS: dict[str, Layout] = {
    "BSH": Layout("BSH", "BSH"),
    "BSND": Layout("BSND", "BSND"),
    "BNSD": Layout("BNSD", "BNSD"),
    "NSD": Layout("NSD", "NSD"),
    "TND": Layout("TND", "TND"),
    "BNSD_BSND": Layout("BNSD", "BSND"),
    "NTD_TND": Layout("NTD", "TND"),
    "TND_NTD": Layout("TND", "NTD"),
    "BSH_NBSD": Layout("BSH", "NBSD"),
    "BSND_NBSD": Layout("BSND", "NBSD"),
    "BNSD_NBSD": Layout("BNSD", "NBSD"),
}

# dtypes of the query, of key and value, and of the result
_DTYPES = {
    ("float16", "float16", "float16"),
    ("float16", "float16", "int8"),
    ("float16", "int8", "float16"),
    ("float16", "int8", "int8"),
    ("float16", "int4", "float16"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "int8"),
    ("bfloat16", "int8", "bfloat16"),
    ("bfloat16", "int8", "int8"),
    ("bfloat16", "int4", "bfloat16"),
    ("int8", "int8", "float16"),
    ("int8", "int8", "bfloat16"),
    ("int8", "int8", "int8"),
}
_FLOATS = ("float16", "bfloat16", "float32")
# other inputs: their dtypes
_OTHER_DTYPES = {
    "pse_shift": ("float16", "bfloat16"),
    "atten_mask": ("bool", "int8", "uint8"),
    "quant_scale2": _FLOATS,
    "quant_offset2": _FLOATS,
    "antiquant_scale": _FLOATS,
    "antiquant_offset": _FLOATS,
    "key_antiquant_scale": _FLOATS,
    "key_antiquant_offset": _FLOATS,
    "value_antiquant_scale": _FLOATS,
    "value_antiquant_offset": _FLOATS,
    "block_table": ("int32",),
    "query_padding_size": ("int64",),
    "kv_padding_size": ("int64",),
    "learnable_sink": ("bfloat16",),
}
_FLOAT_MASK = ("float16", PROMPT, "float16")  # dtype, operator and query: a mask that CANN takes


class Lengths(NamedTuple):
    """Actual sequence lengths.

    Attributes:
        size: how many.
        values: None while a graph is compiled that gets them when it runs.
    """

    size: int
    values: tuple[int, ...] | None

    def of(self, batch: int) -> int | None:
        """The length of a batch; one length is every batch's."""
        if self.values is None:
            return None
        return self.values[batch if self.size > 1 else 0]


class AttentionCall(NamedTuple):
    """A call, with the names of the graph operator FusedInferAttentionScore.

    Attributes:
        soc: name of the chip.
        kind: FUSED, PROMPT or INCRE: the operator that is called.
        num_key_value_heads: 0 for as many as num_heads.
        attention_out, softmax_lse: of an eager call; None in a graph, which derives them.
        out_dtype: of the result.
        is_graph: whether it is the graph's operator: then no kernel is found for a dtype that its
            definition does not have.
    """

    soc: str
    kind: str
    query: TensorDesc
    key: tuple[TensorDesc, ...]
    value: tuple[TensorDesc, ...]
    pse_shift: TensorDesc | None = None
    atten_mask: TensorDesc | None = None
    actual_seq_lengths: Lengths | None = None
    actual_seq_lengths_kv: Lengths | None = None
    dequant_scale1: TensorDesc | None = None
    quant_scale1: TensorDesc | None = None
    dequant_scale2: TensorDesc | None = None
    quant_scale2: TensorDesc | None = None
    quant_offset2: TensorDesc | None = None
    antiquant_scale: TensorDesc | None = None
    antiquant_offset: TensorDesc | None = None
    block_table: TensorDesc | None = None
    query_padding_size: TensorDesc | None = None
    kv_padding_size: TensorDesc | None = None
    key_antiquant_scale: TensorDesc | None = None
    key_antiquant_offset: TensorDesc | None = None
    value_antiquant_scale: TensorDesc | None = None
    value_antiquant_offset: TensorDesc | None = None
    key_shared_prefix: TensorDesc | None = None
    value_shared_prefix: TensorDesc | None = None
    actual_shared_prefix_len: Lengths | None = None
    query_rope: TensorDesc | None = None
    key_rope: TensorDesc | None = None
    key_rope_antiquant_scale: TensorDesc | None = None
    dequant_scale_query: TensorDesc | None = None
    learnable_sink: TensorDesc | None = None
    num_heads: int = 1
    pre_tokens: int = 2147483647
    next_tokens: int = 2147483647
    input_layout: str = "BSH"
    num_key_value_heads: int = 0
    sparse_mode: int = 0
    inner_precise: int = 0
    block_size: int = 0
    antiquant_mode: int = 0
    softmax_lse_flag: bool = False
    key_antiquant_mode: int = 0
    value_antiquant_mode: int = 0
    query_quant_mode: int = 0
    out_dtype: str = ""
    attention_out: TensorDesc | None = None
    softmax_lse: TensorDesc | None = None
    is_graph: bool = False

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_heads

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.input_layout]

    @property
    def is_packed(self) -> bool:
        """Whether the tokens of all sequences lie in one axis; lengths are then cumulative."""
        return "T" in self.layout.query

    @property
    def is_paged(self) -> bool:
        return self.block_table is not None

    @property
    def is_list(self) -> bool:
        """Whether key and value have a tensor for each batch."""
        return len(self.key) > 1


class Dims(NamedTuple):
    """Sizes of a query, key or value. `seq` is the number of all tokens if they are in one axis."""

    batch: int
    heads: int
    seq: int
    head: int


@lru_cache(maxsize=4096)
def dims_of(axes: str, shape: tuple[int, ...], heads: int) -> Dims:
    """The sizes of a tensor.

    Args:
        axes: order of the axes.
        shape: with as many dims.
        heads: number of heads, for the axis H.
    """
    sizes = dict(zip(axes, shape, strict=True))
    if "H" in sizes:
        sizes |= {"N": heads, "D": sizes["H"] // heads}
    return Dims(sizes.get("B", 1), sizes["N"], sizes.get("S", sizes.get("T", 0)), sizes["D"])


def query_dims(call: AttentionCall) -> Dims:
    return dims_of(call.layout.query, call.query.shape, call.num_heads)


_CACHES = {3: "BSH", 4: "BNSD"}  # of a paged cache, with B the blocks


def key_dims(call: AttentionCall, tensor: TensorDesc) -> Dims:
    """The sizes of a key or value; of a paged cache, batch counts blocks and seq is their size."""
    shape = tensor.shape
    if not call.is_paged:
        return dims_of(call.layout.query, shape, call.kv_heads)
    if len(shape) == 5:
        blocks, heads, columns, rows, width = shape
        return Dims(blocks, heads, rows, columns * width)
    return dims_of(_CACHES[len(shape)], shape, call.kv_heads)


def out_shape(axes: str, query: Dims, head: int) -> tuple[int, ...]:
    """Shape of a result in the order `axes`, with the value's head dim."""
    sizes = {"B": query.batch, "N": query.heads, "S": query.seq, "T": query.seq, "D": head}
    sizes["H"] = query.heads * head
    return tuple(sizes[axis] for axis in axes)


def check_unsupported(call: AttentionCall) -> Refusal | None:
    """What CANN takes and cann_host does not compute."""
    if soc_family(call.soc) != A2:
        return Refusal(f"cann_host has no rules of {call.kind} for {call.soc}", None)
    given = [
        name
        for name in ("query_rope", "key_rope", "key_rope_antiquant_scale", "dequant_scale_query")
        if getattr(call, name) is not None
    ]
    if given:
        return Refusal(f"cann_host does not compute attention with {given[0]} (MLA)", None)
    if call.query.dtype == "int8":
        return Refusal("query is int8; cann_host computes attention of float16 and bfloat16", None)
    if "int4" in (call.key[0].dtype, call.value[0].dtype):
        return Refusal("cann_host does not compute attention with an int4 key and value", None)
    if call.key[0].dtype == "int8" and call.key_shared_prefix is not None:
        return Refusal("cann_host does not compute attention with an int8 prefix", None)
    return None


def check_attention_dtypes(call: AttentionCall) -> Refusal | None:
    """Dtypes that the definition does not have."""
    code = NO_KERNEL if call.is_graph else INVALID
    key, value = call.key[0].dtype, call.value[0].dtype
    if key != value:
        return Refusal(f"key is {key} and value {value}; they must be equal", TILING)
    given = call.query.dtype, key, call.out_dtype
    if given not in _DTYPES:
        keys = sorted({k for q, k, _ in _DTYPES if q == given[0]})
        if not keys:
            allowed = one_of(sorted({q for q, _, _ in _DTYPES}))
            return Refusal(f"query is {given[0]}; {call.soc} allows {allowed}", code)
        if key not in keys:
            return Refusal(
                f"key is {key} and query {given[0]}; {call.soc} allows {one_of(keys)}", code
            )
        outs = sorted(o for q, k, o in _DTYPES if (q, k) == given[:2])
        return Refusal(
            f"attention_out is {given[2]} and query {given[0]}; {call.soc} allows {one_of(outs)}",
            code,
        )
    for name, allowed_dtypes in _OTHER_DTYPES.items():
        tensor = getattr(call, name)
        if tensor is None or tensor.dtype in allowed_dtypes:
            continue
        if (name, tensor.dtype, call.kind, given[0]) == ("atten_mask", *_FLOAT_MASK):
            return Refusal("cann_host does not compute atten_mask of float16", None)
        wrong = TILING if name == "atten_mask" else code
        return Refusal(
            f"{name} is {tensor.dtype}; {call.soc} allows {one_of(allowed_dtypes)}", wrong
        )
    return None


def _check_ranks(call: AttentionCall) -> Refusal | None:
    layout = LAYOUTS.get(call.input_layout)
    if call.kind == PROMPT and call.input_layout == "SH":
        return Refusal("cann_host does not compute input_layout SH", None)
    if layout is None:
        return Refusal(f"input_layout is {call.input_layout}; {one_of(LAYOUTS)} is allowed", TILING)
    if call.num_heads <= 0 or call.num_key_value_heads < 0:
        return Refusal(
            f"num_heads is {call.num_heads} and num_key_value_heads {call.num_key_value_heads}",
            TILING,
        )
    if len(call.query.shape) != len(layout.query):
        return Refusal(
            f"query has {len(call.query.shape)} dims; input_layout {call.input_layout} has "
            f"{len(layout.query)}",
            TILING,
        )
    ranks = (3, 4, 5) if call.is_paged else (len(layout.query),)
    for name, tensors in (("key", call.key), ("value", call.value)):
        for tensor in tensors:
            if len(tensor.shape) not in ranks:
                return Refusal(
                    f"{name} has {len(tensor.shape)} dims; {one_of(map(str, ranks))} is allowed",
                    TILING,
                )
    if len(call.key[0].shape) != len(call.value[0].shape):
        return Refusal(f"key has shape {call.key[0].shape} and value {call.value[0].shape}", TILING)
    for name, tensors, heads in (
        ("query", (call.query,), call.num_heads),
        ("key", call.key, call.kv_heads),
        ("value", call.value, call.kv_heads),
    ):
        has_rows = "H" in layout.query if name == "query" or not call.is_paged else True
        for tensor in tensors:
            if has_rows and len(tensor.shape) == 3 and tensor.shape[2] % heads:
                return Refusal(
                    f"{name} has shape {tensor.shape} and {heads} heads; cann_host computes "
                    "multiples only",
                    None,
                )
    return None


def check_out(call: AttentionCall) -> Refusal | None:
    """Numbers of dims, the result's shape and the head dim: what comes before the two routes."""
    refusal = _check_ranks(call)
    if refusal is not None:
        return refusal
    query = query_dims(call)
    if call.attention_out is not None:
        expected = out_shape(call.layout.out, query, value_head(call))
        if call.attention_out.shape != expected:
            return Refusal(
                f"attention_out has shape {call.attention_out.shape}; it must be {expected}", TILING
            )
    if call.softmax_lse_flag and call.softmax_lse is not None:
        expected = (
            (query.seq, query.heads, 1) if call.is_packed else (*out_shape("BNS", query, 1), 1)
        )
        if call.softmax_lse.shape != expected:
            return Refusal(
                f"softmax_lse has shape {call.softmax_lse.shape}; it must be {expected}", TILING
            )
    if query.head > 512:
        return Refusal(f"query has a head dim of {query.head}; at most 512 is allowed", TILING)
    if call.input_layout == "BNSD_BSND" and query.seq == 1 and call.kind == FUSED:
        return Refusal("input_layout is BNSD_BSND and query has one token", TILING)
    if call.learnable_sink is not None:
        if call.input_layout not in ("TND", "NTD_TND") or query.head not in (64, 128):
            return Refusal(
                f"learnable_sink is given, input_layout is {call.input_layout} and the head dim "
                f"{query.head}; TND or NTD_TND and 64 or 128 is allowed",
                TILING,
            )
        if call.learnable_sink.shape != (query.heads,):
            return Refusal(
                f"learnable_sink has shape {call.learnable_sink.shape}; it must be "
                f"{(query.heads,)}",
                TILING,
            )
    return None


def kind_of(call: AttentionCall) -> str:
    """Whose rules a call gets: PROMPT or INCRE."""
    if call.kind != FUSED:
        return call.kind
    query, layout = query_dims(call), call.input_layout
    if layout in ("TND", "TND_NTD"):
        floats = [
            t is not None and t.dtype == "float32"
            for t in (call.antiquant_scale, call.antiquant_offset)
        ]
        is_antiquant = call.key[0].dtype == "int8" and call.query.dtype != "int8" and all(floats)
        return INCRE if query.head == 512 or (call.is_paged and is_antiquant) else PROMPT
    if layout not in ("BSH", "BNSD", "BSND", "BNSD_NBSD", "BSND_NBSD", "BSH_NBSD"):
        return PROMPT
    few_and_nz = 1 < query.seq <= 16 and len(call.key[0].shape) == 5
    return INCRE if query.seq == 1 or few_and_nz else PROMPT


def value_head(call: AttentionCall) -> int:
    """Head dim of the value, and so of the result."""
    if call.is_paged and not call.is_packed:
        return query_dims(call).head  # the two are equal
    return key_dims(call, call.value[0]).head


def lse_shape(call: AttentionCall) -> tuple[int, ...]:
    """Shape of softmax_lse, if it is asked for."""
    query = query_dims(call)
    if call.is_packed:
        return query.seq, query.heads, 1
    return query.batch, query.heads, query.seq, 1
