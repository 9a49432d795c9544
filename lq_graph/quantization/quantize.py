"""quantize(): the nn.Linear layers of a float model become quantized ones, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.linear_quant import LinearQuant
from ..modules.quantized_linear import QuantizedLinear
from ..modules.vendor import vendor_layers
from ..modules.walk import (
    held_elsewhere,
    keeps_grad_mode,
    one_at_a_time,
    places_of,
    tensors_beside,
    uninterrupted,
    why_not_replaceable,
)
from ..reports import table
from ..rules.tables import dtype_name
from .calibrate import Seen, check_batches, observe
from .layer import Job, Kept, affine, illegal, why_no_range
from .schemes import SCHEMES, A8W8Static, Config

__all__ = ["QuantizeReport", "Quantized", "StaysFloat", "quantize"]

_LOCK = one_at_a_time()  # a model that two threads quantize is quantized by one of them
_SHOWN = 5  # of what stays float, in a printed report


@dataclass(frozen=True)
class Quantized:
    """What became of one nn.Linear.

    Attributes:
        name: qualified name.
        scheme: "A8W8 dynamic" and the like; empty if the layer was left alone.
        k, n: its sizes.
        output: dtype of the new layer's output; empty if it was left alone.
        bytes_before, bytes: of its parameters.
        note: why it was left alone, or what else changed.
    """

    name: str
    scheme: str
    k: int
    n: int
    output: str
    bytes_before: int
    bytes: int
    note: str

    @property
    def changed(self) -> bool:
        """Whether the layer was quantized."""
        return bool(self.scheme)


@dataclass(frozen=True)
class StaysFloat:
    """Float parameters or buffers that a model has after quantize, those of one name.

    Attributes:
        name: qualified name; `*` for numbers in it, which layers of one kind differ by.
        kind: class of the module that holds them.
        shape: of the first of them.
        bytes: of all of them.
        share: of the bytes that the model had before.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    share: float


class QuantizeReport(list[Quantized]):
    """What quantize did, a line for each nn.Linear; prints as a table.

    Attributes:
        stays_float: what is float afterwards, in and beside nn.Linear layers (embeddings,
            convolutions, experts in one tensor of 3 dims), the largest first.
    """

    stays_float: tuple[StaysFloat, ...] = ()

    def __str__(self) -> str:
        lines = ["no nn.Linear to quantize in this model"]
        if self:
            rows: list[list[object]] = [
                ["module", "scheme", "k", "n", "output", "bytes before", "bytes", ""]
            ]
            for r in self:
                scheme, output = r.scheme or "left float", r.output or "-"
                rows.append([r.name, scheme, r.k, r.n, output, r.bytes_before, r.bytes, r.note])
            done = [r for r in self if r.changed]
            before, after = sum(r.bytes_before for r in done), sum(r.bytes for r in done)
            summary = f"{len(done)} of {len(self)} layers quantized, {before:,} bytes to {after:,}"
            lines = [*table(rows), summary]
        if self.stays_float:
            share = sum(left.share for left in self.stays_float)
            lines.append(f"{share:.1%} of the model's bytes stay float, most of them in")
            rows = [["tensor", "of", "shape", "bytes", "share"]]
            for left in self.stays_float[:_SHOWN]:
                shape = " x ".join(map(str, left.shape))
                rows.append([left.name, left.kind, shape, left.bytes, f"{left.share:.1%}"])
            lines += table(rows, "  ")
        return "\n".join(lines)


FilterFn = Callable[[nn.Module, str], bool]
Places = dict[nn.Module, list[tuple[nn.Module, str]]]


