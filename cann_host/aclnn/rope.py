"""Rotary embeddings."""

from __future__ import annotations

from typing import NamedTuple

from cann_host.graph import executor
from cann_host.graph.ops.rope import (
    apply_rotary,
    mrope,
    rotary,
    rotary_grad,
    rotary_position_embedding,
)
from cann_host.rules import (
    HALF,
    INTERLEAVE,
    INTERLEAVE_HALF,
    INVALID,
    ApplyRotaryCall,
    MropeCall,
    RotaryCall,
    RotaryGradCall,
    apply_rotary_ignores,
    check_apply_rotary,
    check_interleave_rope,
    check_mrope,
    check_rotary,
    check_rotary_grad,
    rotary_ignores,
)

from .checks import compute_base_format_only, need
from .operator import Operator
from .refusal import RefusedError, raise_refusal
from .tensors import AclTensor, describe

__all__ = ["OPERATORS"]


class ApplyRotaryArguments(NamedTuple):
    query: AclTensor
    key: AclTensor
    cos: AclTensor
    sin: AclTensor
    layout: int


class ApplyRotaryV2Arguments(NamedTuple):
    query: AclTensor
    key: AclTensor
    cos: AclTensor
    sin: AclTensor
    layout: int
    rotary_mode: str | None


class RotaryArguments(NamedTuple):
    x: AclTensor
    cos: AclTensor
    sin: AclTensor
    mode: int
    out: AclTensor


class RotaryV2Arguments(NamedTuple):
    x: AclTensor
    cos: AclTensor
    sin: AclTensor
    mode: int
    rotate: AclTensor | None
    out: AclTensor


class RotaryGradArguments(NamedTuple):
    dy: AclTensor
    cos: AclTensor
    sin: AclTensor
    x: AclTensor | None
    mode: int
    dx: AclTensor
    dcos: AclTensor
    dsin: AclTensor

    def described(self, soc: str) -> RotaryGradCall:
        x = describe(self.x)
        return RotaryGradCall(soc, self.dy.desc, self.cos.desc, self.sin.desc, x, self.mode)


class InterleaveRopeArguments(NamedTuple):
    x: AclTensor
    cos: AclTensor
    sin: AclTensor
    out: AclTensor


class MropeArguments(NamedTuple):
    positions: AclTensor
    query: AclTensor
    key: AclTensor
    cos_sin_cache: AclTensor
    section: tuple[int, ...] | None
    head_size: int
    is_neox: bool
    query_out: AclTensor
    key_out: AclTensor


class MropeV2Arguments(NamedTuple):
    positions: AclTensor
    query: AclTensor
    key: AclTensor
    cos_sin_cache: AclTensor
    section: tuple[int, ...] | None
    head_size: int
    is_neox: bool
    cache_mode: int
    query_out: AclTensor
    key_out: AclTensor


def _apply_call(call: ApplyRotaryArguments | ApplyRotaryV2Arguments, soc: str) -> ApplyRotaryCall:
    query, key, cos, sin, layout = call[:5]
    mode = call.rotary_mode if isinstance(call, ApplyRotaryV2Arguments) else None
    return ApplyRotaryCall(
        soc, query.desc, key.desc, cos.desc, sin.desc, layout, HALF if mode is None else mode
    )


def _check_apply_rotary(call: ApplyRotaryArguments | ApplyRotaryV2Arguments, soc: str) -> None:
    need(query=call.query, key=call.key, cos=call.cos, sin=call.sin)
    described = _apply_call(call, soc)
    raise_refusal(check_apply_rotary(described))
    compute_base_format_only(query=call.query, key=call.key, cos=call.cos, sin=call.sin)
    if ignored := apply_rotary_ignores(soc, described.mode):
        executor.caution(ignored)


def _apply_rotary(call: ApplyRotaryArguments | ApplyRotaryV2Arguments, soc: str) -> None:
    query, key, cos, sin = (t.view() for t in (call.query, call.key, call.cos, call.sin))
    mode = _apply_call(call, soc).mode
    turned = apply_rotary(soc, query, key, cos, sin, call.layout, mode)
    for tensor, values in zip((query, key), turned, strict=True):
        tensor.copy_(values)


def _v2(call: RotaryArguments | RotaryV2Arguments) -> RotaryV2Arguments:
    if isinstance(call, RotaryV2Arguments):
        return call
    return RotaryV2Arguments(call.x, call.cos, call.sin, call.mode, None, call.out)


def _rotary_call(call: RotaryV2Arguments, soc: str) -> RotaryCall:
    x, cos, sin, mode, rotate, _ = call
    return RotaryCall(soc, x.desc, cos.desc, sin.desc, mode, describe(rotate))


def _check_out(x: AclTensor, out: AclTensor) -> None:
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        raise RefusedError(f"out is {out.desc}; it must be like {x.desc}", INVALID)


