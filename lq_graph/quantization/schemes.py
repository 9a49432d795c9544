"""The schemes quantize() knows: what a layer's weight and activations become."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind

__all__ = ["SCHEMES", "A4W4Dynamic", "A8W8Dynamic", "A8W8Static", "Config"]


@dataclass(frozen=True)
class A8W8Dynamic:
    """int8 weights per channel, symmetric; int8 activations per token, as they come.

    Attributes:
        output_dtype: torch.float16 or bfloat16; None for that of each layer's weight.
    """

    output_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class A4W4Dynamic:
    """int4 weights per channel, symmetric; int4 activations per token, as they come.

    Attributes:
        output_dtype: torch.float16 or bfloat16; None for that of each layer's weight.
    """

    output_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class A8W8Static:
    """int8 weights per channel, symmetric; int8 activations with one scale for the whole tensor,
    from calibration.

    Attributes:
        output_dtype: torch.float16 or bfloat16; None for that of each layer's weight.
        symmetric: activations without a zero point.
        int8_between: where an nn.Sequential that calibration finds called as a whole feeds one
            quantized layer straight into another, or through a ReLU, the first gives int8 and the
            second takes it as it is. What else reads the first one's output later, a hook for
            example, gets int8.
    """

    output_dtype: torch.dtype | None = None
    symmetric: bool = False
    int8_between: bool = True


Config = A8W8Dynamic | A8W8Static | A4W4Dynamic

SCHEMES: dict[type, LayerKind] = {
    A8W8Dynamic: A8W8_DYNAMIC,
    A8W8Static: A8W8_STATIC,
    A4W4Dynamic: A4W4_DYNAMIC,
}
