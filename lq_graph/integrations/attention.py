"""Attention of transformers' models as one operator of the NPU, FusedInferAttentionScore.

What the operator does not compute goes to transformers' own functions, layer by layer.

Source: hicann/ops-transformer attention/fused_infer_attention_score/docs,
aclnnFusedInferAttentionScoreV4.md.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..rules.products import get_product
from ..rules.tables import A2, A3

__all__ = ["attention", "attention_mask"]

Attended = tuple[Tensor, Tensor | None]  # (batch, tokens, heads, head size), the weights

_PRODUCTS = (A2, A3)
_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_STEP, _LARGEST_HEAD, _MOST_HEADS, _MOST_GROUPS = 16, 512, 256, 64
_ROW_WITHOUT_KEYS = 2  # inner_precise: high precision, and zeros for a query that sees no key

_INVERSE = "_lq_graph_inverse"  # attribute of a mask

_said: set[str] = set()


def attention_mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The mask of a step, for `attention`: what AttentionMaskInterface calls once for all layers.

    Returns:
        transformers' own mask for sdpa, bool (batch, 1, queries, keys), True where a query sees a
        key. None if every key is seen. On an NPU it carries its inverse, which the operator takes:
        otherwise each layer would compute it.
    """
    from transformers import AttentionMaskInterface

    from .compat import queries_of

    # several queries without a mask would need a mask of 2048 x 2048 in its place
    skip = allow_is_causal_skip and queries_of(kwargs) == 1
    sees: Tensor | None = AttentionMaskInterface()["sdpa"](
        *args, allow_is_causal_skip=skip, **kwargs
    )
    if sees is not None and sees.device.type == "npu":
        sees = sees.contiguous()
        setattr(sees, _INVERSE, sees.logical_not())
    return sees


def _inverse(sees: Tensor) -> Tensor:
    """True where a query does not see a key. A model may have changed a mask in place, which is
    not known while a graph is traced; no model of transformers does it with this mask."""
    known: Tensor | None = getattr(sees, _INVERSE, None)
    if known is not None and not torch.compiler.is_compiling():
        known = None if sees.is_inference() or sees._version else known
    return sees.logical_not() if known is None else known


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Attended:
    """Attention of one layer: what AttentionInterface calls.

    Args:
        module: the layer.
        query: (batch, heads, queries, head size).
        key, value: (batch, kv heads, keys, head size).
        attention_mask: bool, True where a query sees a key, or floating-point, which is added to
            the scores.

    Returns:
        (batch, queries, heads, head size), and the weights if the caller wants them.

    Raises:
        TypeError: the mask has another dtype.
    """
    if attention_mask is not None and not (
        attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    ):
        raise TypeError(
            f"lq_graph: attention_mask is {attention_mask.dtype}. What to do: give bool, True where"
            " a query sees a key, or floating-point, which is added to the scores."
        )
    given = {"scaling": scaling, "dropout": dropout, **kwargs}
    if needs := _needs_eager(attention_mask, kwargs):
        if query.device.type == "npu":
            _say_once(f"{type(module).__name__}: {needs}, so its own eager function computes it")
        mask = _added(attention_mask, query.dtype)
        return _eager_function(module)(module, query, key, value, mask, **given)
    if query.device.type == "npu":
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        blocked = _blocked(query, key, value, attention_mask)
        if not blocked and attention_mask is None and query.shape[2] > 1 and causal:
            blocked = "there is no mask for several queries"
        if not blocked and dropout:
            blocked = f"dropout is {dropout}"
        if not blocked and kwargs.get("position_bias") is not None:
            blocked = "position_bias is given"
        if not blocked:
            return _fused(query, key, value, attention_mask, scaling), None
        _say_once(f"{type(module).__name__}: {blocked}, so transformers' sdpa computes it")
    from transformers import AttentionInterface

    attended: Attended = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, is_causal=is_causal, **given
    )
    return attended


