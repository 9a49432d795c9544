"""FlashAttentionScore, the attention of training, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from cann_host.graph.ops.attention_flash import flash_attention, flash_gradient
from cann_host.rules import FlashCall, Lengths, check_flash

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor

__all__ = ["OPERATORS"]


class FlashArguments(NamedTuple):
    """Arguments of every version, with the names of `FlashCall`."""

    query: AclTensor
    key: AclTensor
    value: AclTensor
    softmax_max: AclTensor
    softmax_sum: AclTensor
    attention_out: AclTensor
    scale_value: float
    given: dict[str, Any]  # the others that are not null


_QKV = ("query", "key", "value")
_QKV_ROPE = ("query", "query_rope", "key", "key_rope", "value")
_MASKS = ("real_shift", "drop_mask", "padding_mask", "atten_mask")
_LENGTHS = ("actual_seq_qlen", "actual_seq_kvlen")
_STARTS = ("q_start_idx", "kv_start_idx")
_NUMBERS = (
    "scale_value",
    "keep_prob",
    "pre_tockens",
    "next_tockens",
    "head_num",
    "input_layout",
    "inner_precise",
    "sparse_mode",
)
_OUT = ("softmax_max", "softmax_sum", "softmax_out", "attention_out")
_INTS = ("prefix", *_LENGTHS, *_STARTS)

# the arguments of each function, in the order of CANN's header
_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "aclnnFlashAttentionScore": (*_QKV, *_MASKS, "prefix", *_NUMBERS, *_OUT),
    "aclnnFlashAttentionScoreV2": (
        *_QKV,
        *_MASKS,
        "prefix",
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        *_OUT,
    ),
    "aclnnFlashAttentionScoreV3": (
        *_QKV,
        *_MASKS,
        "sink",
        "prefix",
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        *_OUT,
    ),
    "aclnnFlashAttentionVarLenScore": (*_QKV, *_MASKS, "prefix", *_LENGTHS, *_NUMBERS, *_OUT),
    "aclnnFlashAttentionVarLenScoreV2": (
        *_QKV,
        *_MASKS,
        "prefix",
        *_LENGTHS,
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        *_OUT,
    ),
    "aclnnFlashAttentionVarLenScoreV3": (
        *_QKV_ROPE,
        *_MASKS,
        "prefix",
        *_LENGTHS,
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        *_OUT,
    ),
    "aclnnFlashAttentionVarLenScoreV4": (
        *_QKV,
        *_MASKS,
        "prefix",
        *_LENGTHS,
        *_NUMBERS,
        "softmax_layout",
        *_OUT,
    ),
    "aclnnFlashAttentionVarLenScoreV5": (
        *_QKV_ROPE,
        *_MASKS,
        "sink",
        "prefix",
        *_LENGTHS,
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        "softmax_layout",
        *_OUT,
    ),
}


def _arguments(names: tuple[str, ...]) -> Callable[..., FlashArguments]:
    def read(*values: Any) -> FlashArguments:
        given = {n: v for n, v in zip(names, values, strict=True) if v is not None and v != ()}
        given.pop("softmax_out", None)  # the kernel does not write it
        own = {name: given.pop(name, None) for name in FlashArguments._fields[:-1]}
        return FlashArguments(**own, given=given)

    return read


def _call(arguments: FlashArguments, soc: str) -> FlashCall:
    fields: dict[str, Any] = {}
    for name, argument in (arguments._asdict() | arguments.given).items():
        if name in ("given", "scale_value"):
            continue
        if name in _INTS:
            fields[name] = Lengths(len(argument), argument)
        else:
            fields[name] = argument.desc if isinstance(argument, AclTensor) else argument
    return FlashCall(soc, **fields)


def _check(arguments: FlashArguments, soc: str) -> None:
    named = arguments._asdict()
    outputs = {name: named[name] for name in ("softmax_max", "softmax_sum", "attention_out")}
    need(**{name: named[name] for name in _QKV})
    need(input_layout=arguments.given.get("input_layout"))
    need(**outputs)
    if all(0 in tensor.shape for tensor in outputs.values()):
        return
    raise_refusal(check_flash(_call(arguments, soc)))
    tensors = {n: t for n, t in (named | arguments.given).items() if isinstance(t, AclTensor)}
    compute_base_format_only(**tensors)


def _need_packed(given: dict[str, Any]) -> None:
    layout = given.get("input_layout")
    if layout not in (None, "TND"):
        raise RefusedError(f"input_layout is {layout}; TND is allowed")


def _check_packed(arguments: FlashArguments, soc: str) -> None:
    _need_packed(arguments.given)
    _check(arguments, soc)


def _compute(arguments: FlashArguments, soc: str) -> None:
    query, key, value, most, total, out, scale, given = arguments
    if all(0 in tensor.shape for tensor in (most, total, out)):
        return
    optional = {n: t.view() for n, t in given.items() if n in ("atten_mask", "real_shift", "sink")}
    call = _call(arguments, soc)
    results = flash_attention(call, query.view(), key.view(), value.view(), scale, **optional)
    for tensor, values in zip((most, total, out), results, strict=True):
        tensor.view().copy_(values)


# ---- the gradient ----


class GradientArguments(NamedTuple):
    """Arguments of every version, with the names of `FlashCall`."""

    query: AclTensor
    key: AclTensor
    value: AclTensor
    dy: AclTensor
    softmax_max: AclTensor
    softmax_sum: AclTensor
    attention_in: AclTensor
    scale_value: float
    dq: AclTensor
    dk: AclTensor
    dv: AclTensor
    dpse: AclTensor | None
    given: dict[str, Any]


_SOFTMAX = ("softmax_max", "softmax_sum", "softmax_in", "attention_in")
_GRADIENTS = ("dq", "dk", "dv", "dpse")
_GRADIENT_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "aclnnFlashAttentionScoreGrad": (
        *_QKV,
        "dy",
        *_MASKS,
        *_SOFTMAX,
        "prefix",
        *_NUMBERS,
        *_GRADIENTS,
    ),
    "aclnnFlashAttentionScoreGradV2": (
        *_QKV,
        "dy",
        *_MASKS,
        *_SOFTMAX,
        "prefix",
        *_STARTS,
        *_NUMBERS,
        "pse_type",
        *_GRADIENTS,
    ),
    "aclnnFlashAttentionUnpaddingScoreGrad": (
        *_QKV,
        "dy",
        *_MASKS,
        *_SOFTMAX,
        "prefix",
        *_LENGTHS,
        *_NUMBERS,
        *_GRADIENTS,
    ),
    "aclnnFlashAttentionUnpaddingScoreGradV4": (
        *_QKV,
        "dy",
        *_MASKS,
        *_SOFTMAX,
        "prefix",
        *_LENGTHS,
        *_NUMBERS,
        *_GRADIENTS,
        "softmax_layout",
    ),
}


def _gradient_arguments(names: tuple[str, ...]) -> Callable[..., GradientArguments]:
    def read(*values: Any) -> GradientArguments:
        given = {n: v for n, v in zip(names, values, strict=True) if v is not None and v != ()}
        given.pop("softmax_in", None)  # the forward does not write it
        own = {name: given.pop(name, None) for name in GradientArguments._fields[:-1]}
        return GradientArguments(**own, given=given)

    return read


def _gradient_call(arguments: GradientArguments, soc: str) -> FlashCall:
    """The call of the forward."""
    named = arguments._asdict() | {"attention_out": arguments.attention_in}
    forward = FlashArguments(**{name: named[name] for name in FlashArguments._fields})
    return _call(forward, soc)


def _check_gradient(arguments: GradientArguments, soc: str) -> None:
    """The checks of the forward, of which it is the gradient."""
    named = arguments._asdict()
    given = named.pop("given")
    dpse = named.pop("dpse")
    need(**{name: t for name, t in named.items() if name != "scale_value"})
    need(input_layout=given.get("input_layout"))
    raise_refusal(check_flash(_gradient_call(arguments, soc)))
    pairs = {"dq": "query", "dk": "key", "dv": "value", "dy": "attention_in"}
    for name, like in pairs.items():
        if named[name].desc != named[like].desc:
            raise RefusedError(f"{name} is {named[name].desc} and {like} {named[like].desc}")
    shift = given.get("real_shift")
    if shift is not None and (dpse is None or dpse.desc != shift.desc):
        raise RefusedError(f"real_shift is {shift.desc} and dpse another")
    tensors = {n: t for n, t in (named | given).items() if isinstance(t, AclTensor)}
    compute_base_format_only(**tensors, dpse=dpse)


def _check_packed_gradient(arguments: GradientArguments, soc: str) -> None:
    _need_packed(arguments.given)
    layout = arguments.given.get("softmax_layout", "")
    if layout not in ("", "same_as_input"):
        raise RefusedError(f"softmax_layout is {layout}; same_as_input or none is allowed")
    _check_gradient(arguments, soc)


def _compute_gradient(arguments: GradientArguments, soc: str) -> None:
    given, call = arguments.given, _gradient_call(arguments, soc)
    optional = {n: t.view() for n, t in given.items() if n in ("atten_mask", "real_shift")}
    results = flash_gradient(
        call,
        (arguments.query.view(), arguments.key.view(), arguments.value.view()),
        arguments.dy.view(),
        (arguments.softmax_max.view(), arguments.softmax_sum.view()),
        arguments.attention_in.view(),
        arguments.scale_value,
        **optional,
    )
    outputs = (arguments.dq, arguments.dk, arguments.dv, arguments.dpse)
    for tensor, values in zip(outputs, results, strict=True):
        if tensor is not None and values is not None:
            tensor.view().copy_(values)


OPERATORS: tuple[Operator[Any], ...] = (
    *(
        Operator(name, _arguments(names), _check_packed if "VarLen" in name else _check, _compute)
        for name, names in _FUNCTIONS.items()
    ),
    *(
        Operator(
            name,
            _gradient_arguments(names),
            _check_packed_gradient if "Unpadding" in name else _check_gradient,
            _compute_gradient,
        )
        for name, names in _GRADIENT_FUNCTIONS.items()
    ),
)
