"""Rotary embeddings.

Source: cann/ops-transformer, posembedding: the kernels of apply_rotary_pos_emb,
rotary_position_embedding and its gradient, interleave_rope and rope_with_sin_cos_cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, describe, op, optional_desc
from cann_host.rules import (
    A2,
    A950,
    HALF,
    INTERLEAVE,
    INTERLEAVE_HALF,
    LAYOUTS,
    QUARTER,
    ROTARY_MODES,
    ApplyRotaryCall,
    MropeCall,
    RotaryCall,
    RotaryGradCall,
    apply_rotary_ignores,
    check_apply_rotary,
    check_interleave_rope,
    check_rotary,
    check_rotary_mul,
    check_rotary_mul_grad,
    rotary_ignores,
    soc_family,
)

from .cache import check_range


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _quarters(x: Tensor) -> Tensor:
    return torch.cat([_halves(half) for half in x.chunk(2, -1)], -1)


_ROTATIONS = {HALF: _halves, INTERLEAVE: _pairs, QUARTER: _quarters, INTERLEAVE_HALF: _halves}


def _turned(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    return x * cos + _ROTATIONS[mode](x) * sin


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, mode: str = HALF, rotate: Tensor | None = None
) -> Tensor:
    """x * cos + rotated * sin, in float32, rounded once.

    Args:
        x: (..., D).
        cos, sin: that broadcast to x.
        mode: of ROTARY_MODES; INTERLEAVE_HALF first sorts the pairs of x into halves.
        rotate: (D, D), by which x is multiplied instead.
    """
    value, cos, sin = x.float(), cos.float(), sin.float()
    if rotate is not None:
        return (value * cos + value @ rotate.float() * sin).to(x.dtype)
    if mode == INTERLEAVE_HALF:
        value = torch.cat((value[..., ::2], value[..., 1::2]), -1)
    return _turned(value, cos, sin, mode).to(x.dtype)


def rotary_grad(
    dy: Tensor, cos: Tensor, sin: Tensor, x: Tensor | None, mode: str = HALF
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `rotary` for x, cos and sin, the last two only if x is given; in float32, summed
    over the dims that broadcast, rounded once.

    Args:
        dy, cos, sin, x: `check_rotary_grad` accepted them.
        mode: HALF or INTERLEAVE, whose rotation is the negative of its transpose.
    """
    turn, grad = _ROTATIONS[mode], dy.float()
    dx = grad * cos.float() - turn(grad * sin.float())
    if x is None:
        return dx.to(dy.dtype), None, None
    value = x.float()
    dcos, dsin = (
        (grad * factor).sum_to_size(cos.shape).to(dy.dtype) for factor in (value, turn(value))
    )
    return dx.to(dy.dtype), dcos, dsin


def _bfloat16_away(x: Tensor) -> Tensor:
    """float32 to bfloat16, half away from zero; x is overwritten. A NaN of bfloat16 stays one."""
    if x.is_meta:
        return x.to(torch.bfloat16)
    x.view(torch.int32).add_(0x8000)
    return x.view(torch.bfloat16)[..., 1::2]  # the high halves


def apply_rotary(
    soc: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: int, mode: str
) -> tuple[Tensor, Tensor]:
    """What a chip's kernels of ApplyRotaryPosEmb compute for query and key, as one tensor of heads.

    Args:
        soc: name of the chip.
        query, key, cos, sin, layout, mode: `check_apply_rotary` accepted them.
    """
    d, heads = cos.shape[-1], LAYOUTS[layout].index("N")
    both = torch.cat((query, key), heads)
    part = both[..., :d]
    if soc_family(soc) == A950:
        turned = rotary(part, cos, sin, mode)
    elif both.dtype == torch.bfloat16:
        # apply_rotary_pos_emb_compute_ab_cast.h: CAST_ROUND
        turned = _bfloat16_away(_turned(part.float(), cos.float(), sin.float(), HALF))
    else:
        # apply_rotary_pos_emb_compute_ab.h: each product and the sum are float16, if query is
        turned = _turned(part, cos, sin, HALF)
    if d != both.shape[-1]:
        turned = torch.cat((turned, both[..., d:]), -1)
    first, second = turned.split((query.shape[heads], key.shape[heads]), heads)
    return first, second


