"""One layer of quantize(): what is known of it, and how its quantized form is built."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import LinearQuantError
from ..kernels import pack_int4, s19_at_least, storage_k
from ..modules.linear_quant import LinearQuant, layer_of
from ..modules.places import put
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import carry_over
from ..rules.activations import plan_dynamic_quant, plan_static_quant
from ..rules.plan import Spec, plan
from ..rules.products import get_product
from ..rules.tables import STORAGE_DTYPES, dtype_name
from .schemes import SCHEMES, A4W4Dynamic, A8W8Static, Config
from .weight_scales import peaks_of, round_weight

__all__ = ["Job", "Kept", "illegal", "no_row"]

# Quantized weights that more than one layer has, with their scales, by the float weight. The first
# of those layers makes them, while all of them are there.
Kept = dict[int, tuple[nn.Parameter, Tensor]]
_M = 16  # rows, where a plan asks for some
_BIAS_STEPS = 1 << 24  # what an int32 bias may need: it leaves the product its 31 bits


class Job:
    """One nn.Linear that is to be quantized.

    Attributes:
        name: qualified name.
        linear: None once it has been replaced, for its memory must go.
        config: the scheme.
        places: (parent, attribute) wherever the model holds it.
        k, n, bytes_before, input_dtype: what the float layer has.
        bytes: of the quantized one's parameters, once it is there.
        refusal: why it stays float; empty if it does not.
        sharers: the jobs with the same weight, this one too.
        input_scale, input_offset: static only, see `affine`.
        next: the job that takes this one's output as int8.
        takes_int8: another job's next is this one.
        absorbed: a ReLU between the two, by its place.
    """

    def __init__(
        self, name: str, linear: nn.Linear, config: Config, places: list[tuple[nn.Module, str]]
    ) -> None:
        self.name = name
        self.linear: nn.Linear | None = linear
        self.config = config
        self.places = places
        self.n, self.k = _sizes(linear)
        self.bytes_before = _size(linear)
        self.bytes: int | None = None
        weight = getattr(linear, "weight", None)
        self.input_dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
        self.refusal = ""
        self.sharers = [self]
        self.input_scale, self.input_offset = 1.0, 0
        self.next: Job | None = None
        self.takes_int8 = False
        self.absorbed: tuple[nn.Module, str] | None = None

    @property
    def source(self) -> nn.Linear:
        """The float layer, while it is there."""
        assert self.linear is not None
        return self.linear

    @property
    def static(self) -> bool:
        """Whether the activation's scale comes from calibration."""
        return isinstance(self.config, A8W8Static)

    @property
    def storage(self) -> torch.dtype:
        """int8, or int32 carrying int4."""
        return torch.int32 if isinstance(self.config, A4W4Dynamic) else torch.int8

    @property
    def output_dtype(self) -> torch.dtype:
        """Of the quantized layer."""
        return torch.int8 if self.next else self.config.output_dtype or self.input_dtype

    @property
    def bias_dtype(self) -> torch.dtype:
        """Of the quantized layer's bias: added before the scale as int32, or after it as a float
        that the row has."""
        if self.static:
            return torch.int32
        same = self.source.bias is not None and self.source.bias.dtype == self.output_dtype
        return self.output_dtype if same else torch.float32

    @property
    def step(self) -> float:
        """What the weight's scale is multiplied by to give the layer's."""
        return self.input_scale / (self.next.input_scale if self.next else 1.0)

    @property
    def least_scale(self) -> Tensor:
        """float64 (n,): the weight scales below which the bias would not fit into int32. A row
        whose weights are tiny beside its bias is quantized no finer than the bias allows."""
        bias = self.source.bias
        if bias is None or not self.static:
            return torch.zeros(self.n, dtype=torch.float64, device="cpu")
        return bias.detach().double().cpu().abs() / (self.input_scale * _BIAS_STEPS)

    def build(self, kept: Kept) -> QuantizedLinear:
        """The quantized layer. Changes nothing; keeps in `kept` a weight that others have too."""
        new = _build_static(self, kept) if self.static else _build_dynamic(self, kept)
        carry_over(self.source, new)
        return new

    def put_in_place(self, kept: Kept) -> None:
        """Replace the float layer wherever the model holds it. Once or again is the same."""
        if self.linear is None:
            return
        new = self.build(kept)
        self.bytes = _size(new.linear)
        for parent, name in self.places:
            put(parent, name, new)
        if self.absorbed:
            put(*self.absorbed, nn.Identity())
        self.linear = None


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if not is_lazy(p))


def _sizes(linear: nn.Linear) -> tuple[int, int]:
    """n and k of a layer, which may be a subclass that has no usual weight."""
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and not is_lazy(weight) and weight.dim() == 2:
        n, k = weight.shape
        return n, k
    return getattr(linear, "out_features", 0), getattr(linear, "in_features", 0)


def illegal(job: Job) -> str:
    """What the product's tables say against a layer; empty if nothing."""
    pack = STORAGE_DTYPES[job.storage]
    if job.k % pack or job.n % pack:
        return f"k = {job.k}, n = {job.n}: int4 needs multiples of {pack}"
    has_bias = job.static or job.source.bias is not None
    return no_row(
        job.k,
        job.n,
        storage=job.storage,
        static=job.static,
        input_dtype=job.input_dtype,
        output_dtype=job.output_dtype,
        bias=job.bias_dtype if has_bias else None,
    )


