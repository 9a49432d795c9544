"""quantize(): the nn.Linear layers of a float model become quantized ones, in place."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .calibrate import Range, observe_inputs
from .errors import LinearQuantError, LinearQuantTypeError, LinearQuantValueError
from .formats import dtype_name
from .module import LinearQuant
from .numerics import pack_int4
from .plan import Spec, plan
from .plan_quant import plan_dynamic_quant, plan_static_quant
from .quantized_linear import QuantizedLinear
from .text import table
from .vendor import vendor_layers

__all__ = ["A4W4Dynamic", "A8W8Dynamic", "A8W8Static", "Config", "Quantized", "Report", "quantize"]


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
        int8_between: where an nn.Sequential feeds one quantized layer straight into another, or
            through a ReLU, the first gives int8 and the second takes it as it is.
    """

    output_dtype: torch.dtype | None = None
    symmetric: bool = False
    int8_between: bool = True


Config = A8W8Dynamic | A8W8Static | A4W4Dynamic


@dataclass(frozen=True)
class Quantized:
    """What became of one nn.Linear.

    Attributes:
        name: qualified name.
        scheme: "A8W8 dynamic" and the like; empty if the layer was left alone.
        k, n: its sizes.
        output: dtype of the new layer's output, "" if left alone.
        bytes_before, bytes: of weight, scale and bias.
        note: why it was left alone, or what else changed.
    """

    name: str
    scheme: str
    k: int
    n: int
    output: str
    bytes_before: int
    bytes: int
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether the layer was quantized."""
        return bool(self.scheme)


class Report(list[Quantized]):
    """What quantize did, a line for each nn.Linear; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no nn.Linear in this model"
        head = ["module", "scheme", "k", "n", "output", "bytes before", "bytes", ""]
        rows = [
            [
                r.name,
                r.scheme or "left float",
                r.k,
                r.n,
                r.output or "-",
                r.bytes_before,
                r.bytes,
                r.note,
            ]
            for r in self
        ]
        done = [r for r in self if r.changed]
        before, after = sum(r.bytes_before for r in done), sum(r.bytes for r in done)
        summary = f"{len(done)} of {len(self)} layers quantized, {before:,} bytes to {after:,}"
        return "\n".join([*table([head, *rows]), summary])


FilterFn = Callable[[nn.Module, str], bool]
Kept = dict[int, nn.Parameter]  # quantized weights that more than one layer has, by the float one
_M = 16  # rows, where a plan asks for some
_BIAS_STEPS = 1 << 24  # what an int32 bias may need: it leaves the product its 31 bits
_SCHEMES: dict[type, str] = {
    A8W8Dynamic: "A8W8 dynamic",
    A8W8Static: "A8W8 static",
    A4W4Dynamic: "A4W4 dynamic",
}


def quantize(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None = None,
    *,
    filter_fn: FilterFn | None = None,
) -> Report:
    """Replace the nn.Linear layers of a model by `QuantizedLinear` ones, in place.

    A layer that cannot be quantized is left float, and the report says why: it has no row in the
    product's table, its weight is shared with something else, calibration never reached it, ...
    Layers that are quantized already stay as they are, so a second call with another config and
    filter_fn gives the rest another scheme.

    All or nothing: every layer is built once, and thrown away, before the first one is put in
    place; the largest goes in first, so memory that is too short shows before anything has changed;
    and Ctrl-C waits for the end of that last step. The most this takes beside the model is one
    quantized layer.

    Args:
        model: float16 or bfloat16, on CPU or NPU.
        config: A8W8Dynamic(), A8W8Static() or A4W4Dynamic().
        calibration: for A8W8Static: inputs of the model, each a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. A few dozen that look like the real ones.
        filter_fn: (module, qualified name) to whether an nn.Linear is to be quantized; default all.

    Returns:
        A Report: a list with one `Quantized` for each nn.Linear.

    Raises:
        LinearQuantTypeError: another config, or inputs that are none.
        LinearQuantValueError: a weight or an activation is NaN or infinite; calibration is missing
            or empty; no layer can be quantized.

    Source: the scheme follows torchao's quantize_ in its interface, and aclnnQuantMatmulV4.md in
    what the layers compute.
    """
    if type(config) not in _SCHEMES:
        raise LinearQuantTypeError(
            f"quantize: config is {config!r}; allowed are A8W8Dynamic(), A8W8Static() and "
            "A4W4Dynamic()."
        )
    _check_calibration(config, calibration)
    entries = _survey(model, config, filter_fn)
    jobs = [entry for entry in entries if isinstance(entry, _Job)]
    if isinstance(config, A8W8Static) and jobs:
        assert calibration is not None
        _calibrate(model, config, jobs, calibration)
        if config.int8_between:
            _connect(model, [job for job in jobs if not job.refusal])
    todo = [job for job in jobs if not job.refusal]
    _need_some(entries, todo)
    for job in todo:
        job.sharers = [other for other in job.sharers if other in todo]

    # None: no bar where the output is no terminal
    for job in tqdm(todo, "checking layers", disable=None):
        job.build({})
    # the largest first: what fits once fits ever after
    todo.sort(key=lambda job: -job.bytes_before)
    kept: Kept = {}
    with _uninterrupted():
        for job in tqdm(todo, "quantizing", disable=None):
            job.put_in_place(kept)
    return Report(entry.result() if isinstance(entry, _Job) else entry for entry in entries)


