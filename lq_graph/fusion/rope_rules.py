"""What the operators of rotary embedding take, in a GE graph and in a captured one.

Sources: hicann/ops-transformer, posembedding/apply_rotary_pos_emb and rotary_position_embedding
(documents and tiling); Ascend/op-plugin, torch_npu-npu_rotary_mul.md,
torch_npu-apply_rotary_pos_emb.md and RotaryMulKernelNpu.cpp; torchair's converters, which make
npu_rotary_mul to RotaryMul, on Ascend 950 to RotaryPositionEmbedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..rules.tables import ASCEND_950, ATLAS_INFERENCE, Product
from .editor import CAPTURED, GE, same_size
from .parts import number

__all__ = [
    "HALF",
    "INTERLEAVE",
    "Rotated",
    "why_not_apply_rotary",
    "why_not_rotary_mul",
]

HALF, INTERLEAVE = "half", "interleave"

_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_DTYPES = {
    "310P": (_F16, _F32),
    "A2": (_F16, _BF16, _F32),
    "A3": (_F16, _BF16, _F32),
    "950": (_F16, _BF16, _F32),
}
_APPLY_D = (64, 128)
_APPLY_HEADS = 255
_UNIFIED_BUFFER = {"310P": 256 * 1024, "A2": 192 * 1024, "A3": 192 * 1024}  # bytes, a vector core
_MOST_D = 1024  # on Ascend 950
_ACLNN_D, _ACLNN_HEADS = 896, 1000  # RotaryPositionEmbedding: both are below
_ROTARY_MUL_D = 64  # RotaryMul: D is a multiple
_ROTARY_MUL_BROADCAST = 1024  # RotaryMul: values that read one of cos


@dataclass(frozen=True)
class Rotated:
    """A tensor that is rotated, and its cos and sin.

    Attributes:
        sizes: of x: (B, S, N, D), or (B, N, S, D); B and S may be symbolic.
        cos: sizes of cos and sin, in the same order.
        heads: which dim is N.
        dtype: of all.
        mode: of HALF and INTERLEAVE.
    """

    sizes: tuple[Any, ...]
    cos: tuple[Any, ...]
    heads: int
    dtype: torch.dtype
    mode: str

    @property
    def d(self) -> Any:
        return self.sizes[-1]

    @property
    def n(self) -> Any:
        return self.sizes[self.heads]

    def __str__(self) -> str:
        layout = "BSND" if self.heads == 2 else "BNSD"
        return f"{layout} {list(self.sizes)}, cos {list(self.cos)}"


def _why_not_at_all(one: Rotated, product: Product) -> str:
    if one.dtype not in _DTYPES[product.key]:
        return f"{product.key} rotates no {str(one.dtype).removeprefix('torch.')}"
    if number(one.d) is None or number(one.n) is None:
        return "run time alone knows N or D"
    if one.d % 2:
        return f"D is {one.d}; it must be even"
    if not same_size(one.cos[one.heads], 1) and not same_size(one.n, 1):
        return f"{one}; cos must be the same for all heads"
    if not all(same_size(c, 1) or same_size(c, x) for c, x in zip(one.cos, one.sizes, strict=True)):
        return f"{one}; each size of cos must be that of x, or 1"
    return ""


# ---- npu_apply_rotary_pos_emb ----


def why_not_apply_rotary(query: Rotated, key: Rotated, graph: str, product: Product) -> str:
    """Why query and key cannot be one npu_apply_rotary_pos_emb; empty if they can."""
    if graph != GE:
        return "npu_apply_rotary_pos_emb writes into what it reads; only a GE graph is right then"
    if why := _why_not_at_all(query, product) or _why_not_at_all(key, product):
        return why
    if query.mode != HALF or key.mode != HALF:
        return "npu_apply_rotary_pos_emb rotates halves"
    if not query.heads == key.heads == 2:
        return f"{query}; npu_apply_rotary_pos_emb takes BSND"
    if not all(same_size(query.sizes[i], key.sizes[i]) for i in (0, 1, 3)):
        return f"query is {query} and key {key}; B, S and D must be the same"
    if not same_size(query.cos[1], query.sizes[1]):
        return f"query is {query}; S must be the same"
    if product is ASCEND_950:
        return "" if query.d <= _MOST_D else f"D is {query.d}; it can be {_MOST_D}"
    if not same_size(query.cos[0], query.sizes[0]):
        return f"query is {query}; B must be the same"
    if query.d not in _APPLY_D:
        return f"D is {query.d}; npu_apply_rotary_pos_emb takes {' and '.join(map(str, _APPLY_D))}"
    return _why_not_in_buffer(query, key, product)


def _why_not_in_buffer(query: Rotated, key: Rotated, product: Product) -> str:
    """A row of all heads, in a vector core's memory: apply_rotary_pos_emb_tiling.cpp, for cores
    that have several rows."""
    heads = query.n + key.n
    if heads > _APPLY_HEADS:
        return f"query and key have {heads} heads; they can have {_APPLY_HEADS}"
    size, is_cast = query.dtype.itemsize, query.dtype == _BF16
    row, one = heads * query.d * (4 if is_cast else size), query.d * size
    needed = 5 * row + 4 * one + (8 * query.d if is_cast else 0)
    room = _UNIFIED_BUFFER[product.key]
    if needed > room:
        return f"a row of {heads} heads takes {needed:,} bytes of a vector core, which has {room:,}"
    return ""


# ---- npu_rotary_mul ----


def why_not_rotary_mul(one: Rotated, graph: str, product: Product) -> str:
    """Why a tensor cannot be rotated by npu_rotary_mul; empty if it can."""
    if why := _why_not_at_all(one, product):
        return why
    if product is ASCEND_950:
        return "" if one.d <= _MOST_D else f"D is {one.d}; it can be {_MOST_D}"
    why = ""
    if graph != CAPTURED:
        why = _why_not_in_ge(one)
    if graph != GE and not why:
        why = _why_not_captured(one, product)
    return why


def _why_not_in_ge(one: Rotated) -> str:
    if one.mode != HALF:
        return "torchair makes npu_rotary_mul to RotaryMul, which rotates halves only"
    if one.d % _ROTARY_MUL_D:
        return f"D is {one.d}; RotaryMul takes multiples of {_ROTARY_MUL_D}"
    pairs = zip(one.sizes, one.cos, strict=True)
    broadcast = [number(x) for x, c in pairs if not same_size(x, c)]
    if None in broadcast:
        return f"{one}; run time alone knows how much reads one of cos"
    if math.prod(size or 1 for size in broadcast) > _ROTARY_MUL_BROADCAST:
        return f"{one}; one of cos can be for {_ROTARY_MUL_BROADCAST} of x"
    return ""


def _why_not_captured(one: Rotated, product: Product) -> str:
    if product is ATLAS_INFERENCE:
        return f"npu_rotary_mul has no aclnn operator on {product.key}"
    if one.d >= _ACLNN_D:
        return f"D is {one.d}; it must be below {_ACLNN_D}"
    batch = number(one.sizes[0]) or 1
    most = max(batch, one.n) if one.mode == HALF else batch * one.n
    if most >= _ACLNN_HEADS:
        return f"{one}; B and N must be below {_ACLNN_HEADS}"
    if all(same_size(c, 1) for c in one.cos[:3]) and not any(
        same_size(x, 1) for x in one.sizes[:3]
    ):
        return f"{one}; the kernel computes nothing with one row of cos for all"
    shared = same_size(one.cos[0], 1) and not same_size(one.sizes[0], 1)
    if one.mode == INTERLEAVE and not (shared or same_size(one.sizes[0], 1)):
        return f"{one}; interleaved, cos must be the same for all B"
    if one.mode == HALF and one.heads == 1 and shared:
        return f"{one}; the tiling refuses this for few steps"
    return ""
