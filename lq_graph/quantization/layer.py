"""One layer of quantize(): its data, and how its quantized layer is built."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..kernels import pack_int4, s19_at_least
from ..modules.linear_quant import LinearQuant, layer_of
from ..modules.places import Place, put
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import carry_over
from ..modules.static_values import static_bias, static_scale, weight_scale_of
from ..modules.supported import LayerKind, runs_in, what_runs, why_not_supported
from ..rules.tables import STORAGE_DTYPES, dtype_name
from .schemes import SCHEMES, Scheme
from .weight_scales import peaks_of, round_weight

__all__ = ["LayerToQuantize", "SharedWeights", "why_illegal"]

# Quantized weights that tied layers share, with their scales, by `shared_as`. The first of those
# layers makes them, while the float layers still exist.
SharedWeights = dict[tuple[int, torch.dtype], tuple[nn.Parameter, Tensor]]
_BIAS_STEPS = 1 << 24  # the part of the int32 range that a bias may use; the product needs the rest


class LayerToQuantize:
    """One nn.Linear to quantize.

    Attributes:
        name: qualified name.
        linear: the float layer; None once it is replaced, so that its memory is freed.
        chosen: its scheme; None if the caller leaves it float.
        places: (parent, attribute) wherever the model holds it.
        k, n: its sizes.
        bytes_before: size of the float layer's parameters.
        input_dtype: dtype of the float layer's weight, and so of the layer's input.
        bytes: size of the quantized layer's parameters; None before it is in place.
        refusal: why it stays float; empty if it is quantized.
        tied_with: the layers with the same quantized weight, this one included.
        input_scale, input_offset: static only, see `affine`.
        next: the layer that takes this one's output as int8.
        takes_int8: whether this is the `next` of another layer.
        fused_relu: place of the ReLU between this layer and `next`; the int8 range replaces it.
    """

    def __init__(
        self, name: str, linear: nn.Linear, chosen: Scheme | None, places: list[Place]
    ) -> None:
        self.name = name
        self.linear: nn.Linear | None = linear
        self.chosen = chosen
        self.places = places
        self.n, self.k = _sizes(linear)
        self.bytes_before = _bytes_of(linear)
        self.bytes: int | None = None
        weight = getattr(linear, "weight", None)
        self.input_dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
        self.refusal = ""
        self.tied_with = [self]
        self.input_scale, self.input_offset = 1.0, 0
        self.next: LayerToQuantize | None = None
        self.takes_int8 = False
        self.fused_relu: tuple[nn.Module, str] | None = None

    @property
    def source(self) -> nn.Linear:
        """The float layer, before it is replaced."""
        assert self.linear is not None
        return self.linear

    @property
    def scheme(self) -> Scheme:
        """The scheme of a layer that is quantized."""
        assert self.chosen is not None
        return self.chosen

    @property
    def kind(self) -> LayerKind:
        """What its scheme makes of it."""
        return SCHEMES[type(self.scheme)]

    @property
    def static(self) -> bool:
        """Whether the activation's scale comes from calibration."""
        return self.kind.static

    @property
    def storage(self) -> torch.dtype:
        """int8, or int32 carrying int4."""
        return self.kind.storage

    @property
    def shared_as(self) -> tuple[int, torch.dtype]:
        """Equal for layers with one float weight and one quantized weight."""
        return id(self.source.weight), self.storage

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype of the quantized layer's output."""
        return torch.int8 if self.next else self.scheme.output_dtype or self.input_dtype

    @property
    def bias_dtype(self) -> torch.dtype:
        """The dtype of the quantized bias: int32 is added before the scale, floats after it."""
        if self.static:
            return torch.int32
        same = self.source.bias is not None and self.source.bias.dtype == self.output_dtype
        return self.output_dtype if same else torch.float32

    @property
    def step(self) -> float:
        """The layer's scale divided by the weight's scale."""
        return self.input_scale / (self.next.input_scale if self.next else 1.0)

    def scale_of(self, weight_scale: Tensor) -> Tensor:
        """float32 (n,): the scale of a static layer, from its weight's scales, float32 (n,)."""
        return static_scale(self._float32_step, weight_scale, self.output_dtype)

    def weight_scale_of(self, scale: Tensor) -> Tensor:
        """float32 (n,): the scales of the weight with which `scale_of` gives a 19-bit scale."""
        return weight_scale_of(scale, self._float32_step)

    @property
    def _float32_step(self) -> Tensor:
        return torch.tensor([self.step], dtype=torch.float32, device="cpu")

    @property
    def least_scale(self) -> Tensor:
        """The smallest weight scales, float64 (n,), with which the bias fits into int32. They
        matter for rows whose weights are tiny compared with the bias."""
        bias = self.source.bias
        if bias is None or not self.static:
            return torch.zeros(self.n, dtype=torch.float64, device="cpu")
        return bias.detach().double().cpu().abs() / (self.input_scale * _BIAS_STEPS)

    def build(self, shared: SharedWeights) -> QuantizedLinear:
        """Make the quantized layer. The model is unchanged; `shared` stores a tied weight."""
        new = _build_static(self, shared) if self.static else _build_dynamic(self, shared)
        carry_over(self.source, new)
        return new

    def put_in_place(self, shared: SharedWeights) -> None:
        """Replace the float layer wherever the model holds it. Idempotent."""
        if self.linear is None:
            return
        new = self.build(shared)
        self.bytes = _bytes_of(new.linear)
        for parent, name in self.places:
            put(parent, name, new)
        if self.fused_relu:
            put(*self.fused_relu, nn.Identity())
        self.linear = None