def _check_calibration(config: Config, calibration: object) -> None:
    static = isinstance(config, A8W8Static)
    if static and calibration is None:
        raise LinearQuantValueError(
            "quantize: calibration is absent; A8W8Static needs the ranges of the activations. What "
            "to do: pass calibration=[...], a few dozen inputs of the model, or use A8W8Dynamic."
        )
    if calibration is not None and not static:
        raise LinearQuantValueError(
            f"quantize: calibration is given; {_SCHEMES[type(config)]} needs none. What to do: "
            "leave it out, or use A8W8Static."
        )
    if isinstance(calibration, Tensor | dict | str):
        raise LinearQuantTypeError(
            f"quantize: calibration is a {type(calibration).__name__}; allowed is an iterable of "
            "inputs. What to do: pass [inputs]."
        )


# ---- which layers ----


@dataclass(eq=False)
class _Job:
    """One nn.Linear that is to be quantized."""

    name: str
    linear: nn.Linear | None  # None once it has been replaced: its memory must go
    config: Config
    places: list[tuple[nn.Module, str]]
    k: int
    n: int
    bytes_before: int
    output_dtype: torch.dtype
    input_dtype: torch.dtype
    refusal: str = ""
    # static only
    input_scale: float = 0.0
    input_offset: int = 0
    next: _Job | None = None  # the layer that takes this one's int8 output
    absorbed: tuple[nn.Module, str] | None = None  # a ReLU between the two, by its place
    sharers: list[_Job] = field(default_factory=list)  # jobs with the same weight, this one too
    new_bytes: int = 0

    @property
    def source(self) -> nn.Linear:
        assert self.linear is not None
        return self.linear

    @property
    def step(self) -> float:
        """What the weight's scale is multiplied by to give the layer's."""
        return self.input_scale / (self.next.input_scale if self.next else 1.0)

    def build(self, kept: Kept) -> QuantizedLinear:
        """The new layer; changes nothing but kept."""
        if isinstance(self.config, A8W8Static):
            return _build_static(self, kept)
        return _build_dynamic(self, 7 if isinstance(self.config, A4W4Dynamic) else 127, kept)

    def put_in_place(self, kept: Kept) -> None:
        """Replace the float layer wherever the model holds it."""
        new = self.build(kept)
        new.train(self.source.training)
        self.new_bytes = _bytes(new.linear)
        for parent, name in self.places:
            setattr(parent, name, new)
        if self.absorbed:
            setattr(*self.absorbed, nn.Identity())
        self.linear = None

    def result(self) -> Quantized:
        if self.refusal:
            return _left(self.name, self.k, self.n, self.bytes_before, self.refusal)
        output, note = self.output_dtype, ""
        if self.next:
            output, note = torch.int8, f"feeds {self.next.name} in int8"
            if self.absorbed:
                note += ", the ReLU between is the int8 range's end"
        return Quantized(
            self.name,
            _SCHEMES[type(self.config)],
            self.k,
            self.n,
            dtype_name(output),
            self.bytes_before,
            self.new_bytes,
            note,
        )


