"""quantize(): the nn.Linear layers of a float model become quantized ones, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .calibrate import check_batches, observe_inputs
from .errors import LinearQuantTypeError, LinearQuantValueError
from .formats import dtype_name
from .module import LinearQuant
from .quantize_layer import Job, Kept, affine, illegal
from .quantized_linear import QuantizedLinear
from .schemes import SCHEMES, A8W8Static, Config
from .text import table
from .vendor import vendor_layers
from .walk import places_of, uninterrupted, why_not_replaceable

__all__ = ["QuantizeReport", "Quantized", "quantize"]


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


class QuantizeReport(list[Quantized]):
    """What quantize did, a line for each nn.Linear; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no nn.Linear in this model"
        rows: list[list[object]] = [
            ["module", "scheme", "k", "n", "output", "bytes before", "bytes", ""]
        ]
        for r in self:
            scheme, output = r.scheme or "left float", r.output or "-"
            rows.append([r.name, scheme, r.k, r.n, output, r.bytes_before, r.bytes, r.note])
        done = [r for r in self if r.changed]
        before, after = sum(r.bytes_before for r in done), sum(r.bytes for r in done)
        summary = f"{len(done)} of {len(self)} layers quantized, {before:,} bytes to {after:,}"
        return "\n".join([*table(rows), summary])


FilterFn = Callable[[nn.Module, str], bool]


def quantize(
    model: nn.Module,
    config: Config,
    calibration: Iterable[Any] | None = None,
    *,
    filter_fn: FilterFn | None = None,
) -> QuantizeReport:
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
        A report: a list with one `Quantized` for each nn.Linear.

    Raises:
        LinearQuantTypeError: another config, or inputs that are none.
        LinearQuantValueError: a weight or an activation is NaN or infinite; calibration is missing
            or empty; no layer can be quantized.

    Source: torchao's quantize_ for the interface, aclnnQuantMatmulV4.md (hicann/ops-nn) for what
    the layers compute.
    """
    if type(config) not in SCHEMES:
        raise LinearQuantTypeError(
            f"quantize: config is {config!r}; allowed are A8W8Dynamic(), A8W8Static() and "
            "A4W4Dynamic()."
        )
    _check_calibration(config, calibration)
    jobs = _survey(model, config, filter_fn)
    for job in _left(jobs):
        _check_finite(job)
    if isinstance(config, A8W8Static) and _left(jobs):
        assert calibration is not None
        _calibrate(model, config, _left(jobs), calibration)
        if config.int8_between:
            _connect(model, _left(jobs))
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
        job.build({})
    kept: Kept = {}
    # the largest first: what fits once fits ever after
    order = sorted(todo, key=lambda job: -job.bytes_before)
    with uninterrupted():
        for job in tqdm(order, "quantizing", disable=None):
            job.put_in_place(kept)
    return QuantizeReport(map(_result, jobs))


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


def _survey(model: nn.Module, config: Config, filter_fn: FilterFn | None) -> list[Job]:
    """Every nn.Linear of a model, in order; a refusal where it must not be touched."""
    quantized = (QuantizedLinear, LinearQuant, *vendor_layers())
    names = {module: name for name, module in model.named_modules()}
    places = places_of(model)
    owners: dict[int, list[nn.Module]] = {}
    for parent in names:
        for parameter in parent._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(parent)

    jobs = [
        Job(name, module, config, places.get(module, []))
        for module, name in names.items()
        if isinstance(module, nn.Linear) and not isinstance(module, quantized)
    ]
    for job in jobs:
        job.refusal = _why_not(job, filter_fn) or illegal(job)
    # a refusal may leave float a weight that another layer shares
    floats = set(names) - {job.source for job in _left(jobs)}
    for job in _left(jobs):
        if others := [names[m] for m in owners[id(job.source.weight)] if m in floats]:
            job.refusal = f"its weight is also that of {', '.join(others)}, which stays float"
    return jobs


def _why_not(job: Job, filter_fn: FilterFn | None) -> str:
    """Why a layer must not be touched; empty if it may be."""
    linear = job.source
    if filter_fn is not None and not filter_fn(linear, job.name):
        return "filter_fn leaves it"
    if why := why_not_replaceable(linear, nn.Linear):
        return why
    if not job.places:
        return "the model itself, which cannot be replaced in place: put it in an nn.Sequential"
    if any(isinstance(parent, nn.TransformerEncoderLayer) for parent, _ in job.places):
        return "nn.TransformerEncoderLayer reads the weight itself, on its fast path"
    if linear.weight.is_meta:
        return "its weight is on meta: load the model first"
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


def _calibrate(
    model: nn.Module, config: A8W8Static, jobs: list[Job], batches: Iterable[Any]
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
            job.input_scale, job.input_offset = affine(
                seen.low, seen.high, job.input_dtype, config.symmetric
            )


def _connect(model: nn.Module, jobs: list[Job]) -> None:
    """Find the pairs between which int8 can stay: neighbours in an nn.Sequential, which hands each
    output to the next module and to nothing else."""
    by_layer: dict[nn.Module, Job] = {job.source: job for job in jobs}
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    for parent in model.modules():
        if type(parent) is not nn.Sequential or any(m._forward_hooks for m in parent):
            continue
        children = list(parent._modules.items())
        for (_, child), *rest in (children[i:] for i in range(len(children) - 1)):
            relu = None
            if type(rest[0][1]) is nn.ReLU and len(rest) > 1:
                relu = (parent, rest[0][0])
                rest = rest[1:]
            first, second = (by_layer.get(m) for m in (child, rest[0][1]) if m is not None)
            if first is None or second is None or uses[first.source] + uses[second.source] > 2:
                continue
            # ReLU's zero is where the int8 range begins: the clamp to it is the ReLU
            if relu is None or second.input_offset == -128:
                first.next, first.absorbed = second, relu


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