def mrope(
    call: MropeCall, positions: Tensor, query: Tensor, key: Tensor, cos_sin_cache: Tensor
) -> tuple[Tensor, Tensor]:
    """What RopeWithSinCosCache computes of query and key, in float32, rounded once.

    Args:
        call: `check_mrope` accepted it.
        positions, query, key, cos_sin_cache: tensors of the call.

    Raises:
        GraphError: a position is outside of the cache.
    """
    check_range("positions", positions, [len(cos_sin_cache)], "cosSinCache")
    d = cos_sin_cache.shape[1]
    angles = cos_sin_cache[positions].unflatten(-1, (2, d // 2))
    if call.sections:
        owners = torch.tensor(_owners(call), dtype=torch.int64)
        angles = angles.movedim(-1, 1)[owners, torch.arange(d // 2)].movedim(0, -1)
    # (tokens, 2, D / 2)
    angles = torch.cat((angles, angles), -1) if call.is_neox else angles.repeat_interleave(2, -1)
    cos, sin = angles.unsqueeze(1).unbind(2)
    heads = torch.cat((query, key), 1).unflatten(1, (-1, call.head_size))
    turned = rotary(heads[..., :d], cos, sin, HALF if call.is_neox else INTERLEAVE)
    both = torch.cat((turned, heads[..., d:]), -1).flatten(1)
    first, second = both.split((query.shape[1], key.shape[1]), 1)
    return first, second


def _owners(call: MropeCall) -> list[int]:
    """Which row of positions each angle is of."""
    sections = call.sections
    if call.cache_mode == 0:
        return [row for row, count in enumerate(sections) for _ in range(count)]
    return [i % 3 if i // 3 < sections[i % 3] else 0 for i in range(sum(sections))]


@op("ApplyRotaryPosEmb")
def _apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    layout: int = 1,
    rotary_mode: str = HALF,
) -> tuple[Tensor, Tensor]:
    soc = executor.soc_name()
    tensors = describe(query), describe(key), describe(cos), describe(sin)
    if refusal := check_apply_rotary(
        ApplyRotaryCall(soc, *tensors, layout, rotary_mode, is_graph=True)
    ):
        raise GraphError(refusal)
    if ignored := apply_rotary_ignores(soc, rotary_mode):
        executor.caution(ignored)
    return apply_rotary(soc, query, key, cos, sin, layout, rotary_mode)


@op("RotaryPositionEmbedding")
def _rotary_position_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None = None, *, mode: int = 0
) -> Tensor:
    call = RotaryCall(
        executor.soc_name(),
        describe(x),
        describe(cos),
        describe(sin),
        mode,
        optional_desc(rotate),
        is_graph=True,
    )
    if refusal := check_rotary(call):
        raise GraphError(refusal)
    return rotary_position_embedding(call, x, cos, sin, rotate)


def rotary_position_embedding(
    call: RotaryCall, x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None
) -> Tensor:
    """What a chip computes for a call that `check_rotary` accepted."""
    if ignored := rotary_ignores(call):
        executor.caution(ignored)
    family = soc_family(call.soc)
    mode = ROTARY_MODES[call.mode] if family == A950 or call.mode in (0, 1) else HALF
    return rotary(x, cos, sin, mode, rotate if family == A2 else None)


@op("InterleaveRope")
def _interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    call = RotaryCall(executor.soc_name(), describe(x), describe(cos), describe(sin), is_graph=True)
    if refusal := check_interleave_rope(call):
        raise GraphError(refusal)
    return rotary(x, cos, sin, INTERLEAVE_HALF)


@op("RotaryMul")
def _rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    call = RotaryCall(executor.soc_name(), describe(x), describe(r1), describe(r2), is_graph=True)
    if refusal := check_rotary_mul(call):
        raise GraphError(refusal)
    return rotary(x, r1, r2)


@op("RotaryMulGrad")
def _rotary_mul_grad(
    x: Tensor, r1: Tensor, r2: Tensor, dy: Tensor, *, need_backward: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = describe(dy), describe(r1), describe(r2), describe(x)
    if refusal := check_rotary_mul_grad(RotaryGradCall(executor.soc_name(), *tensors)):
        raise GraphError(refusal)
    if not need_backward:
        raise GraphError("need_backward is False; cann_host computes the gradients of r1 and r2")
    dx, dr1, dr2 = rotary_grad(dy, r1, r2, x)
    assert dr1 is not None and dr2 is not None
    return dx, dr1, dr2
