"""Paged caches of keys and values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cann_host.graph.ops.kv_cache import kv_rms_norm_rope_cache, scatter_pa_kv_cache
from cann_host.rules import (
    A950,
    INVALID,
    KvRmsNormRopeCall,
    ScatterPaCall,
    check_kv_rms_norm_rope_cache,
    check_scatter_pa_kv_cache,
    soc_family,
)

from .checks import compute_base_format_only, need, update_without_overlap
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


class ScatterPaArguments(NamedTuple):
    key: AclTensor
    key_cache: AclTensor
    slot_mapping: AclTensor
    value: AclTensor
    value_cache: AclTensor
    compress_lens: AclTensor | None
    compress_seq_offset: AclTensor | None
    seq_lens: AclTensor | None
    cache_mode: str | None
    scatter_mode: str | None
    strides: tuple[int, ...] | None
    offsets: tuple[int, ...] | None


class KvRmsNormRopeArguments(NamedTuple):
    kv: AclTensor
    gamma: AclTensor
    cos: AclTensor
    sin: AclTensor
    places: AclTensor  # index
    k_cache: AclTensor
    ckv_cache: AclTensor
    k_rope_scale: AclTensor | None
    c_kv_scale: AclTensor | None
    k_rope_offset: AclTensor | None
    c_kv_offset: AclTensor | None
    epsilon: float
    cache_mode: str | None
    is_output_kv: int
    k_rope: AclTensor
    c_kv: AclTensor


class KvRmsNormRopeV2Arguments(NamedTuple):
    kv: AclTensor
    gamma: AclTensor
    cos: AclTensor
    sin: AclTensor
    places: AclTensor  # index
    k_cache: AclTensor
    ckv_cache: AclTensor
    k_rope_scale: AclTensor | None
    c_kv_scale: AclTensor | None
    k_rope_offset: AclTensor | None
    c_kv_offset: AclTensor | None
    v: AclTensor | None
    epsilon: float
    cache_mode: str | None
    is_output_kv: int
    k_rope: AclTensor
    c_kv: AclTensor


def _check_scatter_pa(call: ScatterPaArguments, soc: str) -> None:
    key, key_cache, slots, value, value_cache = call[:5]
    need(key=key, key_cache=key_cache, slot_mapping=slots)
    if value is None:
        raise RefusedError("value is null: a key alone, which cann_host does not store", None)
    need(value_cache=value_cache)
    if not all(len(t.shape) in (3, 4) for t in (key, value)):
        raise RefusedError(
            f"key has shape {key.shape} and value {value.shape}; 3 or 4 dims", INVALID
        )
    optional = call.compress_lens, call.compress_seq_offset, call.seq_lens
    raise_refusal(
        check_scatter_pa_kv_cache(
            ScatterPaCall(
                soc,
                key.desc,
                key_cache.desc,
                slots.desc,
                value.desc,
                value_cache.desc,
                call.cache_mode or "",
                call.scatter_mode or "",
                any(t is not None for t in optional),
            )
        )
    )
    compute_base_format_only(
        key=key, key_cache=key_cache, slot_mapping=slots, value=value, value_cache=value_cache
    )
    update_without_overlap(key_cache=key_cache, value_cache=value_cache)
    for name, rows in (("key", key), ("value", value)):
        # the definition has no AutoContiguous, and the kernel before Ascend 950 reads no strides
        if soc_family(soc) != A950 and not rows.view().is_contiguous():
            raise RefusedError(
                f"{name} has shape {rows.shape} and strides {rows.strides}. CANN's documents want "
                "it contiguous, CANN does not check it, and the kernel reads other values; this "
                "refusal is cann_host's own",
                None,
            )


def _scatter_pa(call: ScatterPaArguments, _soc: str) -> None:
    pairs = (call.key, call.key_cache), (call.value, call.value_cache)
    views = [(rows.view(), cache.view()) for rows, cache in pairs]
    scatter_pa_kv_cache(views, call.slot_mapping.view(), call.cache_mode or "")


def _kv_call(
    call: KvRmsNormRopeArguments | KvRmsNormRopeV2Arguments, soc: str
) -> KvRmsNormRopeCall:
    return KvRmsNormRopeCall(
        soc,
        call.kv.desc,
        call.gamma.desc,
        call.cos.desc,
        call.sin.desc,
        call.places.desc,
        call.k_cache.desc,
        call.ckv_cache.desc,
        (describe(call.k_rope_scale), describe(call.c_kv_scale)),
        (describe(call.k_rope_offset), describe(call.c_kv_offset)),
        describe(_v(call)),
        call.cache_mode or "Norm",
        bool(call.is_output_kv),
    )


def _v(call: KvRmsNormRopeArguments | KvRmsNormRopeV2Arguments) -> AclTensor | None:
    return call.v if isinstance(call, KvRmsNormRopeV2Arguments) else None


def _check_kv(call: KvRmsNormRopeArguments | KvRmsNormRopeV2Arguments, soc: str) -> None:
    need(kv=call.kv, gamma=call.gamma, cos=call.cos, sin=call.sin, index=call.places)
    need(k_cache=call.k_cache, ckv_cache=call.ckv_cache, k_rope=call.k_rope, c_kv=call.c_kv)
    described = _kv_call(call, soc)
    raise_refusal(check_kv_rms_norm_rope_cache(described))
    compute_base_format_only(kv=call.kv, k_cache=call.k_cache, ckv_cache=call.ckv_cache)
    update_without_overlap(k_cache=call.k_cache, ckv_cache=call.ckv_cache)
    outputs = (("k_rope", call.k_rope), ("c_kv", call.c_kv))
    for (name, out), d in zip(outputs, described.rope_and_norm, strict=True):
        if (out.dtype, out.shape) != (call.kv.dtype, (*call.kv.shape[:3], d)):
            raise RefusedError(f"{name} is {out.desc} and kv {call.kv.desc}", INVALID)


def _maybe(tensor: AclTensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view()


def _kv(call: KvRmsNormRopeArguments | KvRmsNormRopeV2Arguments, soc: str) -> None:
    caches = call.k_cache.view(), call.ckv_cache.view()
    plain = caches[0].contiguous(), caches[1].contiguous()
    made = kv_rms_norm_rope_cache(
        _kv_call(call, soc),
        [t.view() for t in (call.kv, call.gamma, call.cos, call.sin, call.places)],
        plain,
        (_maybe(call.k_rope_scale), _maybe(call.c_kv_scale)),
        (_maybe(call.k_rope_offset), _maybe(call.c_kv_offset)),
        _maybe(_v(call)),
        call.epsilon,
    )
    for cache, written in zip(caches, plain, strict=True):
        if cache.data_ptr() != written.data_ptr():
            cache.copy_(written)
    if made is not None:
        call.k_rope.write(made[0])
        call.c_kv.write(made[1])


OPERATORS = (
    Operator("aclnnScatterPaKvCache", ScatterPaArguments, _check_scatter_pa, _scatter_pa),
    Operator("aclnnKvRmsNormRopeCache", KvRmsNormRopeArguments, _check_kv, _kv),
    Operator("aclnnKvRmsNormRopeCacheV2", KvRmsNormRopeV2Arguments, _check_kv, _kv),
)