def _left(name: str, k: int, n: int, size: int, why: str) -> Quantized:
    return Quantized(name, "", k, n, "", size, size, why)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _survey(model: nn.Module, config: Config, filter_fn: FilterFn | None) -> list[_Job | Quantized]:
    """Every nn.Linear of a model, in order: what is to be done, or why nothing is."""
    done = (QuantizedLinear, LinearQuant, *vendor_layers())
    inside = {m for layer in model.modules() if isinstance(layer, done) for m in layer.modules()}
    names = {module: name for name, module in model.named_modules()}
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    owners: dict[int, list[nn.Module]] = {}
    for parent in names:
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, attribute))
        for parameter in parent._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(parent)

    entries: list[_Job | Quantized] = []
    for module, name in names.items():
        if not isinstance(module, nn.Linear) or module in inside:
            continue
        n, k = module.weight.shape
        why = _why_not(module, name, places.get(module, []), filter_fn)
        job = None
        if not why:
            job = _Job(
                name,
                module,
                config,
                places[module],
                k,
                n,
                _bytes(module),
                config.output_dtype or module.weight.dtype,
                module.weight.dtype,
            )
            why = _illegal(job)
        if why or job is None:
            entries.append(_left(name, k, n, _bytes(module), why))
        else:
            entries.append(job)

    chosen = {entry.source for entry in entries if isinstance(entry, _Job)}
    for i, entry in enumerate(entries):
        if isinstance(entry, _Job):
            sharers = owners[id(entry.source.weight)]
            others = [names[m] or "the model" for m in sharers if m not in chosen]
            if others:
                why = f"its weight is also {', '.join(others)}'s, which stays float"
                entries[i] = _left(entry.name, entry.k, entry.n, entry.bytes_before, why)
            else:
                entry.sharers = [e for e in entries if isinstance(e, _Job) and e.linear in sharers]
    for entry in entries:
        if isinstance(entry, _Job):
            _check_weight(entry)
    return entries


def _why_not(
    linear: nn.Linear, name: str, places: list[tuple[nn.Module, str]], filter_fn: FilterFn | None
) -> str:
    """Why a layer must not be touched; empty if it may be."""
    if filter_fn is not None and not filter_fn(linear, name):
        return "filter_fn leaves it"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, whose forward may differ from nn.Linear's"
    if not places:
        return "the model itself, which cannot be replaced in place: put it in an nn.Sequential"
    for parent, _ in places:
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "nn.TransformerEncoderLayer reads the weight itself, on its fast path"
    if linear._forward_hooks or linear._forward_pre_hooks:
        return "it has forward hooks, which would be lost"
    if linear.weight.is_meta:
        return "its weight is on meta: load the model first"
    if linear.weight.dtype not in (torch.float16, torch.bfloat16):
        return (
            f"its weight is {dtype_name(linear.weight.dtype)}, LinearQuant works in float16 and "
            "bfloat16: call model.half() or model.bfloat16() first"
        )
    return ""


def _illegal(job: _Job) -> str:
    """What the product's tables say against a layer; empty if nothing."""
    int4 = isinstance(job.config, A4W4Dynamic)
    static = isinstance(job.config, A8W8Static)
    k, n = job.k, job.n
    if int4 and (k % 8 or n % 8):
        return f"k = {k}, n = {n}: int4 needs multiples of 8"
    if static:
        bias: Spec | None = Spec(torch.int32, (n,))
    else:
        has_bias = job.source.bias is not None
        bias = Spec(_bias_dtype(job), (n,)) if has_bias else None
    storage = torch.int32 if int4 else torch.int8
    words = k // 8 if int4 else k
    x = Spec(job.input_dtype, (_M, k))
    try:
        if static:
            one = Spec(job.input_dtype, (1,))
            plan_static_quant(x, one, one)
        else:
            plan_dynamic_quant(x, storage)
        plan(
            Spec(storage, (_M, words)),
            Spec(storage, (n, words)),
            Spec(torch.float32, (n,)),
            pertoken_scale=None if static else Spec(torch.float32, (_M,)),
            bias=bias,
            output_dtype=job.output_dtype,
        )
    except LinearQuantError as error:
        return str(error)
    return ""


