"""A whole layer, from float activations to the output, in one call of the compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .activations import NUMBERS, Arithmetic

__all__ = ["quant_layer"]


def quant_layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None,
    output_dtype: torch.dtype,
    folds: bool,
    offset: Tensor | None,
    arithmetic: Arithmetic | None,
    scale_reciprocal: Tensor | None,
    input_offset: Tensor | None,
) -> Tensor | None:
    """`dynamic_quant` or `static_quant`, then `quant_matmul`, or None if the compiled kernel does
    not compute that.

    Args:
        x: float16, bfloat16 or float32, (..., k).
        weight, scale, bias, output_dtype, folds, offset: as `quant_matmul` takes them; the weight
            in ND, int8 (n, k) or int32 (n, k/8).
        arithmetic: of dynamic_quant; None for static_quant.
        scale_reciprocal, input_offset: of static_quant, in the dtype of x.

    Raises:
        NotFiniteError, ShortStorageError: as `quant_matmul` raises them.
    """
    return native.layer(
        x,
        weight,
        scale,
        bias,
        output_dtype,
        None if arithmetic is None else NUMBERS[arithmetic],
        scale_reciprocal,
        input_offset,
        folds=folds,
        offset=offset,
    )