def _check_rotary(given: RotaryArguments | RotaryV2Arguments, soc: str) -> None:
    call = _v2(given)
    need(x=call.x, cos=call.cos, sin=call.sin, out=call.out)
    if 0 in call.out.shape:  # aclnn returns before it calls the kernel
        return
    raise_refusal(check_rotary(_rotary_call(call, soc)))
    tensors = {"x": call.x, "cos": call.cos, "sin": call.sin, "out": call.out}
    compute_base_format_only(**tensors, rotate=call.rotate)
    _check_out(call.x, call.out)


def _rotary(given: RotaryArguments | RotaryV2Arguments, soc: str) -> None:
    call = _v2(given)
    if 0 in call.out.shape:
        return
    rotate = None if call.rotate is None else call.rotate.view()
    x, cos, sin = call.x.view(), call.cos.view(), call.sin.view()
    values = rotary_position_embedding(_rotary_call(call, soc), x, cos, sin, rotate)
    call.out.view().copy_(values)


def _check_rotary_grad(call: RotaryGradArguments, soc: str) -> None:
    """Source: hicann/ops-transformer posembedding/rotary_position_embedding_grad/docs."""
    need(dy=call.dy, cos=call.cos, sin=call.sin, dx=call.dx, dcos=call.dcos, dsin=call.dsin)
    described = call.described(soc)
    raise_refusal(check_rotary_grad(described))
    compute_base_format_only(
        **{name: t for name, t in call._asdict().items() if isinstance(t, AclTensor)}
    )
    _check_out(call.dy, call.dx)
    if call.x is not None:
        _check_out(call.cos, call.dcos)
        _check_out(call.sin, call.dsin)
    if ignored := rotary_ignores(described.forward):
        executor.caution(ignored)


def _rotary_grad(call: RotaryGradArguments, _soc: str) -> None:
    x = None if call.x is None else call.x.view()
    mode = INTERLEAVE if call.mode == 1 else HALF
    gradients = rotary_grad(call.dy.view(), call.cos.view(), call.sin.view(), x, mode)
    for out, values in zip((call.dx, call.dcos, call.dsin), gradients, strict=True):
        if values is not None:  # without x, the kernel leaves dcos and dsin as they are
            out.view().copy_(values)


def _check_interleave_rope(call: InterleaveRopeArguments, soc: str) -> None:
    x, cos, sin, out = call
    need(x=x, cos=cos, sin=sin, out=out)
    raise_refusal(check_interleave_rope(RotaryCall(soc, x.desc, cos.desc, sin.desc)))
    compute_base_format_only(x=x, cos=cos, sin=sin, out=out)
    _check_out(x, out)


def _interleave_rope(call: InterleaveRopeArguments, _soc: str) -> None:
    x, cos, sin, out = (t.view() for t in call)
    out.copy_(rotary(x, cos, sin, INTERLEAVE_HALF))


def _mrope_call(call: MropeArguments | MropeV2Arguments, soc: str) -> MropeCall:
    positions, query, key, cache, section, head_size, is_neox = call[:7]
    return MropeCall(
        soc,
        positions.desc,
        query.desc,
        key.desc,
        cache.desc,
        section,
        head_size,
        is_neox,
        call.cache_mode if isinstance(call, MropeV2Arguments) else 0,
        (query.strides, key.strides),
    )


def _check_mrope(call: MropeArguments | MropeV2Arguments, soc: str) -> None:
    need(positions=call.positions, queryIn=call.query, keyIn=call.key)
    need(cosSinCache=call.cos_sin_cache, queryOut=call.query_out, keyOut=call.key_out)
    raise_refusal(check_mrope(_mrope_call(call, soc)))
    for x, out in ((call.query, call.query_out), (call.key, call.key_out)):
        compute_base_format_only(queryIn=x, queryOut=out)
        _check_out(x, out)
    compute_base_format_only(positions=call.positions, cosSinCache=call.cos_sin_cache)


def _mrope(call: MropeArguments | MropeV2Arguments, soc: str) -> None:
    described = _mrope_call(call, soc)
    tensors = (call.positions, call.query, call.key, call.cos_sin_cache)
    turned = mrope(described, *(tensor.view() for tensor in tensors))
    for out, values in zip((call.query_out, call.key_out), turned, strict=True):
        out.view().copy_(values)


OPERATORS = (
    Operator("aclnnRopeWithSinCosCache", MropeArguments, _check_mrope, _mrope),
    Operator("aclnnRopeWithSinCosCacheV2", MropeV2Arguments, _check_mrope, _mrope),
    Operator("aclnnApplyRotaryPosEmb", ApplyRotaryArguments, _check_apply_rotary, _apply_rotary),
    Operator(
        "aclnnApplyRotaryPosEmbV2", ApplyRotaryV2Arguments, _check_apply_rotary, _apply_rotary
    ),
    Operator("aclnnRotaryPositionEmbedding", RotaryArguments, _check_rotary, _rotary),
    Operator("aclnnRotaryPositionEmbeddingV2", RotaryV2Arguments, _check_rotary, _rotary),
    Operator(
        "aclnnRotaryPositionEmbeddingGrad", RotaryGradArguments, _check_rotary_grad, _rotary_grad
    ),
    Operator(
        "aclnnInterleaveRope", InterleaveRopeArguments, _check_interleave_rope, _interleave_rope
    ),
)
