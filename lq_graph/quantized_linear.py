"""QuantizedLinear: float activations in and out, the int8 product between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .module import LinearQuant

__all__ = ["QuantizedLinear", "quantize_per_tensor", "quantize_per_token"]


def quantize_per_tensor(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Static activation quantization, one scale for the whole tensor.

    Args:
        x: a float dtype, any shape.
        scale: float32 (1,), the size of one step.
        offset: float32 (1,), the integer that stands for 0.

    Returns:
        int8, x's shape: x / scale + offset, rounded half to even, clamped.

    Source: torch_npu.npu_quantize (which takes the reciprocal of the scale).
    """
    steps = x.to(torch.float32) / scale + offset
    return steps.round().clamp(-128, 127).to(torch.int8)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic activation quantization, one scale for each row.

    Args:
        x: a float dtype, (m, k).

    Returns:
        int8 (m, k) and float32 (m,), the largest magnitude of each row over 127; 1 for a row of
        zeros.

    Source: torch_npu.npu_dynamic_quant.
    """
    x = x.to(torch.float32)
    scale = x.abs().max(-1).values / 127.0  # torchair has a converter for max, none for amax
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (x / scale.unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8), scale


class QuantizedLinear(nn.Module):
    """A linear layer that quantizes its float input and runs a LinearQuant.

    Args:
        linear: int8, with output_dtype float16 or bfloat16. With pertoken_scale=True the input is
            quantized per token as it comes (dynamic), else by input_scale and input_offset
            (static).
        input_scale: float32 (1,), static only.
        input_offset: float32 (1,), static only; None for a symmetric scale.
        weight_scale: float32 (n,), static only: the scale of the weight alone, where it is known.
            The layer does not read it; files do.
        float_bias: the bias before it was rounded to the int32 one of `linear`, likewise.

    Shape:
        input (..., in_features) to output (..., out_features).
    """

    input_scale: Tensor | None
    input_offset: Tensor | None
    weight_scale: Tensor | None
    float_bias: Tensor | None

    def __init__(
        self,
        linear: LinearQuant,
        input_scale: Tensor | None = None,
        input_offset: Tensor | None = None,
        *,
        weight_scale: Tensor | None = None,
        float_bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        if input_scale is not None and input_offset is None:
            input_offset = torch.zeros_like(input_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_offset", input_offset)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("float_bias", float_bias)

    @property
    def dynamic(self) -> bool:
        """Whether the input is quantized per token, as it comes."""
        return self.input_scale is None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.input_scale is None or self.input_offset is None:
            quantized, scale = quantize_per_token(rows)
            out: Tensor = self.linear(quantized, scale)
        else:
            out = self.linear(quantize_per_tensor(rows, self.input_scale, self.input_offset))
        return out.view(*x.shape[:-1], out.shape[-1])

    def extra_repr(self) -> str:
        return "dynamic, per token" if self.dynamic else "static, per tensor"

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # .half() and the like move the module; the dtypes of its scales are part of the numbers
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        buffers = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            if before is not None:
                self._buffers[name] = keep_dtype(before)
        return self
