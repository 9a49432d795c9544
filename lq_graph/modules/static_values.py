"""The bias of a static layer, from what is known about its input and its weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["static_bias"]

_I32, _I64 = torch.int32, torch.int64


def static_bias(
    float_bias: Tensor | None, scale: Tensor, input_offset: Tensor, weight: Tensor
) -> Tensor | None:
    """int32 (n,): the bias that is added to the product before the scale.

        bias = round(float_bias / scale) - input_offset * sum(weight)

    None for no bias and no zero point.

    Args:
        float_bias: (n,), a float dtype.
        scale: float32 or float64 (n,), that of the int32 product.
        input_offset: (1,), the zero point of the input, an integer.
        weight: int8 (n, k).
    """
    offset = int(input_offset)
    if float_bias is None and not offset:
        return None
    bias = -offset * weight.sum(1, dtype=_I64).cpu()
    if float_bias is not None:
        steps = float_bias.detach().double().cpu() / scale.double().cpu()
        bias = bias + steps.round().to(_I64)
    return bias.to(weight.device, _I32)