@keeps_grad_mode
def quantize(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None = None,
    *,
    filter_fn: FilterFn | None = None,
    example_inputs: Iterable[Any] | None = None,
) -> QuantizeReport:
    """Replace the nn.Linear layers of a model by `QuantizedLinear` ones, in place.

    A layer that cannot be quantized is left float, and the report says why: it has no row in the
    product's table, it does more than nn.Linear does (a subclass, hooks, adapters, ...), its weight
    is shared with something else, calibration never reached it, ... The report also names what else
    is float and holds most of the bytes. Layers that are quantized already stay as they are, so a
    second call with another config and filter_fn gives the rest another scheme.

    A model may read a layer's weight itself, beside calling the layer or in its place. A quantized
    layer gives it the float weight that it stands for, computed each time. With example_inputs or
    calibration such layers are found, and left float.

    All or nothing: every layer is built once, and thrown away, before the first one is put in
    place; the largest goes in first, so memory that is too short shows before anything has changed;
    and Ctrl-C waits for the end of that last step. The most this takes beside the model is one
    quantized layer. What a compiled model compiled before, it compiles again at its next call.

    Args:
        model: float16 or bfloat16, on CPU or NPU.
        config: A8W8Dynamic(), A8W8Static() or A4W4Dynamic().
        calibration: for A8W8Static: inputs of the model, each a tensor, a tuple of positional
            arguments or a mapping of keyword arguments. A few dozen that look like the real ones.
        filter_fn: (module, qualified name) to whether an nn.Linear is to be quantized; default all.
        example_inputs: inputs of the model, as calibration's, for any config: a layer whose weight
            something else reads, or that is never called, stays float.

    Returns:
        A report: a list with one `Quantized` for each nn.Linear.

    Raises:
        LinearQuantTypeError: another config, or inputs that are none; a layer has an attribute of
            its own that a QuantizedLinear has for itself.
        LinearQuantValueError: a weight or an activation is NaN or infinite; calibration is missing,
            or has no inputs; no layer can be quantized.

    Source: torchao's quantize_ for the interface, aclnnQuantMatmulV4.md (hicann/ops-nn) for what
    the layers compute.
    """
    if type(config) not in SCHEMES:
        raise LinearQuantTypeError(
            f"quantize: config is {config!r}; allowed are A8W8Dynamic(), A8W8Static() and "
            "A4W4Dynamic()."
        )
    _check_calibration(config, calibration)
    if example_inputs is not None:
        check_batches("quantize", "example_inputs", example_inputs)
    # parameters made in inference mode could not be used outside
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        return _quantize(model, config, calibration, filter_fn, example_inputs)


def _quantize(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None,
    filter_fn: FilterFn | None,
    example_inputs: Iterable[Any] | None,
) -> QuantizeReport:
    bytes_before = _bytes(model)
    jobs = _jobs(model, config, calibration, filter_fn, example_inputs)
    todo = _left(jobs)
    if jobs and not todo:
        reasons = Counter(job.refusal for job in jobs)
        told = "; ".join(f"{count} x {why}" for why, count in reasons.most_common())
        raise LinearQuantValueError(
            f"quantize: none of the {len(jobs)} nn.Linear layers can be quantized: {told}."
        )
    for job in todo:
        job.sharers = [other for other in todo if other.source.weight is job.source.weight]

    # None: no bar where the output is no terminal
    for job in tqdm(todo, "checking layers", disable=None):
        try:
            _check_range(job, job.build({}))
        except LinearQuantTypeError as error:
            raise LinearQuantTypeError(f"quantize: {job.name}: {error}") from None
    _put_in_place(todo)
    report = QuantizeReport(map(_result, jobs))
    report.stays_float = _stays_float(model, bytes_before)
    return report


def _jobs(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None,
    filter_fn: FilterFn | None,
    example_inputs: Iterable[Any] | None,
) -> list[Job]:
    """What is to be done to each nn.Linear. Nothing but the jobs holds them afterwards, so that
    their memory goes as they are replaced."""
    places = places_of(model)
    jobs = _survey(model, config, filter_fn, places)
    _keep_tied(model, jobs)
    for job in _left(jobs):
        _check_finite(job)
    _observe(model, config, jobs, places, calibration, example_inputs)
    return jobs


def _put_in_place(todo: list[Job]) -> None:
    """The last step. It cannot be taken back, for the float weights go as it goes, so it is
    completed: what fails once, for lack of memory perhaps, is tried again."""
    kept: Kept = {}
    failed: BaseException | None = None
    bar = tqdm(total=len(todo), desc="quantizing", disable=None)
    with uninterrupted():
        # the largest first: what fits once fits ever after
        for job in sorted(todo, key=lambda job: -job.bytes_before):
            try:
                job.put_in_place(kept)
            except BaseException as error:
                failed = None if isinstance(error, Exception) else error
                job.put_in_place(kept)
            with suppress(Exception):  # a terminal that is gone
                bar.update()
    with suppress(Exception):
        bar.close()
    if failed is not None:
        raise failed


def _left(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.refusal]


def _check_calibration(config: Config, calibration: object) -> None:
    static = isinstance(config, A8W8Static)
    if static and calibration is None:
        raise LinearQuantValueError(
            "quantize: calibration is absent; A8W8Static needs the ranges of the activations. What "
            "to do: pass calibration=[...], a few dozen inputs of the model, or use A8W8Dynamic."
        )
    if calibration is not None and not static:
        raise LinearQuantValueError(
            f"quantize: calibration is given; {SCHEMES[type(config)]} needs none. What to do: "
            "leave it out, or use A8W8Static."
        )
    if calibration is not None:
        check_batches("quantize", "calibration", calibration)


def _quantized_kinds() -> tuple[type[nn.Module], ...]:
    return (QuantizedLinear, LinearQuant, *vendor_layers())


