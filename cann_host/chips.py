"""What the reported chip computes, if chips differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cann_host.rules import A2, A950, P310, soc_family
from lq_graph.kernels import Arithmetic, for_rows, is_cut, s19

__all__ = [
    "NormRoundings",
    "add_rms_norm_quant_roundings",
    "add_rms_norm_roundings",
    "dynamic_arithmetic",
    "fused_norm_arithmetic",
    "scale_as_read",
]

# by family; the kernels of hicann/ops-nn, quant/dynamic_quant/op_kernel
_DYNAMIC_QUANT = {
    A2: Arithmetic.MULTIPLY,
    P310: Arithmetic.HALF,
    A950: Arithmetic.DIVIDE,
}
# matmul/quant_batch_matmul_v3/op_kernel/arch35/qbmm_cube_on_the_fly.h
_CUTS_SCALE = (A950,)
# norm/add_rms_norm_dynamic_quant/op_kernel, for rows of any length
_FUSED_NORM = {A2: Arithmetic.RECIPROCAL, A950: Arithmetic.DIVIDE}


class NormRoundings(NamedTuple):
    """Which float32 values a kernel rounds to x's dtype before it goes on."""

    total: bool = False  # the sum of x1 and x2
    normalized: bool = False  # before it is multiplied by gamma
    product: bool = False  # with gamma


# norm/add_rms_norm/op_kernel and its tests/assets/golden.py: add_rms_golden_v1 and _v2. 310P runs
# the kernels of A2.
_ADD_RMS_NORM = {
    A2: NormRoundings(total=True, normalized=True),
    P310: NormRoundings(total=True, normalized=True),
    A950: NormRoundings(),
}


def add_rms_norm_roundings(soc: str) -> NormRoundings:
    """What AddRmsNorm rounds on a chip."""
    return _ADD_RMS_NORM[soc_family(soc) or ""]


def add_rms_norm_quant_roundings(
    soc: str, dtype: torch.dtype, *, beta: bool, per_tensor: bool
) -> NormRoundings:
    """What AddRmsNormQuant rounds on a chip: norm/add_rms_norm_quant, op_kernel and the golden of
    tests/st (executor_aclnnAddRmsNormQuant.py). On A2 the kernel for no more rows than vector cores
    (add_rms_norm_quant_single_n.h) rounds a bfloat16 sum too. The golden does not, nor does this.

    Args:
        soc: name of the chip.
        dtype: of x1.
        beta: whether beta is given.
        per_tensor: whether it is the kernel for one scale.
    """
    if soc_family(soc) == A950 or per_tensor:
        return NormRoundings()
    if dtype == torch.float16:
        return NormRoundings(total=True, normalized=True, product=True)
    return NormRoundings(total=beta)


def fused_norm_arithmetic(soc: str) -> Arithmetic:
    """The arithmetic of AddRmsNormDynamicQuant's kernels on a chip."""
    return _FUSED_NORM[soc_family(soc) or ""]


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
