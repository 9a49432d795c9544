"""Weight preparation: int4 packing."""

from __future__ import annotations

import torch
from torch import Tensor

from . import numerics
from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import dtype_name
from .numerics import INT4_PER_INT32

__all__ = ["pack_int4", "unpack_int4"]


def pack_int4(values: Tensor) -> Tensor:
    """Pack int4 values, eight to an int32, along the last dim; `unpack_int4` is the inverse.

    Value i of a group of eight sits in bits 4i..4i+3, two's complement.

    Args:
        values: an integer dtype, (..., k), k a multiple of 8, each value in -8..7.

    Returns:
        int32, (..., k/8), contiguous, on values' device.

    Raises:
        LinearQuantTypeError: values is not of a signed integer dtype.
        LinearQuantValueError: k is not a multiple of 8, or a value does not fit int4.

    Source: torch_npu.contrib.module.LinearQuant (int4 in int32).
    """
    if values.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        raise LinearQuantTypeError(
            f"pack_int4: values is {dtype_name(values.dtype)}; allowed are int8, int16, int32 and "
            "int64. What to do: quantize first, then pass the integers."
        )
    if values.dim() == 0 or values.shape[-1] % INT4_PER_INT32:
        raise LinearQuantValueError(
            f"pack_int4: values has shape {tuple(values.shape)}; the last dim (k) must be a "
            f"multiple of {INT4_PER_INT32}. What to do: pad k with zeros in x1 and weight alike."
        )
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        if low < -8 or high > 7:
            raise LinearQuantValueError(
                f"pack_int4: values range over {low}..{high}; int4 holds -8..7. What to do: clamp "
                "after rounding, or quantize with a larger scale."
            )
    return numerics.pack_int4(values)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`.

    Args:
        packed: int32, (..., k/8).

    Returns:
        int8, (..., k), values in -8..7.

    Raises:
        LinearQuantTypeError: packed is not int32.
        LinearQuantValueError: packed has no dims.
    """
    if packed.dtype != torch.int32:
        raise LinearQuantTypeError(
            f"unpack_int4: packed is {dtype_name(packed.dtype)}; allowed is int32, eight int4 each."
        )
    if packed.dim() == 0:
        raise LinearQuantValueError("unpack_int4: packed has no dims; allowed is (..., k/8).")
    return numerics.unpack_int4(packed)
