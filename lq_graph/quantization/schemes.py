"""The schemes of quantize(): dtypes and scales of a layer's weight and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind

__all__ = ["SCHEMES", "A4W4Dynamic", "A8W8Dynamic", "A8W8Static", "Scheme"]


@dataclass(frozen=True)
class A8W8Dynamic:
    """int8 weights with one scale for each channel, int8 activations with one scale for each token.

    Weights and activations are symmetric. The scale of a token is computed at each call.

    Attributes:
        output_dtype: torch.float16 or torch.bfloat16; None for the dtype of each layer's weight.

    Source: aclnnDynamicQuant.md and aclnnQuantMatmulV4.md (hicann/ops-nn).
    """

    output_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class A4W4Dynamic:
    """int4 weights with one scale for each channel, int4 activations with one scale for each token.

    Weights and activations are symmetric, and int4 is packed in int32. The scale of a token is
    computed at each call.

    Attributes:
        output_dtype: torch.float16 or torch.bfloat16; None for the dtype of each layer's weight.

    Source: aclnnDynamicQuant.md and aclnnQuantMatmulV4.md (hicann/ops-nn).
    """

    output_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class A8W8Static:
    """int8 weights with one scale for each channel, int8 activations with one scale for the tensor.

    Weights are symmetric. Scale and zero point of the activations come from calibration.

    Attributes:
        output_dtype: torch.float16 or torch.bfloat16; None for the dtype of each layer's weight.
        symmetric: whether the zero point of the activations is 0.
        int8_between: whether activations stay int8 between quantized layers that follow each other
            in an nn.Sequential, directly or with a ReLU between, if calibration calls this
            nn.Sequential as a whole. The first layer then returns int8, for example to a hook on
            it.

    Source: aclnnAscendQuantV3.md and aclnnQuantMatmulV4.md (hicann/ops-nn).
    """

    output_dtype: torch.dtype | None = None
    symmetric: bool = False
    int8_between: bool = True


Scheme = A8W8Dynamic | A8W8Static | A4W4Dynamic

SCHEMES: dict[type, LayerKind] = {
    A8W8Dynamic: A8W8_DYNAMIC,
    A8W8Static: A8W8_STATIC,
    A4W4Dynamic: A4W4_DYNAMIC,
}