def no_row(
    k: int,
    n: int,
    *,
    storage: torch.dtype = torch.int8,
    static: bool,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    scale: torch.dtype = torch.float32,
    bias: torch.dtype | None,
) -> str:
    """Why the product in force cannot run a quantized layer, its quantizing operator included, and
    what it runs; empty if it can.

    Args:
        k, n: the layer's sizes.
        storage: dtype of the weight.
        static: whether the input is quantized per tensor, else per token.
        input_dtype, output_dtype: of the layer.
        scale, bias: dtypes of those parameters, None for no bias.
    """
    why = _refusal(k, n, storage, static, input_dtype, output_dtype, scale, bias)
    return f"{why} What to do: {_what_runs(k, n)}." if why else ""


def _refusal(
    k: int,
    n: int,
    storage: torch.dtype,
    static: bool,
    input_dtype: torch.dtype,
    output_dtype: torch.dtype,
    scale: torch.dtype,
    bias: torch.dtype | None,
) -> str:
    """What the tables say, without their advice, which is for one call of an operator."""
    x, one = Spec(input_dtype, (_M, k)), Spec(input_dtype, (1,))
    words = storage_k(k, storage)
    try:
        if static:
            plan_static_quant(x, one, one)
        else:
            plan_dynamic_quant(x, storage)
        plan(
            Spec(storage, (_M, words)),
            Spec(storage, (n, words)),
            Spec(scale, (n,)),
            pertoken_scale=None if static else Spec(torch.float32, (_M,)),
            bias=None if bias is None else Spec(bias, (n,)),
            output_dtype=output_dtype,
        )
    except LinearQuantError as error:
        refusal = error.refusal
        assert refusal is not None  # whatever a plan refuses has one
        return f"{refusal.operator}: {refusal.reason()}"
    return ""


def _what_runs(k: int, n: int) -> str:
    """The schemes, with dtypes, that the product in force runs a layer of these sizes in."""
    found = []
    for scheme, name in SCHEMES.items():
        storage = torch.int32 if scheme is A4W4Dynamic else torch.int8
        static, pack = scheme is A8W8Static, STORAGE_DTYPES[storage]
        bias = torch.int32 if static else None
        dtypes = [
            dtype_name(dtype)
            for dtype in (torch.float16, torch.bfloat16)
            if not (k % pack or n % pack)
            and not _refusal(k, n, storage, static, dtype, dtype, torch.float32, bias)
        ]
        if dtypes:
            found.append(f"{name} in {' or '.join(dtypes)}")
    return f"{get_product()} runs {', '.join(found)}" if found else "leave the layer float"


def _weight(job: Job, kept: Kept) -> tuple[nn.Parameter, Tensor]:
    """The quantized weight of a layer, int8 (n, k) or int4 in int32, and its scale, float64 (n,).

    The packed scale of a static layer keeps 10 bits of the mantissa, so the weight's scale is
    chosen such that the layer's has no more. Layers that share a weight cannot each have that.
    """
    key = id(job.source.weight)
    if key in kept:
        return kept[key]
    weight = job.source.weight.detach()
    top = 7 if job.storage == torch.int32 else 127
    scale = peaks_of(weight, top) / top
    for other in job.sharers:
        scale = torch.maximum(scale, other.least_scale)
    scale = torch.where(scale > 0, scale, 1.0)
    if job.static and len(job.sharers) == 1:
        scale = s19_at_least((scale * job.step).float()).double() / job.step
    values = round_weight(weight, scale, top)
    if job.storage == torch.int32:
        values = pack_int4(values)
    found = nn.Parameter(values, requires_grad=False), scale
    if len(job.sharers) > 1:
        kept[key] = found
    return found


def _build_dynamic(job: Job, kept: Kept) -> QuantizedLinear:
    weight, scale = _weight(job, kept)
    own = job.source.bias
    bias = None if own is None else own.detach().to(job.bias_dtype, copy=True)
    return QuantizedLinear(_linear(job, weight, scale, bias, None), input_dtype=job.input_dtype)


def _build_static(job: Job, kept: Kept) -> QuantizedLinear:
    """y = input_scale * weight_scale * (sum(x1 * weight) + bias), the bias with the zero point of
    the input in it: round(b / scale) - input_offset * sum(weight)."""
    weight, weight_scale = _weight(job, kept)
    own = job.source.bias
    bias = None
    if own is not None or job.input_offset:
        bias = -job.input_offset * weight.sum(1, dtype=torch.int64).cpu()
        if own is not None:
            steps = own.detach().double().cpu() / (weight_scale * job.input_scale)
            bias = bias + steps.round().to(torch.int64)
        bias = bias.to(torch.int32)

    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=weight.device)

    following = job.next
    offset = one(following.input_offset).expand(job.n).contiguous() if following else None
    return QuantizedLinear(
        _linear(job, weight, weight_scale * job.step, bias, offset),
        one(job.input_scale),
        one(job.input_offset),
        input_dtype=job.input_dtype,
        weight_scale=weight_scale.float().to(weight.device),
        float_bias=None if own is None else own.detach().clone(),
        output_scale=one(following.input_scale) if following else None,
        output_offset=one(following.input_offset) if following else None,
        takes_int8=job.takes_int8,
    )


def _linear(
    job: Job, weight: nn.Parameter, scale: Tensor, bias: Tensor | None, offset: Tensor | None
) -> LinearQuant:
    device = weight.device
    return layer_of(
        weight,
        scale.float().to(device),
        None if bias is None else bias.to(device),
        None if offset is None else offset.to(device),
        pertoken=not job.static,
        output_dtype=job.output_dtype,
    )
