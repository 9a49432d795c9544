"""Packed forms, each written once: int4 values in int32, and the 64-bit scale of QuantBatchMatmul.

Sources: torch_npu.contrib.module.LinearQuant (int4 in int32); aclnnTransQuantParamV2 document and
op_kernel/trans_quant_param_v2.h (hicann/ops-nn, quant/trans_quant_param_v2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import NotFiniteError, PartialGroupError
from .memory import aligned, cache_sized, row_major
from .symbolic import guard_or_false

__all__ = [
    "INT4_PER_INT32",
    "STORAGE_DTYPES",
    "logical_k",
    "pack_int4",
    "pack_int4_in_graph",
    "pack_scale",
    "s19",
    "s19_at_least",
    "storage_k",
    "unpack_finite_scale",
    "unpack_int4",
    "unpack_scale",
]

INT4_PER_INT32 = 8

# storage dtype of x1 and weight -> values in an element of the last dim
STORAGE_DTYPES: dict[torch.dtype, int] = {torch.int8: 1, torch.int32: INT4_PER_INT32}

# Layout of the packed 64-bit scale.
_SCALE_MASK = 0xFFFFE000  # the float32 bits the fixed-point pipe keeps: sign, exponent, 10 mantissa
_SIGNED_MASK = _SCALE_MASK - (1 << 32)  # the same as an int32
_OFFSET_SHIFT = 37
_OFFSET_MASK = 0x1FF
_VALID_BIT = 1 << 46


# ---- int4 in int32 ----


def storage_k(k: int, dtype: torch.dtype) -> int:
    """Elements of the last dim that store k values: k/8 for int32, which holds eight int4 values, k
    for any other dtype. `logical_k` is the inverse.

    Args:
        k: number of values; may be a symbol. A symbol whose value only run time knows counts as a
            multiple of 8.
        dtype: of the storage.

    Raises:
        PartialGroupError: int32, and k is not a multiple of 8.
    """
    group = STORAGE_DTYPES.get(dtype, 1)
    if group == 1:
        return k
    partial = k % group != 0
    if type(partial) is not bool:
        partial = guard_or_false(partial)
    if partial:
        raise PartialGroupError(k, group)
    return k // group


def logical_k(elements: int, dtype: torch.dtype) -> int:
    """The number of values that these elements of the last dim store; inverse of `storage_k`."""
    group = STORAGE_DTYPES.get(dtype, 1)
    return elements if group == 1 else elements * group


def pack_int4(values: Tensor) -> Tensor:
    """Pack groups of eight int4 values of the last dim into int32; see `unpack_int4`.

    Args:
        values: int8, (..., k), values in -8..7 (not checked here).

    Returns:
        int32, (..., k / 8).

    Raises:
        PartialGroupError: k is not a multiple of 8.
    """
    shape = (*values.shape[:-1], storage_k(values.shape[-1], torch.int32))
    if not values.numel():  # no view of it has another dtype
        return values.new_empty(shape, dtype=torch.int32)
    pairs = aligned(values).view(torch.int16).reshape(-1)  # two values each, the first one low
    packed = torch.empty(pairs.shape, dtype=torch.uint8, device=values.device)
    for part in cache_sized(pairs.numel()):
        pair = pairs[part]
        # the second value moves down beside the first: 0x0B0A becomes 0xBA
        packed[part] = ((pair >> 4) & 0xF0).bitwise_or_(pair & 0xF)
    return packed.view(torch.int32).view(shape)


def pack_int4_in_graph(values: Tensor) -> Tensor:
    """`pack_int4`, made of operators that torchair has converters for; k may be a symbol."""
    nibbles = values.to(torch.int32).reshape(*values.shape[:-1], -1, INT4_PER_INT32)
    packed = nibbles[..., -1]  # the last one is the highest and holds the sign
    for i in range(INT4_PER_INT32 - 2, -1, -1):
        packed = packed * 16 + nibbles[..., i].remainder(16)
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack int32 that holds eight int4 values; value i is in bits 4i..4i+3, two's complement.

    Args:
        packed: int32, (..., k / 8).

    Returns:
        int8, (..., k), values in -8..7.
    """
    shape = (*packed.shape[:-1], logical_k(packed.shape[-1], torch.int32))
    if not packed.numel():
        return packed.new_empty(shape, dtype=torch.int8)
    pairs = row_major(packed).view(torch.uint8).reshape(-1)
    values = torch.empty(2 * pairs.numel(), dtype=torch.int8, device=packed.device)
    words = values.view(torch.int16)
    for part in cache_sized(pairs.numel()):
        pair = pairs[part].to(torch.int16)
        word = words[part]
        # 0xBA becomes 0x0B0A; (x ^ 8) - 8 in each byte is the sign extension
        word.copy_(((pair << 4) | pair).bitwise_and_(0x0F0F).bitwise_xor_(0x0808))
        word.view(torch.int8).sub_(8)
    return values.view(shape)