def _bias_dtype(job: _Job) -> torch.dtype:
    bias = job.source.bias
    return bias.dtype if bias.dtype == job.output_dtype else torch.float32


def _check_weight(job: _Job) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(job.source, name)
        if tensor is not None and not _finite(tensor):
            raise LinearQuantValueError(
                f"quantize: {job.name}.{name} holds NaN or infinity; nothing was changed. What to "
                "do: check how the model was loaded, or leave the layer float with filter_fn."
            )


def _finite(tensor: Tensor) -> bool:
    low, high = torch.aminmax(tensor.detach())
    return bool(low.isfinite() & high.isfinite())


def _need_some(entries: list[_Job | Quantized], todo: list[_Job]) -> None:
    """Refuse a call that would do nothing, unless the model asks for nothing."""
    if todo or not entries:
        return
    reasons = Counter(e.refusal if isinstance(e, _Job) else e.note for e in entries)
    told = "; ".join(f"{count} x {why}" for why, count in reasons.most_common())
    raise LinearQuantValueError(
        f"quantize: none of the {len(entries)} nn.Linear layers can be quantized: {told}."
    )


# ---- calibration ----


def _calibrate(
    model: nn.Module, config: A8W8Static, jobs: list[_Job], batches: Iterable[Any]
) -> None:
    ranges = observe_inputs(model, [job.source for job in jobs], batches)
    for job in jobs:
        seen = ranges[job.source]
        if not seen.batches:
            job.refusal = "calibration never reached it"
        elif not seen.finite:
            raise LinearQuantValueError(
                f"quantize: the input of {job.name} holds NaN or infinity during calibration; "
                "nothing was changed. What to do: check the inputs, or run the model in bfloat16."
            )
        else:
            job.input_scale, job.input_offset = _affine(seen, job.input_dtype, config.symmetric)


