"""What the reported chip computes, if chips differ."""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host.rules import A2, A950, P310, soc_family
from lq_graph.kernels import Arithmetic, for_rows, is_cut, s19

__all__ = ["dynamic_arithmetic", "scale_as_read"]

# by family; the kernels of hicann/ops-nn, quant/dynamic_quant/op_kernel
_DYNAMIC_QUANT = {
    A2: Arithmetic.MULTIPLY,
    P310: Arithmetic.HALF,
    A950: Arithmetic.DIVIDE,
}
# matmul/quant_batch_matmul_v3/op_kernel/arch35/qbmm_cube_on_the_fly.h
_CUTS_SCALE = (A950,)


def dynamic_arithmetic(
    soc: str, k: int, *, smooth: bool = False, groups: bool = False
) -> Arithmetic:
    """The arithmetic of the DynamicQuant kernel that a chip chooses for rows of k values.

    Args:
        soc: name of the chip, of one of the families of `rules`.
        k: values in a row.
        smooth, groups: whether there are smooth_scales, and a group_index.
    """
    return for_rows(_DYNAMIC_QUANT[soc_family(soc) or ""], k, smooth=smooth, groups=groups)


def scale_as_read(
    soc: str,
    scale: Tensor,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: torch.dtype,
) -> Tensor:
    """The scale of a quantized matmul by which a chip's kernel multiplies.

    Args:
        soc: name of the chip.
        scale, pertoken_scale, bias, output_dtype: of the call.
    """
    cuts = soc_family(soc) in _CUTS_SCALE and is_cut(
        scale, pertoken_scale, bias, output_dtype, per_tensor=scale.shape[-1] == 1
    )
    return s19(scale) if cuts else scale