def _bytes_of(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not is_lazy(p))


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    """n and k of a layer, which may be a subclass without a weight of two dims."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and not is_lazy(weight) and weight.dim() == 2:
        n, k = weight.shape
        return n, k
    return getattr(linear, "out_features", 0), getattr(linear, "in_features", 0)


def why_illegal(layer: LayerToQuantize) -> str:
    """Why the product in force cannot run the quantized layer; empty if it can."""
    if layer.input_dtype not in (torch.float16, torch.bfloat16):
        given = dtype_name(layer.input_dtype)
        why = f"its weight is {given}, and LinearQuant takes float16 and bfloat16"
    else:
        has_bias = layer.static or layer.source.bias is not None
        why, _ = why_not_supported(
            layer.kind,
            layer.k,
            layer.n,
            input_dtype=layer.input_dtype,
            output_dtype=layer.output_dtype,
            bias=layer.bias_dtype if has_bias else None,
        )
    todo = why and _what_to_do(layer)
    return f"{why}. What to do: {todo}." if todo else why


def _what_to_do(layer: LayerToQuantize) -> str:
    """How a layer that the product in force cannot run becomes one that it runs; empty if it has
    sizes that the scheme does not take."""
    runs = runs_in(layer.kind, layer.k, layer.n)
    if not runs:
        sizes = any(size % STORAGE_DTYPES[layer.storage] for size in (layer.k, layer.n))
        return "" if sizes else what_runs(layer.k, layer.n)
    steps = []
    if layer.input_dtype not in runs:
        calls = {torch.float16: "model.half()", torch.bfloat16: "model.bfloat16()"}
        steps.append(f"call {' or '.join(calls[dtype] for dtype in runs)} first")
    if layer.scheme.output_dtype not in (None, *runs):
        steps.append("leave output_dtype out")
    return " and ".join(steps) or what_runs(layer.k, layer.n)


def _weight(layer: LayerToQuantize, shared: SharedWeights) -> tuple[nn.Parameter, Tensor]:
    """The quantized weight of a layer, int8 (n, k) or int4 in int32, and its scale, float32 (n,).

    The packed scale of a static layer keeps 10 bits of the mantissa. So the weight's scale is
    chosen such that the layer's scale has no more bits, except where layers share the weight.
    """
    key = layer.shared_as
    if key in shared:
        return shared[key]
    weight = layer.source.weight.detach()
    top = 7 if layer.storage == torch.int32 else 127
    scale = peaks_of(weight, top) / top
    for other in layer.tied_with:
        scale = torch.maximum(scale, other.least_scale)
    scale = torch.where(scale > 0, scale, 1.0)
    if layer.static and len(layer.tied_with) == 1:
        wanted = s19_at_least((scale * layer.step).float())
        scale = layer.weight_scale_of(wanted)
    scale = scale.float()
    values = round_weight(weight, scale, top)
    if layer.storage == torch.int32:
        values = pack_int4(values)
    found = nn.Parameter(values, requires_grad=False), scale
    if len(layer.tied_with) > 1:
        shared[key] = found
    return found


def _build_dynamic(layer: LayerToQuantize, shared: SharedWeights) -> QuantizedLinear:
    weight, scale = _weight(layer, shared)
    own = layer.source.bias
    bias = None if own is None else own.detach().to(layer.bias_dtype, copy=True)
    return QuantizedLinear(_linear(layer, weight, scale, bias, None), input_dtype=layer.input_dtype)


def _build_static(layer: LayerToQuantize, shared: SharedWeights) -> QuantizedLinear:
    """A layer that computes y = scale * (sum(x1 * weight) + bias), where scale is
    input_scale * weight_scale and the int32 bias holds the zero point of the input."""
    weight, weight_scale = _weight(layer, shared)
    own, scale = layer.source.bias, layer.scale_of(weight_scale)

    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=weight.device)

    following = layer.next
    product_scale = scale.double() * (following.input_scale if following else 1.0)
    bias = static_bias(own, product_scale, one(layer.input_offset), weight)
    offset = one(following.input_offset).expand(layer.n).contiguous() if following else None
    return QuantizedLinear(
        _linear(layer, weight, scale, bias, offset),
        one(layer.input_scale),
        one(layer.input_offset),
        input_dtype=layer.input_dtype,
        weight_scale=weight_scale.to(weight.device),
        float_bias=None if own is None else own.detach().clone(),
        output_scale=one(following.input_scale) if following else None,
        output_offset=one(following.input_offset) if following else None,
        takes_int8=layer.takes_int8,
    )


def _linear(
    layer: LayerToQuantize,
    weight: nn.Parameter,
    scale: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
) -> LinearQuant:
    device = weight.device
    return layer_of(
        weight,
        scale.to(device),
        None if bias is None else bias.to(device),
        None if offset is None else offset.to(device),
        pertoken=not layer.static,
        output_dtype=layer.output_dtype,
    )