# ---- the 64-bit scale ----


def s19(scale: Tensor) -> Tensor:
    """Truncate float32 to the 19 bits the fixed-point pipe keeps (sign, exponent, 10 mantissa).

    Args:
        scale: float32, any shape.

    Returns:
        float32, the same shape.
    """
    bits = scale.contiguous().view(torch.int32)
    return (bits & _SIGNED_MASK).view(torch.float32)


def s19_at_least(scale: Tensor) -> Tensor:
    """The smallest 19-bit scale not below each positive float32 scale; see `s19`."""
    bits = scale.contiguous().view(torch.int32)
    return ((bits + ~_SIGNED_MASK) & _SIGNED_MASK).view(torch.float32)


def pack_scale(scale: Tensor, offset: Tensor | None = None, round_mode: int = 0) -> Tensor:
    """Fold a scale and an offset into the 64-bit parameter QuantBatchMatmul reads.

    Bits 13..31 hold the scale's top 19 bits, bits 37..45 the offset as 9-bit two's complement
    (rounded half to even, clamped to [-256, 255]), bit 46 is set.

    Args:
        scale: float32, (1,), (n,) or (1, n).
        offset: float32, broadcastable with scale, or None.
        round_mode: 0 truncates the scale to 19 bits, 1 rounds it half to even and subnormals to
            zero, but truncates infinity and NaN, which can turn NaN into infinity.

    Returns:
        int64, the broadcast shape of scale and offset.

    Source: op_kernel/trans_quant_param_v2.h, the same on every chip.
    """
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        exponent = bits & 0x7F800000
        rounded = bits + 0xFFF + ((bits >> 13) & 1)
        rounded = torch.where(exponent == 0x7F800000, bits, rounded)
        bits = torch.where(exponent == 0, bits & 0x80000000, rounded)
    packed = (bits & _SCALE_MASK) | _VALID_BIT
    if offset is not None:
        # the chip's cast turns NaN into 0
        whole = torch.round(offset).nan_to_num(0.0, 255, -256).clamp(-256, 255)
        offset9 = whole.to(torch.int64) & _OFFSET_MASK
        packed = packed | (offset9 << _OFFSET_SHIFT)
    return packed


def unpack_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Read back what `pack_scale` wrote.

    Args:
        packed: int64 (or uint64), any shape.

    Returns:
        The 19-bit scale as float32 and the offset as int32, both of packed's shape.
    """
    word = packed.view(torch.int64)
    low = word & _SCALE_MASK
    # int64 -> int32 must wrap, not saturate: go through the signed value
    scale = torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32).view(torch.float32)
    offset = (word >> _OFFSET_SHIFT) & _OFFSET_MASK
    return scale, torch.where(offset >= 256, offset - 512, offset).to(torch.int32)


def unpack_finite_scale(packed: Tensor) -> tuple[Tensor, Tensor]:
    """`unpack_scale`, and a check that the scale is finite. Reads the values.

    Raises:
        NotFiniteError: it holds infinity or NaN.
    """
    scale, offset = unpack_scale(packed)
    if not bool(scale.isfinite().all()):
        raise NotFiniteError
    return scale, offset
