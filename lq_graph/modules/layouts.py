"""Layouts of weights, without a device: int4 in int32, and FRACTAL_NZ."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..backends.cpu import check_held
from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import INT4_PER_INT32, NZ_ROW_BYTES, PartialGroupError, storage_k
from ..rules.tables import STORAGE_DTYPES, dtype_name, storage_name

__all__ = ["from_fractal_nz", "pack_int4", "to_fractal_nz", "unpack_int4"]


def pack_int4(values: Tensor) -> Tensor:
    """Pack int4 values, eight to an int32, along the last dim; `unpack_int4` is the inverse.

    Value i of a group of eight is in bits 4i..4i+3, two's complement.

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
    check_held("pack_int4", values=values)
    if values.numel():
        low, high = (int(v) for v in values.aminmax())
        if low < -8 or high > 7:
            raise LinearQuantValueError(
                f"pack_int4: values range over {low}..{high}; int4 holds -8..7. What to do: clamp "
                "after rounding, or quantize with a larger scale."
            )
    return kernels.pack_int4(values.to(torch.int8))


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
            f"unpack_int4: packed is {dtype_name(packed.dtype)}; allowed is int32 (int4)."
        )
    if packed.dim() == 0:
        raise LinearQuantValueError("unpack_int4: packed has no dims; allowed is (..., k/8).")
    check_held("unpack_int4", packed=packed)
    return kernels.unpack_int4(packed)


def to_fractal_nz(weight: Tensor) -> Tensor:
    """A weight as blocks of FRACTAL_NZ (ACL format 29), on any device; inverse: `from_fractal_nz`.

    The bytes equal those of `torch_npu.npu_format_cast(weight, 29)`, for int32 (int4) with
    customize_dtype=3.

    Args:
        weight: int8 (..., n, k), or int32 (..., n, k/8) carrying int4.

    Returns:
        The dtype of weight, (..., ceil(k/C0), ceil(n/16), 16, C0), zero padded; C0 is 32 for int8
        and 8 words, 64 int4, for int32.

    Raises:
        LinearQuantTypeError: another dtype.
        LinearQuantValueError: fewer than 2 dims, or an empty weight.

    Source: CANN's description of FRACTAL_NZ; torch_npu-npu_format_cast.md for C0.
    """
    c0 = _c0("to_fractal_nz", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise LinearQuantValueError(
            f"to_fractal_nz: weight has shape {tuple(weight.shape)}; allowed is (..., n, k), not "
            "empty."
        )
    check_held("to_fractal_nz", weight=weight)
    return kernels.nd_to_nz(weight, c0)


def from_fractal_nz(blocks: Tensor, n: int, k: int) -> Tensor:
    """Inverse of `to_fractal_nz`.

    Args:
        blocks: int8 or int32, (..., k1, n1, 16, C0).
        n: rows of the weight, n1 = ceil(n/16).
        k: values in a row, int4 values for int32; k1 = ceil(k/32) for int8, ceil(k/64) for int4.

    Returns:
        int8 (..., n, k) or int32 (..., n, k/8).

    Raises:
        LinearQuantTypeError: another dtype.
        LinearQuantValueError: blocks whose shape does not fit n and k.
    """
    c0 = _c0("from_fractal_nz", blocks)
    todo = "What to do: pass the n and k of the weight before padding."
    try:
        columns = storage_k(k, blocks.dtype)
    except PartialGroupError as error:
        raise LinearQuantValueError(f"from_fractal_nz: {error.problem}. {todo}") from None
    wanted = kernels.nz_shape(n, columns, c0)
    if n < 1 or k < 1 or tuple(blocks.shape[-4:]) != wanted:
        raise LinearQuantValueError(
            f"from_fractal_nz: blocks have shape {tuple(blocks.shape)}; for n = {n} and k = {k} of "
            f"{storage_name(blocks.dtype)} it must end in {wanted}. {todo}"
        )
    check_held("from_fractal_nz", blocks=blocks)
    return kernels.nz_to_nd(blocks, n, columns)


def _c0(name: str, tensor: Tensor) -> int:
    """Elements in a row of a block: 32 bytes."""
    if tensor.dtype not in STORAGE_DTYPES:
        raise LinearQuantTypeError(
            f"{name}: the weight is {dtype_name(tensor.dtype)}; allowed are "
            f"{' and '.join(map(storage_name, STORAGE_DTYPES))}."
        )
    return NZ_ROW_BYTES // tensor.element_size()
