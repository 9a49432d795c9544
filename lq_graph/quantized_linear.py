"""QuantizedLinear: float activations in and out, the int8 or int4 product between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LinearQuantTypeError
from .formats import dtype_name
from .module import LinearQuant, keeping_dtypes

__all__ = ["QuantizedLinear"]

_dynamic_quant = torch.ops.lq_graph.dynamic_quant.default
_static_quant = torch.ops.lq_graph.static_quant.default


class QuantizedLinear(nn.Module):
    """A linear layer that quantizes its float input and runs a LinearQuant.

    Args:
        linear: int8, or int32 carrying int4 (dynamic only). With pertoken_scale=True the input is
            quantized per token as it comes (dynamic), else by input_scale and input_offset
            (static).
        input_scale: float32 (1,), the size of one step; static only.
        input_offset: float32 (1,), the integer that stands for 0, static only; None for a
            symmetric scale.
        input_dtype: float16 or bfloat16, of the input of a static layer; default the output's.
        weight_scale: float32 (n,), static only: the scale of the weight alone, where it is known.
            The layer does not read it; files do.
        float_bias: the bias before it was rounded to the int32 one of `linear`, likewise.
        output_scale, output_offset: float32 (1,), of an int8 output: the input_scale and
            input_offset of the layer that takes it.

    Shape:
        input (..., in_features) to output (..., out_features). A static layer also takes int8, as
        a layer before it with int8 output gives.
    """

    input_scale: Tensor | None
    input_offset: Tensor | None
    weight_scale: Tensor | None
    float_bias: Tensor | None
    output_scale: Tensor | None
    output_offset: Tensor | None
    _scale_reciprocal: Tensor | None
    _offset: Tensor | None

    def __init__(
        self,
        linear: LinearQuant,
        input_scale: Tensor | None = None,
        input_offset: Tensor | None = None,
        *,
        input_dtype: torch.dtype | None = None,
        weight_scale: Tensor | None = None,
        float_bias: Tensor | None = None,
        output_scale: Tensor | None = None,
        output_offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.input_dtype = input_dtype or linear.output_dtype
        if input_scale is not None and input_offset is None:
            input_offset = torch.zeros_like(input_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_offset", input_offset)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("float_bias", float_bias)
        self.register_buffer("output_scale", output_scale)
        self.register_buffer("output_offset", output_offset)
        # what the operator reads, made of the two above whenever they change
        self.register_buffer("_scale_reciprocal", None, persistent=False)
        self.register_buffer("_offset", None, persistent=False)
        self._derive()

    def _derive(self) -> None:
        if self.input_scale is None or self.input_offset is None:
            return
        if self.input_dtype not in (torch.float16, torch.bfloat16):
            raise LinearQuantTypeError(
                f"QuantizedLinear: input_dtype is {dtype_name(self.input_dtype)}; allowed are "
                "float16 and bfloat16. What to do: name the dtype the layer's input has."
            )
        self._scale_reciprocal = self.input_scale.reciprocal().to(self.input_dtype)
        self._offset = self.input_offset.to(self.input_dtype)

    @property
    def weight(self) -> Tensor:
        """The quantized weight: models ask a linear layer's weight for its dtype and device."""
        return self.linear.weight

    @property
    def in_features(self) -> int:
        """k."""
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        """n."""
        return self.linear.out_features

    @property
    def dynamic(self) -> bool:
        """Whether the input is quantized per token, as it comes."""
        return self.input_scale is None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor
        if self._scale_reciprocal is None:
            quantized, scale = self.quantize_rows(rows, self.linear.weight.dtype)
            out = self.linear(quantized, scale)
        elif x.dtype == torch.int8:
            out = self.linear(rows)
        else:
            if x.dtype != self.input_dtype:
                raise LinearQuantTypeError(
                    f"QuantizedLinear: x is {dtype_name(x.dtype)}; this static layer was made for "
                    f"{dtype_name(self.input_dtype)}. What to do: pass "
                    f"x.to({self.input_dtype}), or quantize the model in the dtype it runs in."
                )
            out = self.linear(_static_quant(rows, self._scale_reciprocal, self._offset))
        return out.view(*x.shape[:-1], out.shape[-1])

    def quantize_rows(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Quantize a dynamic layer's input, (m, k); `lq_graph.dynamic_quant`."""
        out: tuple[Tensor, Tensor] = _dynamic_quant(rows, dtype=dtype)
        return out

    def to_float(self, out: Tensor) -> Tensor:
        """An output as the numbers it stands for: int8 ones dequantized, others as they are."""
        if self.output_scale is None or self.output_offset is None or out.dtype != torch.int8:
            return out
        return (out.to(torch.float32) - self.output_offset) * self.output_scale

    def extra_repr(self) -> str:
        if self.dynamic:
            return "dynamic, per token"
        return f"static, per tensor, input_dtype={dtype_name(self.input_dtype)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # .half() and the like move the module; the dtypes of its scales are part of the numbers
        super()._apply(keeping_dtypes(fn), recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derive()
