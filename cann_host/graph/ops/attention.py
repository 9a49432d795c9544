"""Attention for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import Dynamic, GraphError, describe, ints, is_meta, op
from cann_host.graph.ops.attention_arithmetic import AttentionTensors, fused_attention
from cann_host.rules import (
    FUSED,
    INCRE,
    PROMPT,
    AttentionCall,
    Lengths,
    check_attention,
    lse_shape,
    out_shape,
    query_dims,
    value_head,
)

_LENGTHS = ("actual_seq_lengths", "actual_seq_lengths_kv", "actual_shared_prefix_len")


def _lengths(value: Tensor) -> Lengths:
    return Lengths(value.numel(), None if is_meta(value) else tuple(ints(value)))


def _attention(kind: str, scale: float, **given: Any) -> tuple[Tensor, Tensor]:
    """A call with the names of `AttentionCall`."""
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    if not key or not value:
        raise GraphError("key or value has no tensor")
    given = {name: argument for name, argument in given.items() if argument is not None}
    lengths = {name: _lengths(given.pop(name)) for name in _LENGTHS if name in given}
    lengths = {name: values for name, values in lengths.items() if values.size}
    optional = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
    numbers = {name: number for name, number in given.items() if name not in optional}
    # InferDataType: a scale of the result makes it int8
    out = torch.int8 if "quant_scale2" in optional else query.dtype
    fields: dict[str, Any] = {name: describe(tensor) for name, tensor in optional.items()}
    call = AttentionCall(
        executor.soc_name(),
        kind,
        describe(query),
        tuple(map(describe, key)),
        tuple(map(describe, value)),
        **(fields | lengths | numbers),
        out_dtype=str(out).removeprefix("torch."),
        is_graph=True,
    )
    if refusal := check_attention(call):
        raise GraphError(refusal)
    wants_lse = call.softmax_lse_flag
    if is_meta(query):
        shape = out_shape(call.layout.out, query_dims(call), value_head(call))
        lse = torch.empty(lse_shape(call) if wants_lse else 0, device="meta")
        return torch.empty(shape, dtype=out, device="meta"), lse
    result, lse = fused_attention(call, AttentionTensors(query, key, value, scale, optional))
    return result, lse if wants_lse else lse.new_empty(0)


@op("FusedInferAttentionScore")
def _fused_infer_attention_score(
    query: Tensor,
    key: Dynamic,
    value: Dynamic,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_start_idx: Tensor | None = None,
    kv_start_idx: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 1,
    block_size: int = 0,
    antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    query_quant_mode: int = 0,
    pse_type: int = 0,
    out_dtype: int = 0,
) -> tuple[Tensor, Tensor]:
    arguments = dict(locals())
    del arguments["out_dtype"]  # of float8
    starts = [arguments.pop(name) for name in ("q_start_idx", "kv_start_idx")]
    if arguments.pop("pse_type") or any(start is not None for start in starts):
        raise GraphError("q_start_idx, kv_start_idx and pse_type are not implemented by cann_host")
    return _attention(FUSED, **arguments)


@op("PromptFlashAttention")
def _prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    pre_tokens: int = 214748647,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    arguments = dict(locals())
    arguments |= {name: [arguments[name]] for name in ("key", "value")}
    arguments["scale"] = arguments.pop("scale_value")
    for name in ("deq_scale1", "deq_scale2"):
        arguments[name.replace("deq", "dequant")] = arguments.pop(name)
    return _attention(PROMPT, **arguments)[0]


@op("IncreFlashAttention")
def _incre_flash_attention(
    query: Tensor,
    key: Dynamic,
    value: Dynamic,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    *,
    num_heads: int,
    scale_value: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    inner_precise: int = 1,
) -> Tensor:
    arguments = dict(locals())
    arguments["scale"] = arguments.pop("scale_value")
    arguments["actual_seq_lengths_kv"] = arguments.pop("actual_seq_lengths")  # of the keys
    return _attention(INCRE, **arguments)[0]