def _survey(
    model: nn.Module, config: Config, filter_fn: FilterFn | None, places: Places
) -> list[Job]:
    """Every nn.Linear of a model, in order; a refusal where it must not be touched."""
    elsewhere = held_elsewhere(model)
    jobs = [
        Job(name, module, config, places.get(module, []))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, _quantized_kinds())
    ]
    for job in jobs:
        job.refusal = _why_not(job, filter_fn) or illegal(job)
        if not job.refusal and job.source in elsewhere:
            job.refusal = f"{elsewhere[job.source]} holds it too, where it would stay what it is"
    return jobs


def _keep_tied(model: nn.Module, jobs: list[Job]) -> None:
    """A refusal may leave float a weight that another layer shares; that one stays float too."""
    floats = set(model.modules()) - {job.source for job in _left(jobs)}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if module in floats:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
    for job in _left(jobs):
        if others := owners.get(id(job.source.weight)):
            job.refusal = f"its weight is also that of {', '.join(others)}, which stays float"


def _why_not(job: Job, filter_fn: FilterFn | None) -> str:
    """Why a layer must not be touched; empty if it may be."""
    linear = job.source
    if filter_fn is not None and not filter_fn(linear, job.name):
        return "filter_fn leaves it"
    if why := why_not_replaceable(linear, nn.Linear, job.places):
        return why
    if not job.places:
        return "the model itself, which cannot be replaced in place: put it in an nn.Sequential"
    for name, wanted in (("weight", (job.n, job.k)), ("bias", (job.n,))):
        tensor = getattr(linear, name)
        if tensor is not None and (tuple(tensor.shape) != wanted or not tensor.numel()):
            return f"its {name} has shape {tuple(tensor.shape)}, not that of a matrix and its bias"
    if linear.weight.is_meta:
        return "its weight is on meta: load the model first"
    for name, tensor in linear.named_parameters():
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            return f"the memory of its {name} was freed: gather or load the model first"
    if linear.weight.dtype not in (torch.float16, torch.bfloat16):
        return (
            f"its weight is {dtype_name(linear.weight.dtype)}, LinearQuant works in float16 and "
            "bfloat16: call model.half() or model.bfloat16() first"
        )
    return ""


def _check_finite(job: Job) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(job.source, name)
        if tensor is None:
            continue
        bounds = torch.aminmax(tensor.detach())
        if not all(bound.isfinite() for bound in bounds):
            raise LinearQuantValueError(
                f"quantize: {job.name}.{name} holds NaN or infinity; nothing was changed. What to "
                "do: check how the model was loaded, or leave the layer float with filter_fn."
            )


def _check_range(job: Job, new: QuantizedLinear) -> None:
    """Refuse an output dtype that the layer's bias, or a step of its weight, is infinite in."""
    if not job.output_dtype.is_floating_point:
        return
    most = torch.finfo(job.output_dtype).max
    weight_scale = new.weight_scale if job.static else new.linear.scale
    for name, tensor in (("bias", job.source.bias), ("weight's scale", weight_scale)):
        if tensor is not None and (peak := float(tensor.detach().abs().max())) > most:
            given = dtype_name(job.output_dtype)
            raise LinearQuantValueError(
                f"quantize: {job.name}: output_dtype is {given}, and the {name} has {peak:.3g}; "
                f"{given} ends at {most:.5g}; nothing was changed. What to do: leave output_dtype "
                "out, or leave the layer float with filter_fn."
            )


def _observe(
    model: nn.Module,
    config: Config,
    jobs: list[Job],
    places: Places,
    calibration: Iterable[Any] | None,
    example_inputs: Iterable[Any] | None,
) -> None:
    """Run the model on the inputs there are, for what the layers themselves do not tell."""
    if example_inputs is not None and _left(jobs):
        layers = [job.source for job in _left(jobs)]
        seen = observe(model, "example_inputs", example_inputs, layers)
        _leave_unusual(model, jobs, seen, "example_inputs")
    if isinstance(config, A8W8Static) and _left(jobs):
        assert calibration is not None
        layers = [job.source for job in _left(jobs)]
        plain = _sequentials(model) if config.int8_between else []
        held = dict.fromkeys(child for parent in plain for child in parent)
        relus = [m for m in held if not why_not_replaceable(m, nn.ReLU)]
        seen = observe(model, "calibration", calibration, layers, [*plain, *relus])
        _leave_unusual(model, jobs, seen, "calibration")
        _calibrate(config, _left(jobs), seen)
        _keep_tied(model, jobs)
        if config.int8_between:
            _connect(plain, _left(jobs), places, seen.calls)