def _affine(seen: Range, dtype: torch.dtype, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of an activation, the scale such that its reciprocal, which is what the
    chip multiplies by, is exact in the activation's dtype."""
    width = max(-seen.low, seen.high) / 127 if symmetric else (seen.high - seen.low) / 255
    scale = max(width, 1 / torch.finfo(torch.float16).max) if width else 1.0
    reciprocal = torch.tensor(1 / scale, dtype=torch.float64).to(dtype)
    scale = float(reciprocal.to(torch.float32).reciprocal())
    offset = 0 if symmetric else round(-128 - seen.low / scale)
    return scale, min(max(offset, -128), 127)


def _connect(model: nn.Module, jobs: list[_Job]) -> None:
    """Find the pairs between which int8 can stay: neighbours in an nn.Sequential, which hands each
    output to the next module and to nothing else."""
    by_layer: dict[nn.Module, _Job] = {job.source: job for job in jobs}
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    for parent in model.modules():
        if type(parent) is not nn.Sequential or parent._forward_hooks:
            continue
        children = [(name, child) for name, child in parent._modules.items() if child is not None]
        for i, (_, child) in enumerate(children[:-1]):
            first = by_layer.get(child)
            relu = None
            rest = children[i + 1 :]
            if type(rest[0][1]) is nn.ReLU and len(rest) > 1:
                relu, rest = (parent, rest[0][0]), rest[1:]
            second = by_layer.get(rest[0][1])
            if first is None or second is None or first is second:
                continue
            if any(uses[job.source] > 1 for job in (first, second)):
                continue
            # ReLU's zero is where the int8 range begins: the clamp to it is the ReLU
            if relu is None or second.input_offset == -128:
                first.next, first.absorbed = second, relu


# ---- building ----


def _rows(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows, about a million values each: what is computed beside a layer is small."""
    step = max(1, (1 << 20) // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _peaks(weight: Tensor) -> Tensor:
    """float64 (n,): the largest magnitude of each row."""
    peaks = torch.empty(weight.shape[0], dtype=torch.float64)
    for part in _rows(weight):
        peaks[part] = weight[part].abs().amax(1).double().cpu()
    return peaks


def _round_weight(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """int8 (n, k): weight / scale, half to even."""
    out = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = scale.to(weight.device, torch.float32).unsqueeze(1)
    for part in _rows(weight):
        out[part] = (weight[part].float() / scale[part]).round_().clamp_(-top, top).to(torch.int8)
    return out


def _least_scale(job: _Job) -> Tensor:
    """float64 (n,): the weight scales below which the bias would not fit into int32. A row whose
    weights are tiny beside its bias is quantized no finer than the bias allows."""
    bias = job.source.bias
    if bias is None or not isinstance(job.config, A8W8Static):
        return torch.zeros(job.n, dtype=torch.float64)
    return bias.detach().double().cpu().abs() / (job.input_scale * _BIAS_STEPS)


def _weight(job: _Job, top: int, kept: Kept) -> tuple[nn.Parameter, Tensor]:
    """The quantized weight of a layer, int8 (n, k) or int4 in int32, and its scale, float64 (n,).

    The packed scale of a static layer keeps 10 bits of the mantissa, so the weight's scale is
    chosen such that the layer's has no more. Layers that share a weight cannot each have that."""
    weight = job.source.weight
    scale = _peaks(weight.detach()) / top
    for other in job.sharers:
        scale = torch.maximum(scale, _least_scale(other))
    scale = torch.where(scale > 0, scale, 1.0)
    if len(job.sharers) == 1 and isinstance(job.config, A8W8Static):
        scale = _up_to_s19((scale * job.step).float()).double() / job.step
    if id(weight) in kept:
        return kept[id(weight)], scale
    values = _round_weight(weight.detach(), scale, top)
    if top == 7:
        values = pack_int4(values)
    new = nn.Parameter(values, requires_grad=False)
    if len(job.sharers) > 1:
        kept[id(weight)] = new
    return new, scale


def _build_dynamic(job: _Job, top: int, kept: Kept) -> QuantizedLinear:
    weight, scale = _weight(job, top, kept)
    own = job.source.bias
    bias = None if own is None else own.detach().to(_bias_dtype(job), copy=True)
    return QuantizedLinear(_linear(job, weight, scale, bias, pertoken=True))


def _build_static(job: _Job, kept: Kept) -> QuantizedLinear:
    """y = input_scale * weight_scale * (sum(x1 * weight) + bias), the bias with the zero point of
    the input in it: round(b / scale) - input_offset * sum(weight)."""
    weight, weight_scale = _weight(job, 127, kept)
    float_bias = job.source.bias
    bias = None
    if float_bias is not None or job.input_offset:
        sums = weight.sum(1, dtype=torch.int64).cpu()
        bias = -job.input_offset * sums
        if float_bias is not None:
            steps = float_bias.detach().double().cpu() / (weight_scale * job.input_scale)
            bias = bias + steps.round().to(torch.int64)
        bias = bias.to(torch.int32)

    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float32, device=weight.device)

    following = job.next
    offset = torch.full((job.n,), float(following.input_offset)) if following else None
    return QuantizedLinear(
        _linear(job, weight, weight_scale * job.step, bias, offset=offset),
        one(job.input_scale),
        one(job.input_offset),
        input_dtype=job.input_dtype,
        weight_scale=weight_scale.float().to(weight.device),
        float_bias=None if float_bias is None else float_bias.detach().clone(),
        output_scale=one(following.input_scale) if following else None,
        output_offset=one(following.input_offset) if following else None,
    )


def _up_to_s19(scale: Tensor) -> Tensor:
    """The smallest float32 not below a scale that the packed form holds exactly."""
    return ((scale.view(torch.int32) + 0x1FFF) & -0x2000).view(torch.float32)


def _linear(
    job: _Job,
    weight: nn.Parameter,
    scale: Tensor,
    bias: Tensor | None,
    *,
    pertoken: bool = False,
    offset: Tensor | None = None,
) -> LinearQuant:
    device = weight.device
    layer = LinearQuant(
        job.k,
        job.n,
        bias=bias is not None,
        offset=offset is not None,
        pertoken_scale=pertoken,
        output_dtype=torch.int8 if job.next else job.output_dtype,
        dtype=weight.dtype,
        device="meta",  # no memory: the parameters are replaced
    )
    layer.weight = weight
    tensors = {"scale": scale.float(), "bias": bias, "offset": offset}
    if pertoken:
        tensors["pertoken_scale"] = torch.ones(1)
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.to(device), requires_grad=False))
    return layer


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Python delivers it to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])
