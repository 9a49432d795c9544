"""What the chip that is stood in for computes, where chips differ. Which one computes what is
`lq_graph.formats`' to say; here its answers are for the chip that is reported."""

from __future__ import annotations

import torch
from torch import Tensor

from lq_graph import plan_quant
from lq_graph.formats import Product, product_of_soc
from lq_graph.numerics import Arithmetic, s19
from lq_graph.plan import cuts_scale

__all__ = ["dynamic_arithmetic", "scale_as_read"]


def _product(soc: str) -> Product:
    product = product_of_soc(soc)
    if product is None:
        raise ValueError(f"cann_host has no arithmetic for {soc}")
    return product


def dynamic_arithmetic(
    soc: str, k: int, *, smooth: bool = False, groups: bool = False
) -> Arithmetic:
    """The arithmetic of the DynamicQuant kernel that a chip chooses for rows of k.

    Args:
        soc: name of the chip.
        k: values in a row.
        smooth, groups: whether there are smooth_scales, and a group_index.
    """
    return plan_quant.dynamic_arithmetic(_product(soc), k, smooth=smooth, groups=groups)


def scale_as_read(
    soc: str,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """The scale of a quantized matmul as a chip's kernel multiplies by it.

    Args:
        soc: name of the chip.
        scale, pertoken_scale, bias, output_dtype: of the call.
    """
    cuts = cuts_scale(_product(soc), scale, pertoken_scale, bias, output_dtype)
    return s19(scale) if cuts else scale