def _needs_eager(mask: Tensor | None, kwargs: dict[str, Any]) -> str:
    """What only the model's own eager function computes; empty if nothing."""
    if kwargs.get("output_attentions"):
        return "the attention weights are wanted"
    for name in ("softcap", "s_aux", "head_mask"):
        if kwargs.get(name) is not None:
            return f"{name} is given"
    if mask is not None and mask.is_floating_point():
        return f"attention_mask is {mask.dtype}, which may hold more than 0 and -inf"
    return ""


def _blocked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """Why the operator does not compute this; empty if it does."""
    batch, heads, queries, size = query.shape
    groups = key.shape[1]
    if not _is_on_chip():
        return "only Atlas A2 and A3 have FusedInferAttentionScore"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "gradients are wanted"
    if query.dtype not in _DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query is {query.dtype}, key {key.dtype} and value {value.dtype}"
    if key.shape[-1] != size or value.shape != key.shape or size % _HEAD_STEP:
        return f"the head sizes are {size}, {key.shape[-1]} and {value.shape[-1]}"
    if size > _LARGEST_HEAD:
        return f"the head size is {size}; at most {_LARGEST_HEAD}"
    if heads % groups or heads // groups > _MOST_GROUPS or heads > _MOST_HEADS:
        return f"there are {heads} heads of queries and {groups} of keys"
    if key.shape[0] != batch:
        return f"query has a batch of {batch} and key of {key.shape[0]}"
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != queries):
        return f"attention_mask has shape {tuple(mask.shape)}"
    return ""


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """One FusedInferAttentionScore. `_blocked` came before."""
    batch, heads, queries, size = query.shape
    if mask is not None:
        mask = _inverse(mask).expand(batch, -1, -1, -1).contiguous()
    one = queries == 1
    groups = key.shape[1]
    if _is_bsnd(key) and _is_bsnd(value):  # a view of our cache
        layout = "BSND"
        query = query.reshape(batch, 1, heads, size) if one else query.transpose(1, 2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    else:
        # the layout that also transposes the result takes several queries only
        layout = "BNSD" if one else "BNSD_BSND"
    out: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),  # in a step of one token it is
        key.contiguous(),
        value.contiguous(),
        atten_mask=mask,
        num_heads=heads,
        num_key_value_heads=groups,
        scale=size**-0.5 if scaling is None else float(scaling),
        input_layout=layout,
        inner_precise=0 if one or mask is None else _ROW_WITHOUT_KEYS,
    )[0]
    return out.view(batch, 1, heads, size) if layout == "BNSD" else out


def _is_bsnd(x: Tensor) -> bool:
    """Whether (batch, heads, keys, head size) is a transposed view of (batch, keys, heads, ..)."""
    return x.stride(1) <= x.stride(2) and x.transpose(1, 2).is_contiguous()


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask in the form of eager functions: what is added to the scores."""
    if mask is None or mask.is_floating_point():
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(_inverse(mask), torch.finfo(dtype).min)


@torch.compiler.assume_constant_result
def _is_on_chip() -> bool:
    return get_product() in _PRODUCTS


@torch.compiler.assume_constant_result
def _say_once(text: str) -> None:
    """Warn once in a process, also while a graph is traced."""
    if text not in _said:
        _said.add(text)
        warnings.warn(f'attn_implementation="lq_graph": {text}', RuntimeWarning, stacklevel=4)


def _eager_function(module: nn.Module) -> Callable[..., Attended]:
    """The function of the model's file that its layers use with attn_implementation="eager"."""
    name = type(module).__module__
    function = getattr(sys.modules[name], "eager_attention_forward", None)
    if function is None:
        raise NotImplementedError(
            f"lq_graph: {name} has no eager_attention_forward, which "
            f'{type(module).__name__} needs here. What to do: attn_implementation="sdpa".'
        )
    return function  # type: ignore[no-any-return]
