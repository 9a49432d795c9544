"""LinearQuant, the module: int8 or int4 in, a drop-in for torch_npu's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from ..backends import npu
from ..backends.compat import is_followed
from ..backends.fake import check_linear_quant
from ..backends.layer_names import named
from ..backends.npu import cast_format, format_of
from ..backends.traced import check_format_traced, check_traced
from ..errors import LinearQuantError, LinearQuantValueError
from ..kernels import (
    INT4_PER_INT32,
    drop_prepared,
    is_exporting,
    logical_k,
    storage_k,
    unpack_scale,
)
from ..ops import trans_quant_param
from ..rules.plan import check_finite
from ..rules.tables import FRACTAL_NZ, ND, ROWS, STORAGE_DTYPES, dtype_name
from .fusion_options import FusionOptions, get_fusion
from .stated_dtypes import check_stated, check_whole_words, storage_dtype

__all__ = [
    "PARAMETERS",
    "LinearQuant",
    "describe",
    "keeping_dtypes",
    "layer_of",
]

_linear_quant = torch.ops.lq_graph.linear_quant.default
PARAMETERS = ("weight", "scale", "offset", "pertoken_scale", "bias")


class LinearQuant(nn.Module):
    """Quantized linear layer, drop-in for torch_npu.contrib.module.LinearQuant.

    Takes an int8 input (or int32 that holds eight int4 values) and a weight of the same dtype,
    multiplies exactly in int32 and scales the result to the output dtype. Inference only; runs
    eagerly on CPU and NPU and in graphs.

    All parameters have requires_grad=False.

    A parameter gets the dtype and the shape of the tensor that is assigned to its `.data`, or that
    a state dict holds for it. `.half()`, `.to(dtype)` and similar methods move the module but keep
    its dtypes, which are part of the quantization.

    Args:
        in_features: k, the size of each input row (counted in int4 values for int4).
        out_features: n.
        bias, offset, pertoken_scale: whether the layer has this parameter.
        output_dtype: torch.int8 (also None), float16, bfloat16 or int32.
        device: where to allocate the parameters.
        dtype: of the weight, torch.int8 (default) or torch.int32 for int4.
        x1_dtype, x2_dtype: dtypes of input and weight, with the vendor's names: None, torch.int8 or
            torch.int32, the same in both. If given, every call checks the tensors against them.
        group_size: None or 0; the support table has no row with per-group scales.

    Attributes:
        weight: int8 (out_features, in_features), or int32 (out_features, in_features / 8) carrying
            int4; not transposed. A tensor (..., n, k) may be assigned.
        scale: float32 (out_features,). A float32, bfloat16 or packed int64 tensor, (1,) or
            (out_features,), may be assigned. A graph may read the values of a packed scale from a
            copy, which it makes when it is compiled, loaded or assigned to: afterwards assign a
            new Parameter instead of writing in place.
        offset: float32 (out_features,), or None.
        pertoken_scale: float32 (1,), or None. It needs one value for each row of the input, so
            assign it, or pass it to forward.
        bias: int32 (out_features,), or None. A float tensor may be assigned if the row of the
            support table has it.

    Shape:
        input (..., m, in_features) to output (..., m, out_features).

    Raises:
        LinearQuantTypeError, LinearQuantValueError: by the constructor for its arguments; by
            forward for a call that `lq_graph.linear_quant` refuses, and for an int4 weight whose k
            cannot be in_features.

    Source: torch_npu.contrib.module.LinearQuant, its page and torch_npu 2.13's signature.
    """

    weight: Tensor
    scale: Tensor
    offset: Tensor | None
    pertoken_scale: Tensor | None
    bias: Tensor | None
    _unpacked_scale: Tensor | None
    merged: Any = None  # of a MergedPart: the MergedLinear that computes it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        offset: bool = False,
        pertoken_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        output_dtype: torch.dtype | None = None,
        x1_dtype: torch.dtype | None = None,
        x2_dtype: torch.dtype | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        storage = storage_dtype(dtype=dtype, x1_dtype=x1_dtype, x2_dtype=x2_dtype)
        if group_size not in (None, 0):
            raise LinearQuantValueError(
                f"LinearQuant: group_size is {group_size}; per-group scales have no row in the "
                "support table. What to do: leave it None, and give one scale for each channel."
            )
        pack = STORAGE_DTYPES[storage]
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size <= 0 or size % pack:
                raise LinearQuantValueError(
                    f"LinearQuant: {name} is {size}; allowed is a positive multiple of {pack}"
                    + (" for int4" if pack > 1 else "")
                    + ". What to do: pad with zeros."
                )
        self.in_features = in_features
        self.out_features = out_features
        self.output_dtype = output_dtype
        self._weight_format = ND
        self.x1_dtype = x1_dtype
        self.x2_dtype = x2_dtype
        # the values of a packed scale, for the fusions of a graph
        self.register_buffer("_unpacked_scale", None, persistent=False)

        def parameter(
            name: str, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0
        ) -> None:
            value = Parameter(torch.full(shape, fill, dtype=dtype, device=device), False)
            self.register_parameter(name, value if wanted else None)

        n = out_features
        parameter("weight", True, (n, storage_k(in_features, storage)), storage)
        parameter("scale", True, (n,), torch.float32, 1)
        parameter("offset", offset, (n,), torch.float32)
        parameter("pertoken_scale", pertoken_scale, (1,), torch.float32, 1)
        parameter("bias", bias, (n,), torch.int32)
        # The float32 scale before fold_scale packed it, for state dicts. Neither parameter nor
        # buffer, because a state dict must not hold it under its own name.
        self._float_scale: Tensor | None = None

    def forward(self, x1: Tensor, pertoken_scale: Tensor | None = None) -> Tensor:
        """Apply the layer; contract in `lq_graph.linear_quant`.

        Args:
            x1: int8 (..., m, k) or int32 (..., m, k/8).
            pertoken_scale: float32 (m,), used instead of the parameter of that name.
        """
        traced = torch.compiler.is_dynamo_compiling()
        in_graph = traced and not is_exporting()
        if traced and self._weight_format:  # a guard: another format compiles again
            pass
        if in_graph:
            self._note_scale_written()
        own: dict[str, Any] = self._parameters
        # Read the dict: nn.Module.__getattr__ takes a microsecond for each attribute. Only a
        # parametrized layer needs it.
        if len(own) == len(PARAMETERS):
            weight, scale, offset = own["weight"], own["scale"], own["offset"]
            pertoken, bias = own["pertoken_scale"], own["bias"]
        else:
            weight, scale, offset = self.weight, self.scale, self.offset
            pertoken, bias = self.pertoken_scale, self.bias
        if pertoken_scale is not None:
            pertoken = pertoken_scale
        output_dtype = self.output_dtype
        try:
            if traced:
                operands = x1, weight, scale, offset, pertoken, bias, output_dtype
                check_traced(check_linear_quant, *operands)
                if in_graph and x1.device.type == "npu":
                    check_format_traced(self._weight_format)
            if self.in_features % INT4_PER_INT32:
                check_whole_words("LinearQuant", self.in_features, weight)
            if self.x1_dtype is not None:
                check_stated("x1", x1, self.x1_dtype)
            if self.x2_dtype is not None:
                check_stated("x2", weight, self.x2_dtype)
            if not traced and type(x1) is Tensor and _is_npu(x1.device) and not is_followed():
                # The dispatcher would only call this kernel, in a tenth of the time of a call.
                return npu.linear_quant(
                    x1, weight, scale, offset, pertoken, bias, output_dtype=output_dtype
                )
            given: dict[str, Any] = {}  # an eager call pays for each argument, None too
            if output_dtype is not None:
                given["output_dtype"] = output_dtype
            if in_graph and x1.device.type == "npu":
                values: Any = self._buffers["_unpacked_scale"]
                if values is not None and values.shape == scale.shape:  # not split
                    given["float_scale"] = values
            out: Tensor = _linear_quant(x1, weight, scale, offset, pertoken, bias, **given)
            return out
        except LinearQuantError as error:
            raise named(error, self) from None

    @property
    def weight_dtype(self) -> torch.dtype:
        """int8, or int32 that carries int4."""
        return self.weight.dtype

    def note_weight_format(self) -> None:
        """Store the weight's format in an attribute, so that torch.compile guards on it.

        A graph is compiled for one format, but guards check dtypes, shapes and attributes, not
        formats. All code that moves, casts or replaces the weight calls this; only
        `weight.data = ...` cannot.
        """
        weight = self._parameters.get("weight")
        # a fake or distributed tensor has no format
        self._weight_format = format_of(weight) if type(weight) is Parameter else ND

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "weight":
            self.note_weight_format()
        if name == "scale":
            self.note_scale()

    def note_scale(self) -> None:
        """Unpack a packed scale, for fused operators: they read it in float32, and a graph can see
        no values. All code that packs or replaces the scale calls this, and torch.compile does for
        a new graph; a graph that is there already does not notice a write in place."""
        scale = self._parameters.get("scale")
        if type(scale) is not Parameter or scale.dtype != torch.int64 or scale.is_meta:
            self._unpacked_scale = None
            return
        known = self._unpacked_scale
        with torch.inference_mode(False), torch.no_grad():
            values = unpack_scale(scale.data.cpu())[0].to(scale.device)
            fits = known is not None and (known.shape, known.device) == (
                values.shape,
                values.device,
            )
            if known is None or not fits or known.is_inference():  # that cannot be written
                self._unpacked_scale = values
            elif not torch.equal(known, values):
                known.copy_(values)  # graphs that were captured read this memory

    @torch.compiler.assume_constant_result
    def _note_scale_written(self) -> int:
        """While torch.compile traces: the scale may have been written in place before."""
        self.note_scale()
        return 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.note_weight_format()  # a copy, or a layer from a file, may have another format

    def fold_scale(self) -> None:
        """Replace the float32 scale by the packed int64 scale, with the offset in it.

        State dicts still hold the float32 scale; loading one packs it again.

        Raises:
            LinearQuantTypeError: the scale is not float32.
            LinearQuantValueError: it holds NaN or infinity.
        """
        scale = self.scale.data
        packed = _pack(scale, self.offset)
        self._float_scale = scale
        self.scale.data = packed
        self.note_scale()

    def _scale_before_folding(self) -> Tensor | None:
        """The float32 scale that the packed scale was made from; None if the packed scale was
        replaced since."""
        kept = self._float_scale
        if kept is None or self.scale.dtype != torch.int64:
            return None
        kept = kept.to(self.scale.device)
        if kept.is_meta or torch.equal(trans_quant_param(kept, self.offset), self.scale):
            return kept
        return None  # another scale or offset was assigned since

    def extra_repr(self) -> str:
        """Every setting of quantization and fusion: torchair's cache_compile keys its cache on
        it."""
        return describe(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearQuant:
        super()._apply(keeping_dtypes(fn), recurse)
        self.note_weight_format()
        if not self.weight.is_cpu:
            drop_prepared(self.weight)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The state dict decides between int8 and int4, float32 and packed scale, (1,) and (n,).
        # Other dtypes and shapes are refused before a copy could cast them to plausible values.
        found: dict[str, Tensor] = {
            name: state_dict[prefix + name]
            for name in PARAMETERS
            if getattr(self, name) is not None and prefix + name in state_dict
        }
        refused = [
            f"{prefix}{name} is {dtype_name(tensor.dtype)} {tuple(tensor.shape)} in the state "
            f"dict; allowed is {self._allowed(name)}."
            for name, tensor in found.items()
            if not self._holds(name, tensor)
        ]
        if refused:
            error_msgs.extend(refused)
            return
        scale = found.get("scale")
        refold = self._float_scale is not None and scale is not None and scale.is_floating_point()
        if refold:
            assert scale is not None
            device, offset = self.scale.device, found.get("offset", self.offset)
            try:
                packed = _pack(scale.to(device), None if offset is None else offset.to(device))
            except LinearQuantError as error:
                error_msgs.append(f"{prefix}scale: {error}")
                return
            state_dict = {**state_dict, prefix + "scale": packed}
            found["scale"] = packed
        acl_format = format_of(self.weight)
        for name, tensor in found.items():
            current = getattr(self, name)
            # torch_npu 2.13 ignores a copy from the host into an internal format: it casts the
            # destination, not the source. So a FRACTAL_NZ weight is loaded as ND and cast again.
            internal = name == "weight" and acl_format != ND
            if tensor.dtype != current.dtype or tensor.shape != current.shape or internal:
                current.data = torch.empty_like(tensor, device=current.device)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if "weight" in found and self.weight.device.type == "npu":
            self.weight.data = cast_format(self.weight.data, acl_format)
            self.note_weight_format()
        if "scale" in found:
            self.note_scale()
            self._float_scale = scale.detach().clone() if refold and scale is not None else None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scale = self._scale_before_folding()
        if scale is not None:
            destination[prefix + "scale"] = scale

    def _holds(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor from a state dict may become this parameter, by dtype and size."""
        if tensor.dtype not in _dtypes_of(name):
            return False
        if name == "weight":
            n, words = tensor.shape[-2:] if tensor.dim() > 1 else (0, 0)
            return (n, logical_k(words, tensor.dtype)) == (self.out_features, self.in_features)
        if name == "bias":
            return tuple(tensor.shape[-1:]) == (self.out_features,)
        if name == "pertoken_scale":
            return tensor.dim() == 1
        return tuple(tensor.shape) in ((1,), (self.out_features,))

    def _allowed(self, name: str) -> str:
        dtypes = " or ".join(dtype_name(d) for d in _dtypes_of(name))
        n, k = self.out_features, self.in_features
        words = f"in int32 ({n}, {k} / {INT4_PER_INT32})"
        if k % INT4_PER_INT32:
            words = f"and no int32, for in_features {k} is not a multiple of {INT4_PER_INT32}"
        shape = {
            "weight": f"({n}, {k}), {words}",
            "bias": f"(..., {n})",
            "pertoken_scale": "(m,)",
        }.get(name, f"(1,) or ({n},)")
        return f"{dtypes}, {shape}"


