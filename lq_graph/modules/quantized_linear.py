"""QuantizedLinear: float in and out, with an int8 or int4 product between."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..backends.fake import check_dynamic_quant, check_static_quant
from ..backends.layer_names import named
from ..backends.npu import cast_format, format_of
from ..backends.traced import check_traced
from ..errors import LinearQuantError, LinearQuantTypeError
from ..rules.tables import ND, dtype_name
from .float_view import FloatView
from .linear_quant import LinearQuant, keeping_dtypes
from .one_call import in_one_call
from .quantizer import Forms, quantizer_of, shared
from .split import SPLIT
from .supported import LayerKind

if TYPE_CHECKING:
    from .merged import MergedLinear

__all__ = ["QuantizedLinear", "merged_of"]

_dynamic_quant = torch.ops.lq_graph.dynamic_quant.default
_static_quant = torch.ops.lq_graph.static_quant.default
# a layer's quantizer: what static_quant reads, and its forms for fused operators
_QUANTIZER = ("_scale_reciprocal", "_offset")
_FORMS = tuple(f"_{name}" for name in Forms._fields)


class QuantizedLinear(nn.Module):
    """A linear layer that quantizes its float input and runs a LinearQuant.

    It has the attributes of nn.Linear: `in_features`, `out_features`, `weight` and `bias`. `weight`
    and `bias` are floats that are computed from the quantized tensors of `linear` when they are
    read. They cannot be written.

    Args:
        linear: int8, or int32 carrying int4 (dynamic only). With pertoken_scale=True the layer is
            dynamic: it quantizes its input per token. Else it is static and quantizes with
            input_scale and input_offset.
        input_scale: float32 (1,), static only: the scale of the input.
        input_offset: float32 (1,), static only: the zero point of the input, an integer of -128 to
            127; None for 0.
        input_dtype: float16 or bfloat16: the dtype of a static layer's input, and of `weight` and
            `bias`; default the output's dtype.
        weight_scale: float32 (n,), static only: the weight's own scale, if it is known. The layer
            does not compute with it; checkpoints hold it.
        float_bias: (n,), a float dtype: the bias before it was rounded to int32, if it is known.
            The layer does not compute with it; checkpoints hold it.
        output_scale: float32 (1,), for int8 output: the input_scale of the layer that takes it.
        output_offset: float32 (1,), for int8 output: the input_offset of that layer.
        takes_int8: static only: whether the layer takes an int8 input, already quantized with
            input_scale and input_offset. Set it only for a layer whose input is the int8 output of
            another layer.

    `input_scale` and `input_offset` may be assigned, loaded, or written in place. torch.compile
    reads them when it makes a graph. Otherwise the layer does not notice two kinds of writes: one
    for which torch counts no version (`input_scale.data.copy_()`), and one in place while the layer
    runs only compiled, or before torch.export. Assign a new tensor instead.

    Shape:
        input (..., in_features) to output (..., out_features); the number of rows may be 0.

    Raises:
        LinearQuantTypeError: by the constructor, an input_dtype of a static layer that is not
            float16 or bfloat16; by forward, an int8 input without takes_int8, or a float input of
            another dtype than the input_dtype of a static layer; by an assignment to `weight` or
            `bias`.
        LinearQuantError: by forward, a call that the operators refuse.

    Source: `dynamic_quant`, `static_quant` and `linear_quant` of lq_graph, which it combines.
    """

    takes_int8 = False
    is_whole_layer = True  # an error names this module, not its `linear`

    input_scale: Tensor | None
    input_offset: Tensor | None
    weight_scale: Tensor | None
    float_bias: Tensor | None
    output_scale: Tensor | None
    output_offset: Tensor | None
    _scale_reciprocal: Tensor | None
    _offset: Tensor | None
    _scale: Tensor | None
    _zero_point: Tensor | None
    _reciprocals: Tensor | None
    _zero_points: Tensor | None
    _derived_from: list[tuple[str, Tensor, int, int]] | None = None

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
        takes_int8: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.takes_int8 = takes_int8
        self.input_dtype = input_dtype or linear.output_dtype or torch.int8
        if input_scale is not None and input_offset is None:
            input_offset = torch.zeros_like(input_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_offset", input_offset)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("float_bias", float_bias)
        self.register_buffer("output_scale", output_scale)
        self.register_buffer("output_offset", output_offset)
        # derived from input_scale and input_offset when they change; the operators read these
        for name in (*_QUANTIZER, *_FORMS):
            self.register_buffer(name, None, persistent=False)
        self._derive()

    def _derive(self) -> None:
        if self.input_scale is None or self.input_offset is None:
            self._derived_from = None
            for name in (*_QUANTIZER, *_FORMS):
                setattr(self, name, None)
            return
        if self.input_dtype not in (torch.float16, torch.bfloat16):
            raise LinearQuantTypeError(
                f"QuantizedLinear: input_dtype is {dtype_name(self.input_dtype)}; allowed are "
                "float16 and bfloat16. What to do: pass the dtype of the layer's input."
            )
        with torch.inference_mode(False), torch.no_grad():
            *found, forms = quantizer_of(
                self.input_scale, self.input_offset, self.input_dtype, self.in_features
            )
        for name, tensor in zip((*_QUANTIZER, *_FORMS), (*found, *forms), strict=True):
            setattr(self, name, shared(tensor))
        self._note()

    def _note(self) -> None:
        """Remember the tensors that the derived tensors were made from, to see when they change."""
        if self.input_scale is not None and self.input_offset is not None:
            self._derived_from = [
                # held, so that another tensor cannot get its memory
                (name, tensor.detach(), tensor.data_ptr(), _version(tensor))
                for name, tensor in self._buffers.items()
                if name in ("input_scale", "input_offset") and type(tensor) is Tensor
            ]

    def _derive_again(self) -> None:
        """Derive again if the scale or the offset was written since."""
        for name, _, memory, version in self._derived_from or ():
            tensor = self._buffers.get(name)
            if type(tensor) is Tensor and (
                tensor.data_ptr() != memory or _version(tensor) != version
            ):
                self._derive()
                return

    @torch.compiler.assume_constant_result
    def _derive_for_graph(self) -> int:
        """While torch.compile traces: derive from what the scale and the offset are now. Equal
        values leave the same tensors."""
        if all(type(self._buffers.get(name)) is Tensor for name in ("input_scale", "input_offset")):
            self._derive()
        return 0

    @classmethod
    def _plain(cls) -> QuantizedLinear:
        """A layer as quantize makes it, for replaceable.py."""
        linear = LinearQuant(8, 8, pertoken_scale=True, output_dtype=torch.float16, device="meta")
        return cls(linear)

    @property
    def weight(self) -> Tensor:
        """The float weight, (n, k) in input_dtype, computed from the quantized weight."""
        shape = (*self.linear.weight.shape[:-1], self.linear.in_features)
        return self._float_view(self._float_weight, shape)

    @property
    def bias(self) -> Tensor | None:
        """The float bias, (n,) in input_dtype, or None.

        It is `float_bias` if that is known. Otherwise it is computed from the bias of `linear`,
        without the zero point of the input; then it is zeros for a static layer that was made
        without a bias but has a zero point.
        """
        if self.float_bias is None and self.linear.bias is None:
            return None
        return self._float_view(self._float_bias, (self.linear.out_features,))

    def _float_view(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        if torch.compiler.is_compiling():  # a graph drops values that nothing reads
            return compute()
        return FloatView(compute, shape, self.input_dtype, self.linear.weight.device)

    def _check_whole(self) -> None:
        if hasattr(self.linear, SPLIT):  # Dynamo of torch 2.7 cannot trace vars()
            raise LinearQuantTypeError(
                "QuantizedLinear: weight or bias was read from a layer that is split over devices, "
                "and this process has a part of it. What to do: read it before the layer is split."
            )

    def _float_weight(self) -> Tensor:
        self._check_whole()
        weight = self._own("weight")
        assert weight is not None
        if not torch.compiler.is_compiling() and format_of(weight) != ND:
            weight = cast_format(weight, ND)  # in a graph GE does this
        if weight.dtype == torch.int32:
            weight = kernels.unpack_int4(weight)
        scale = self._step()
        if self.input_scale is not None:
            scale = scale / self.input_scale
        return (weight * scale.unsqueeze(-1)).to(self.input_dtype)

    def _float_bias(self) -> Tensor:
        self._check_whole()
        bias = self._own("bias") if self.float_bias is None else self.float_bias
        assert bias is not None
        if bias.dtype == torch.int32:
            assert self.input_offset is not None
            weight = self._own("weight")
            assert weight is not None
            zero_point = self.input_offset.to(torch.int32) * weight.sum(-1, dtype=torch.int32)
            bias = (bias + zero_point) * self._step()
        return bias.to(self.input_dtype)

    def _own(self, name: str) -> Tensor | None:
        """A parameter of `linear`, with memory."""
        linear: Any = self.linear
        found: Tensor | None
        if (merged := merged_of(linear)) is None:
            found = getattr(linear, name)
        else:
            found = merged.rows(linear.index, name)
        return found

    def _step(self) -> Tensor:
        """float32 (n,): the scale of the int32 product, without that of an int8 output."""
        scale = self._own("scale")
        assert scale is not None
        if scale.dtype == torch.int64:
            scale = kernels.unpack_scale(scale)[0]
        scale = scale.to(torch.float32)
        return scale if self.output_scale is None else scale * self.output_scale

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise LinearQuantTypeError(
                f"QuantizedLinear: {name} was assigned to, but it is computed from the quantized "
                "tensors of layer.linear. What to do: assign it before the model is quantized; "
                "quantize() leaves tied weights float."
            )
        super().__setattr__(name, value)
        if name in ("input_scale", "input_offset") and "_offset" in vars(self)["_buffers"]:
            self._derive()

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
        """Whether the input is quantized per token at each call."""
        return self.input_scale is None

    @property
    def kind(self) -> LayerKind:
        """How the layer is quantized."""
        return LayerKind(self.linear.weight_dtype, static=not self.dynamic)

    def forward(self, input: Tensor) -> Tensor:  # the name nn.Linear gives it
        linear: Any = self._modules["linear"]
        try:
            if torch.compiler.is_compiling():
                if torch.compiler.is_dynamo_compiling():  # before a buffer is read
                    self._derive_for_graph()
                return self._product(input, linear)
            self._derive_again()
            if (merged := merged_of(linear)) is None:
                return self._eagerly(input, linear)
            # read the dict, as LinearQuant.forward does
            quantizers = self._buffers["_scale_reciprocal"], self._buffers["_offset"]
            part = merged.part(linear.index, input, quantizers, self._eagerly)
            return self._product(input, linear) if part is None else part
        except LinearQuantError as error:
            raise named(error, self) from None

    def _eagerly(self, input: Tensor, linear: LinearQuant) -> Tensor:
        """`_product`, on the CPU in one call if that can be."""
        out = None
        if "quantize_rows" not in vars(self):
            scale_reciprocal, offset = self._buffers["_scale_reciprocal"], self._buffers["_offset"]
            if scale_reciprocal is None or input.dtype is self.input_dtype:
                out = in_one_call(input, linear, scale_reciprocal, offset)
        return self._product(input, linear) if out is None else out

    def _product(self, input: Tensor, linear: LinearQuant) -> Tensor:
        """The product of an input with `linear`, or with the weight that it is merged into."""
        rows = input.reshape(-1, input.shape[-1])
        some = rows.shape[0] > 0
        if kernels.is_exporting():
            # One graph works for any number of rows, 0 too, though torch assumes at least 2. Dynamo
            # (strict=True) shows a symbolic number as an int.
            some = isinstance(some, bool) and not torch.compiler.is_dynamo_compiling() and some
        elif torch.compiler.is_compiling():
            some = kernels.guard_or_false(some)
        if some:
            out = self._rows(rows, linear)
        else:
            # an expert without tokens has no rows, and the operators need one
            one = rows.new_zeros(1, rows.shape[1])
            out = self._rows(torch.cat([rows, one]), linear)[: rows.shape[0]]
        return out.view(*input.shape[:-1], out.shape[-1])

    def _rows(self, rows: Tensor, linear: LinearQuant) -> Tensor:
        """(m, k) to (m, n)."""
        out: Tensor
        own = self.input_dtype
        dynamic = self._scale_reciprocal is None
        if not dynamic and rows.dtype != own and _autocasts(rows, own):
            rows = rows.to(own)
        if torch.compiler.is_dynamo_compiling():
            quantizer = self._scale_reciprocal, self._offset
            check_traced(_check_rows, rows, self.takes_int8, own, linear.weight_dtype, *quantizer)
        _check_dtype(rows, self.takes_int8, own, dynamic)
        if self._scale_reciprocal is None:
            quantized, scale = self.quantize_rows(rows, linear.weight_dtype)
            out = linear(quantized, scale)
        elif rows.dtype == torch.int8:
            out = linear(rows)
        else:
            forms = self._forms(rows)
            out = linear(_static_quant(rows, self._scale_reciprocal, self._offset, **forms))
        return out

    def _forms(self, rows: Tensor) -> dict[str, Tensor]:
        """The quantizer for fused operators, in a graph for the NPU."""
        if not torch.compiler.is_compiling() or rows.device.type != "npu" or kernels.is_exporting():
            return {}
        forms: dict[str, Any] = {"scale": self._scale, "zero_point": self._zero_point}
        each: Any = self._reciprocals
        if each.shape[0] == rows.shape[-1]:  # else the layer is split on k
            forms["reciprocals"], forms["zero_points"] = each, self._zero_points
        return forms

    def quantize_rows(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Quantize a dynamic layer's input (m, k) to a dtype, with `lq_graph.dynamic_quant`."""
        out: tuple[Tensor, Tensor] = _dynamic_quant(rows, dtype=dtype)
        return out

    def to_float(self, out: Tensor) -> Tensor:
        """An output as floats: int8 is dequantized, floats are unchanged."""
        if self.output_scale is None or self.output_offset is None or out.dtype != torch.int8:
            return out
        return (out.to(torch.float32) - self.output_offset) * self.output_scale

    def extra_repr(self) -> str:
        if self.dynamic:
            return "dynamic, per token"
        return f"static, per tensor, input_dtype={dtype_name(self.input_dtype)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # .half() and similar methods only move: the dtypes of the scales are part of quantization
        self._derive_again()
        super()._apply(keeping_dtypes(fn), recurse)
        self._note()
        for name in (*_QUANTIZER, *_FORMS):
            setattr(self, name, shared(self._buffers[name]))
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        scale, errors = state_dict.get(f"{prefix}input_scale"), lists[-1]
        known = isinstance(scale, Tensor) and not scale.is_meta
        if known and not bool(((scale > 0) & scale.isfinite()).all()):
            errors.append(
                f"{prefix}input_scale is {scale.tolist()}; a scale is finite and above 0. What "
                "to do: check how the file was made. The layer keeps its own."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._derive()


def merged_of(linear: nn.Module) -> MergedLinear | None:
    """The merged weight that a layer has a part of. Read from the dict, because every eager call
    asks."""
    return cast("MergedLinear | None", linear._modules.get("merged"))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _check_dtype(x: Tensor, takes_int8: bool, input_dtype: torch.dtype, dynamic: bool) -> None:
    """Refuse an input of a dtype that the layer was not made for."""
    if x.dtype == torch.int8 and not takes_int8:
        raise LinearQuantTypeError(
            "QuantizedLinear: x is int8, but this layer does not take int8: values that were cast "
            f"to int8 are not quantized. What to do: pass x.to({input_dtype}). A model that reads "
            "the dtype of a layer must read layer.weight.dtype, not "
            "next(layer.parameters()).dtype. If the layer before returns int8, make this layer "
            "with takes_int8=True."
        )
    if not dynamic and x.dtype not in (torch.int8, input_dtype):
        raise LinearQuantTypeError(
            f"QuantizedLinear: x is {dtype_name(x.dtype)}; this static layer was made for "
            f"{dtype_name(input_dtype)}. What to do: pass x.to({input_dtype}), or quantize the "
            "model in the dtype it runs in."
        )


def _check_rows(
    x: Tensor,
    takes_int8: bool,
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    scale_reciprocal: Tensor | None,
    offset: Tensor | None,
) -> None:
    """Refuse rows that a layer does not take: `_check_dtype`, and what its quantizer refuses."""
    _check_dtype(x, takes_int8, input_dtype, dynamic=scale_reciprocal is None)
    if scale_reciprocal is None:
        check_dynamic_quant(x, weight_dtype)
    elif x.dtype != torch.int8:
        check_static_quant(x, scale_reciprocal, offset)


def _autocasts(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast is on and would cast x to a dtype for nn.Linear."""
    device = x.device.type
    return (
        x.is_floating_point()
        and x.dtype != torch.float64
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == dtype
    )
