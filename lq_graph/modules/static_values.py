"""Scale and bias of a static layer, from what is known about its input and its weight.

quantize() and the formats of checkpoints make them here, so that a file gives the layer bit for
bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import s19

__all__ = ["has_int32_bias", "static_bias", "static_scale", "weight_scale_of"]

_BF16, _I32, _I64 = torch.bfloat16, torch.int32, torch.int64
_ULPS = 2  # by which a product of two scales may be above the one that it stands for


def static_scale(input_scale: Tensor, weight_scale: Tensor, output: torch.dtype) -> Tensor:
    """float32 (n,): the scale of a layer's int32 product, input_scale * weight_scale.

    It has 19 bits (see `kernels.s19`) if the operator reads no more, which is so for every output
    but bfloat16; and if all products are what 19 bits give, rounded, as `quantize` chooses them.

    Args:
        input_scale: float32 (1,).
        weight_scale: float32 (n,).
        output: dtype of the layer's output.
    """
    product = input_scale * weight_scale
    cut = s19(product)
    near = product.view(_I32) - cut.view(_I32) <= _ULPS
    return cut if output != _BF16 or bool(near.all()) else product


def has_int32_bias(scale: Tensor, float_bias: Tensor, k: int, output: torch.dtype) -> bool:
    """Whether the float bias of a layer is rounded to int32, before the scale; else it is added
    after the scale. bfloat16 output takes both: the layers of `quantize` have an int32 bias, and
    scales of 19 bits.

    Args:
        scale: float32 (n,), see `static_scale`.
        float_bias: (n,).
        k: columns of the weight.
        output: dtype of the layer's output.
    """
    if output != _BF16:
        return True
    most = 2**31 - 1 - k * 255 * 127  # the product and the zero point need the rest
    small = _steps(float_bias, scale).abs() <= most
    return torch.equal(scale, s19(scale)) and bool(small.all())


def weight_scale_of(scale: Tensor, input_scale: Tensor) -> Tensor:
    """float32 (n,): the smallest weight scales whose product with the input's is not below a scale.

    Args:
        scale: float32 (n,).
        input_scale: float32 (1,).
    """
    found = (scale.double() / input_scale.double()).float()
    for _ in range(2):  # a step of it may be half a step of the product
        found = torch.where(input_scale * found < scale, found.nextafter(found * 2), found)
    return found


def static_bias(
    float_bias: Tensor | None, scale: Tensor, input_offset: Tensor, weight: Tensor
) -> Tensor | None:
    """int32 (n,): the bias that is added to the product before the scale.

        bias = round(float_bias / scale) - input_offset * sum(weight)

    None for no bias and no zero point.

    Args:
        float_bias: (n,), a float dtype.
        scale: float32 or float64 (n,), that of the int32 product, see `static_scale`.
        input_offset: (1,), the zero point of the input, an integer.
        weight: int8 (n, k).
    """
    offset = int(input_offset)
    if float_bias is None and not offset:
        return None
    bias = -offset * weight.sum(1, dtype=_I64).cpu()
    if float_bias is not None:
        bias = bias + _steps(float_bias, scale).round().to(_I64)
    return bias.to(weight.device, _I32)


def _steps(float_bias: Tensor, scale: Tensor) -> Tensor:
    return float_bias.detach().double().cpu() / scale.double().cpu()
