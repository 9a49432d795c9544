"""Rotary embeddings.

Source: cann/ops-transformer, posembedding: the kernels of apply_rotary_pos_emb,
rotary_position_embedding and interleave_rope.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, describe, op
from cann_host.rules import (
    A2,
    A950,
    HALF,
    INTERLEAVE,
    INTERLEAVE_HALF,
    QUARTER,
    ROTARY_MODES,
    ApplyRotaryCall,
    RotaryCall,
    apply_rotary_ignores,
    check_apply_rotary,
    check_interleave_rope,
    check_rotary,
    check_rotary_mul,
    rotary_ignores,
    soc_family,
)


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _quarters(x: Tensor) -> Tensor:
    return torch.cat([_halves(half) for half in x.chunk(2, -1)], -1)


_ROTATIONS = {HALF: _halves, INTERLEAVE: _pairs, QUARTER: _quarters, INTERLEAVE_HALF: _halves}


def _bfloat16_away(x: Tensor) -> Tensor:
    """float32 to bfloat16, half away from zero."""
    bits = (x.contiguous().view(torch.int32) + 0x8000) & -0x10000
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


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
    value = x.float()
    if mode == INTERLEAVE_HALF:
        value = torch.cat((value[..., ::2], value[..., 1::2]), -1)
    rotated = _ROTATIONS[mode](value) if rotate is None else value @ rotate.float()
    return (value * cos.float() + rotated * sin.float()).to(x.dtype)


def apply_rotary(soc: str, x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """What a chip's kernels of ApplyRotaryPosEmb compute for query, or for key.

    Args:
        soc: name of the chip.
        x, cos, sin, mode: `check_apply_rotary` accepted them. cos has one head, so it broadcasts.
    """
    d = cos.shape[-1]
    part = x[..., :d]
    if soc_family(soc) == A950:
        turned = rotary(part, cos, sin, mode)
    elif x.dtype == torch.float16:
        # apply_rotary_pos_emb_compute_ab.h: each product and the sum are float16
        turned = part * cos + _halves(part) * sin
    elif x.dtype == torch.bfloat16:
        # apply_rotary_pos_emb_compute_ab_cast.h: CAST_ROUND
        turned = _bfloat16_away(rotary(part.float(), cos, sin))
    else:
        turned = rotary(part, cos, sin)
    return turned if d == x.shape[-1] else torch.cat((turned, x[..., d:]), -1)


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
    first, second = (apply_rotary(soc, x, cos, sin, rotary_mode) for x in (query, key))
    return first, second


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
        None if rotate is None else describe(rotate),
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