def _leave_unusual(model: nn.Module, jobs: list[Job], seen: Seen, inputs: str) -> None:
    for job in _left(jobs):
        if job.source in seen.read:
            by = seen.read[job.source]
            job.refusal = f"the model reads its weight outside its forward, by {by}"
        elif not seen.ranges[job.source].batches:
            job.refusal = f"{inputs} never reached it"
    _keep_tied(model, jobs)


def _calibrate(config: A8W8Static, jobs: list[Job], seen: Seen) -> None:
    for job in jobs:
        found = seen.ranges[job.source]
        if not found.finite:
            raise LinearQuantValueError(
                f"quantize: the input of {job.name} holds NaN or infinity during calibration; "
                "nothing was changed. What to do: check the inputs, or run the model in bfloat16."
            )
        activations = (found.low, found.high, job.input_dtype, config.symmetric)
        job.refusal = why_no_range(*activations)
        if not job.refusal:
            job.input_scale, job.input_offset = affine(*activations)


def _sequentials(model: nn.Module) -> list[nn.Sequential]:
    """Every plain nn.Sequential: it hands each output to the next module and to nothing else, if it
    is called at all."""
    return [m for m in model.modules() if type(m) is nn.Sequential and "forward" not in vars(m)]


def _connect(
    plain: list[nn.Sequential], jobs: list[Job], places: Places, calls: Counter[nn.Module]
) -> None:
    """Find the pairs between which int8 can stay: neighbours in an nn.Sequential that is called as
    a whole. One whose parts are called one by one, as a list of modules, hands on nothing."""
    by_layer: dict[nn.Module, Job] = {job.source: job for job in jobs}

    def only_by_sequentials(module: nn.Module) -> bool:
        parents = [parent for parent, _ in places[module]]
        return set(parents).issubset(plain) and calls[module] == sum(calls[p] for p in parents)

    for parent in plain:
        children = list(parent._modules.items())
        for (_, child), *rest in (children[i:] for i in range(len(children) - 1)):
            relu = None
            if type(rest[0][1]) is nn.ReLU and len(rest) > 1:
                relu = rest[0][1]
                place = (parent, rest[0][0])
                rest = rest[1:]
            first, second = (by_layer.get(m) for m in (child, rest[0][1]) if m is not None)
            if first is None or second is None or len(first.places) + len(second.places) > 2:
                continue
            between = [first.source, second.source] if relu is None else [child, relu, rest[0][1]]
            if not all(only_by_sequentials(m) for m in between if m is not None):
                continue
            if relu is not None and why_not_replaceable(relu, nn.ReLU):
                continue
            # ReLU's zero is where the int8 range begins: the clamp to it is the ReLU
            if relu is None or second.input_offset == -128:
                first.next, second.takes_int8 = second, True
                first.absorbed = place if relu is not None else None


def _bytes(model: nn.Module) -> int:
    """Of the tensors that a model holds."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    tensors.update((id(t), t) for _, _, t in tensors_beside(model))
    return sum(t.nbytes for t in tensors.values() if not is_lazy(t))


def _stays_float(model: nn.Module, bytes_before: int) -> tuple[StaysFloat, ...]:
    """Float parameters, buffers and tensors in plain attributes, outside quantized layers, by name,
    the largest first."""
    inside = {p for m in model.modules() if isinstance(m, _quantized_kinds()) for p in m.modules()}
    seen: set[int] = set()
    groups: dict[tuple[str, str], list[Tensor]] = {}
    held = [
        (f"{prefix}.{name}", module, tensor)
        for prefix, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
    ]
    for name, module, tensor in [*held, *tensors_beside(model)]:
        if module in inside or tensor is None or id(tensor) in seen or is_lazy(tensor):
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point():
            parts = ["*" if p.isdigit() else p for p in name.split(".") if p]
            groups.setdefault((".".join(parts), type(module).__name__), []).append(tensor)
    found = []
    for (name, kind), tensors in groups.items():
        size = sum(t.nbytes for t in tensors)
        found.append(
            StaysFloat(name, kind, tuple(tensors[0].shape), size, size / max(bytes_before, 1))
        )
    return tuple(sorted(found, key=lambda left: -left.bytes))


def _result(job: Job) -> Quantized:
    scheme, output, note = SCHEMES[type(job.config)], dtype_name(job.output_dtype), ""
    if job.refusal:
        scheme, output, note = "", "", job.refusal
    elif job.next:
        note = f"feeds {job.next.name} in int8"
        if job.absorbed:
            note += ", whose range ends where the ReLU between them did"
    size = job.bytes if job.bytes is not None else job.bytes_before
    return Quantized(job.name, scheme, job.k, job.n, output, job.bytes_before, size, note)
