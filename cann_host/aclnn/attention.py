"""Attention for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cann_host.graph.ops.attention_arithmetic import AttentionTensors, fused_attention
from cann_host.rules import (
    FUSED,
    INCRE,
    PROMPT,
    AttentionCall,
    Lengths,
    TensorDesc,
    check_attention,
)

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor

__all__ = ["OPERATORS"]

_LENGTHS = ("actual_seq_lengths", "actual_seq_lengths_kv", "actual_shared_prefix_len")


class FusedArguments(NamedTuple):
    """Arguments of every attention here, with the names of `AttentionCall`."""

    query: AclTensor
    key: tuple[AclTensor, ...]
    value: tuple[AclTensor, ...]
    attention_out: AclTensor
    scale: float
    given: dict[str, Any]  # the others that are not null


_SEQUENCES = ("query", "key", "value", "pse_shift", "atten_mask")
_QUANT = ("dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2")
_ANTIQUANT = ("antiquant_scale", "antiquant_offset")
_PADDING = ("query_padding_size", "kv_padding_size")
_SEPARATE = (
    "key_antiquant_scale",
    "key_antiquant_offset",
    "value_antiquant_scale",
    "value_antiquant_offset",
    "key_shared_prefix",
    "value_shared_prefix",
    "actual_shared_prefix_len",
)
_ROPE = ("query_rope", "key_rope", "key_rope_antiquant_scale")
_NUMBERS = ("num_heads", "scale", "pre_tokens", "next_tokens", "input_layout")
_MORE_NUMBERS = (
    "num_key_value_heads",
    "sparse_mode",
    "inner_precise",
    "block_size",
    "antiquant_mode",
    "softmax_lse_flag",
)
_MODES = ("key_antiquant_mode", "value_antiquant_mode")
_OUT = ("attention_out", "softmax_lse")

_FUSED = (*_SEQUENCES, *_LENGTHS[:2], *_QUANT, *_ANTIQUANT, "block_table", *_PADDING)
# the arguments of each function, in the order of CANN's header
_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "aclnnFusedInferAttentionScore": (*_FUSED, *_NUMBERS, *_MORE_NUMBERS, *_OUT),
    "aclnnFusedInferAttentionScoreV2": (
        *_FUSED,
        *_SEPARATE,
        *_NUMBERS,
        *_MORE_NUMBERS,
        *_MODES,
        *_OUT,
    ),
    "aclnnFusedInferAttentionScoreV3": (
        *_FUSED,
        *_SEPARATE,
        *_ROPE,
        *_NUMBERS,
        *_MORE_NUMBERS,
        *_MODES,
        *_OUT,
    ),
    "aclnnFusedInferAttentionScoreV4": (
        *_FUSED,
        *_SEPARATE,
        *_ROPE,
        "dequant_scale_query",
        "learnable_sink",
        *_NUMBERS,
        *_MORE_NUMBERS,
        *_MODES,
        "query_quant_mode",
        *_OUT,
    ),
    "aclnnPromptFlashAttentionV3": (
        *_SEQUENCES,
        *_LENGTHS[:2],
        *_QUANT,
        *_NUMBERS,
        *_MORE_NUMBERS[:3],
        "attention_out",
    ),
    "aclnnIncreFlashAttentionV4": (
        *_SEQUENCES,
        "actual_seq_lengths_kv",
        *_QUANT,
        *_ANTIQUANT,
        "block_table",
        "kv_padding_size",
        "num_heads",
        "scale",
        "input_layout",
        "num_key_value_heads",
        "block_size",
        "inner_precise",
        "attention_out",
    ),
}


def _arguments(names: tuple[str, ...]) -> Callable[..., FusedArguments]:
    def read(*values: Any) -> FusedArguments:
        given = {n: v for n, v in zip(names, values, strict=True) if v is not None and v != ()}
        key, value = (given.pop(name, None) for name in ("key", "value"))
        return FusedArguments(
            given.pop("query", None),
            (key,) if isinstance(key, AclTensor) else key,
            (value,) if isinstance(value, AclTensor) else value,
            given.pop("attention_out", None),
            given.pop("scale"),
            given,
        )

    return read


def _call(kind: str, arguments: FusedArguments, soc: str) -> AttentionCall:
    query, key, value, out, _, given = arguments
    fields: dict[str, Any] = {"out_dtype": out.dtype_name, "attention_out": out.desc}
    for name, argument in given.items():
        if name in _LENGTHS:
            fields[name] = Lengths(len(argument), argument)
        elif isinstance(argument, AclTensor):
            fields[name] = argument.desc
        else:
            fields[name] = bool(argument) if name == "softmax_lse_flag" else argument
    keys, values = [tensor.desc for tensor in key], [tensor.desc for tensor in value]
    if kind == FUSED and keys[0].dtype == values[0].dtype == "int32":
        # aclnn_fused_infer_attention_score_inner.cpp: eight int4 values in each element
        keys, values = ([_as_int4(desc) for desc in descs] for descs in (keys, values))
    return AttentionCall(soc, kind, query.desc, tuple(keys), tuple(values), **fields)


def _as_int4(desc: TensorDesc) -> TensorDesc:
    return desc._replace(dtype="int4", shape=(*desc.shape[:-1], 8 * desc.shape[-1]))


def _check(kind: str) -> Callable[[FusedArguments, str], None]:
    def check(arguments: FusedArguments, soc: str) -> None:
        query, key, value, out, _, given = arguments
        need(query=query, key=key, value=value, attention_out=out)
        if None in key or None in value or not key or not value:
            raise RefusedError("key or value has a null tensor")
        need(input_layout=given.get("input_layout"))
        raise_refusal(check_attention(_call(kind, arguments, soc)))
        tensors = {name: t for name, t in given.items() if isinstance(t, AclTensor)}
        compute_base_format_only(query=query, attention_out=out, **tensors)
        for name, several in (("key", key), ("value", value)):
            for tensor in several:
                compute_base_format_only(**{name: tensor})
        lse: AclTensor | None = given.get("softmax_lse")
        if given.get("softmax_lse_flag"):
            need(softmax_lse=lse)
            if lse is not None and lse.dtype_name != "float32":
                raise RefusedError(f"softmax_lse is {lse.dtype_name}; float32 is allowed")

    return check


def _compute(kind: str) -> Callable[[FusedArguments, str], None]:
    def compute(arguments: FusedArguments, soc: str) -> None:
        query, key, value, out, scale, given = arguments
        if 0 in query.shape or 0 in out.shape:
            return
        call = _call(kind, arguments, soc)
        optional = {n: t.view() for n, t in given.items() if isinstance(t, AclTensor)}
        lse = optional.pop("softmax_lse", None)
        keys, weighed = [t.view() for t in key], [t.view() for t in value]
        tensors = AttentionTensors(query.view(), keys, weighed, scale, optional)
        values, most = fused_attention(call, tensors)
        out.write(values)
        if call.softmax_lse_flag and lse is not None:
            lse.copy_(most)

    return compute


def _kind(name: str) -> str:
    return next(k for k in (FUSED, PROMPT, INCRE) if name.startswith(f"aclnn{k}"))


OPERATORS = tuple(
    Operator(name, _arguments(names), _check(_kind(name)), _compute(_kind(name)))
    for name, names in _FUNCTIONS.items()
)
