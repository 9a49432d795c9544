"""aclnnRopeWithSinCosCache and V2: query and key rotated by rows of a cache of cos and sin.

Source: hicann/ops-transformer 9.1.0, posembedding/rope_with_sin_cos_cache: its documents,
aclnn_rope_with_sin_cos_cache.cpp (161002), rope_with_sin_cos_cache_tiling.cpp (561002).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, soc_family
from .refusal import INVALID, TILING, Refusal, one_of

__all__ = ["MropeCall", "check_mrope"]

_DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes
_SECTIONS = ((16, 24, 24), (8, 12, 12), (24, 20, 20), (16, 16, 16, 16))
_ALIGNED = 64  # bytes
_BLOCK = 32  # bytes
_UNIFIED_BUFFER = 192 * 1024  # bytes


class MropeCall(NamedTuple):
    """A call of RopeWithSinCosCache.

    Attributes:
        soc: name of the chip.
        positions: (tokens,), or (sections, tokens).
        query, key: (tokens, heads * head size).
        cache: (positions, D); a row has D / 2 cosines, then D / 2 sines. The first D values of a
            head rotate.
        section: how many of the D / 2 angles are of each row of positions; None or a first 0: one
            row of positions for all.
        head_size: of query and key.
        is_neox: whether halves of a head rotate; else pairs.
        cache_mode: 0, the sections one after another; 1, each third angle is of a section.
        strides: of query and key.
    """

    soc: str
    positions: TensorDesc
    query: TensorDesc
    key: TensorDesc
    cache: TensorDesc
    section: tuple[int, ...] | None
    head_size: int
    is_neox: bool = True
    cache_mode: int = 0
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def sections(self) -> tuple[int, ...]:
        """Empty if all angles are of one position."""
        return self.section if self.section and self.section[0] > 0 else ()


@lru_cache(maxsize=4096)
def check_mrope(call: MropeCall) -> Refusal | None:
    """Why a RopeWithSinCosCache is refused; None if it is accepted."""
    if call.cache_mode not in (0, 1):
        return Refusal(f"cacheMode is {call.cache_mode}; it must be 0 or 1", INVALID)
    return (
        _check_dtypes(call)
        or _check_shapes(call)
        or _check_section(call)
        or _check_tiling(call)
        or _check_kernel(call)
    )


def _check_dtypes(call: MropeCall) -> Refusal | None:
    family = soc_family(call.soc)
    if family is None:
        return Refusal(f"cann_host has no rules for {call.soc}", None)
    if family not in (A2, A950):
        return Refusal(f"{call.soc} does not have RopeWithSinCosCache", INVALID)
    if call.positions.dtype != "int64":
        return Refusal(f"positions is {call.positions.dtype}; it must be int64", INVALID)
    query = call.query.dtype
    if query not in _DTYPES:
        return Refusal(f"queryIn is {query}; {call.soc} allows {one_of(_DTYPES)}", INVALID)
    for name, other in (("keyIn", call.key), ("cosSinCache", call.cache)):
        if other.dtype != query:
            return Refusal(f"{name} is {other.dtype} and queryIn {query}", INVALID)
    return None


def _check_shapes(call: MropeCall) -> Refusal | None:
    tensors = {"queryIn": call.query, "keyIn": call.key, "cosSinCache": call.cache}
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2:
            return Refusal(f"{name} has shape {tensor.shape}; it must have 2 dims", INVALID)
    for name, tensor in (*tensors.items(), ("positions", call.positions)):
        if 0 in tensor.shape:
            return Refusal(f"{name} has shape {tensor.shape}; it must not be empty", INVALID)
    if call.query.shape[0] != call.key.shape[0]:
        shapes = f"queryIn has shape {call.query.shape} and keyIn {call.key.shape}"
        return Refusal(f"{shapes}; they must have as many tokens", INVALID)
    return None


def _check_section(call: MropeCall) -> Refusal | None:
    section, d = call.section, call.cache.shape[1]
    if section is not None:
        if len(section) not in (3, 4) or min(section) < 0:
            reason = f"mropeSection is {section}; it must have 3 or 4 values, none below 0"
            return Refusal(reason, INVALID)
        if section[0] > 0 and sum(section) * 2 != d:
            reason = f"mropeSection is {section}; its sum must be half of D of cosSinCache, {d}"
            return Refusal(reason, INVALID)
        if section[0] > 0 and section not in _SECTIONS:
            allowed = one_of(map(str, _SECTIONS))
            return Refusal(f"mropeSection is {section}; it must be {allowed}", INVALID)
    if call.head_size == 0:
        return Refusal("headSize is 0", INVALID)
    return None


def _check_tiling(call: MropeCall) -> Refusal | None:
    if call.section is not None and len(call.section) == 4 and call.cache_mode:
        return Refusal(f"cacheMode is 1 and mropeSection {call.section}; it must be 0", TILING)
    step, d = _ALIGNED // _DTYPES[call.query.dtype], call.cache.shape[1]
    for name, value in (("headSize", call.head_size), ("D of cosSinCache", d)):
        if value % step or value < 0:
            return Refusal(f"{name} is {value}; it must be a multiple of {step}", TILING)
    if call.head_size < d:
        reason = f"headSize is {call.head_size} and D of cosSinCache {d}; it must not be more"
        return Refusal(reason, TILING)
    return None


def _check_kernel(call: MropeCall) -> Refusal | None:
    """What CANN takes, and where the kernel reads something else, or nothing."""
    tokens, rows = call.query.shape[0], len(call.sections)
    want = (rows, tokens) if rows else (tokens,)
    if call.positions.shape != want:
        return _own(f"positions has shape {call.positions.shape}; it must be {want}")
    size = _DTYPES[call.query.dtype]
    for i, (name, tensor) in enumerate((("queryIn", call.query), ("keyIn", call.key))):
        width = tensor.shape[1]
        if width % call.head_size:
            return _own(f"{name} has shape {tensor.shape}; heads have {call.head_size} values")
        row, step = (width, 1) if call.strides is None else call.strides[i]
        if tokens == 1:
            row = width
        is_served = row == width if size == 4 else row >= width and row * size % _BLOCK == 0
        if step != 1 or not is_served:
            return _own(f"{name} has strides ({row}, {step}), which the kernel does not follow")
    d = call.cache.shape[1]
    copies = 5 if call.is_neox else 6  # of a head that rotates
    if _UNIFIED_BUFFER - 40 * d < 4 * (copies * d + 2 * call.head_size):
        return _own(f"headSize is {call.head_size}: a head does not fit a vector core")
    return None


def _own(reason: str) -> Refusal:
    return Refusal(f"{reason} (refused by cann_host)", None)