def describe(layer: Any) -> str:
    """The settings of a LinearQuant, or of a module with its attributes."""
    parts = [f"in_features={layer.in_features}", f"out_features={layer.out_features}"]
    for name in PARAMETERS:
        tensor = getattr(layer, name)
        setting = None if tensor is None else f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        if name == "weight" and layer._weight_format == FRACTAL_NZ:
            setting = f"{setting} FRACTAL_NZ"
        parts.append(f"{name}={setting}")
    parts.append(f"output_dtype={dtype_name(layer.output_dtype or torch.int8)}")
    if (fusion := get_fusion()) != FusionOptions():
        parts.append(f"fusion={fusion}")
    return ", ".join(parts)


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function for nn.Module._apply without its change of dtype (such as that of `.half()`)."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def layer_of(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    pertoken: bool,
    output_dtype: torch.dtype,
) -> LinearQuant:
    """Make a layer of tensors without copying them; a Parameter stays the same object.

    Args:
        weight: int8 (n, k), or int32 (n, k/8) carrying int4.
        scale, bias, offset: the parameters of those names, None for absent.
        pertoken: whether each call passes a pertoken_scale.
        output_dtype: of the layer's output.
    """
    n, words = weight.shape
    layer = LinearQuant(
        logical_k(words, weight.dtype),
        n,
        bias=bias is not None,
        offset=offset is not None,
        pertoken_scale=pertoken,
        output_dtype=output_dtype,
        dtype=weight.dtype,
        device="meta",  # no memory: the parameters are replaced
    )
    ones = torch.ones(1, dtype=torch.float32, device=weight.device) if pertoken else None
    for name, tensor in zip(PARAMETERS, (weight, scale, offset, ones, bias), strict=True):
        if tensor is not None:
            own = tensor if isinstance(tensor, Parameter) else Parameter(tensor, False)
            setattr(layer, name, own)
    return layer


@cache
def _is_npu(device: torch.device) -> bool:
    """Cached, for torch makes the name anew at each question."""
    return device.type == "npu"


def _pack(scale: Tensor, offset: Tensor | None) -> Tensor:
    check_finite(scale, offset)
    return trans_quant_param(scale, offset)


def _dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """Every dtype that some row of the tables allows for a tensor."""
    columns = ((row.storage,) if name == "weight" else getattr(row, name) for row in ROWS)
    return tuple(dict.fromkeys(d for column in columns for d in column if d is not None))
