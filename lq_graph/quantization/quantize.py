"""quantize(): the nn.Linear layers of a float model become quantized ones, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..modules.places import places_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import why_not_replaceable
from ..modules.transaction import keeps_grad_mode, one_at_a_time, uninterrupted
from ..rules.tables import dtype_name
from .activation_scales import affine, why_no_range
from .calibrate import Seen, check_batches, observe
from .int8_between import connect, sequentials
from .layer import Job, Kept
from .report import Quantized, QuantizeReport, bytes_of, stays_float
from .schemes import SCHEMES, A8W8Static, Config
from .select import FilterFn, Places, check_finite, keep_tied, left, survey

__all__ = ["quantize"]

_LOCK = one_at_a_time()  # a model that two threads quantize is quantized by one of them


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

    Source: torchao's `quantize_` for the interface, aclnnQuantMatmulV4.md (hicann/ops-nn) for what
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
    bytes_before = bytes_of(model)
    jobs = _jobs(model, config, calibration, filter_fn, example_inputs)
    todo = left(jobs)
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
            raise error.in_layer("quantize", job.name) from None
    _put_in_place(todo)
    report = QuantizeReport(map(_result, jobs))
    report.stays_float = stays_float(model, bytes_before)
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
    jobs = survey(model, config, filter_fn, places)
    keep_tied(model, jobs)
    for job in left(jobs):
        check_finite(job)
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
    if example_inputs is not None and left(jobs):
        layers = [job.source for job in left(jobs)]
        seen = observe(model, "example_inputs", example_inputs, layers)
        _leave_unusual(model, jobs, seen, "example_inputs")
    if isinstance(config, A8W8Static) and left(jobs):
        assert calibration is not None
        layers = [job.source for job in left(jobs)]
        plain = sequentials(model) if config.int8_between else []
        held = dict.fromkeys(child for parent in plain for child in parent)
        relus = [m for m in held if not why_not_replaceable(m, nn.ReLU)]
        seen = observe(model, "calibration", calibration, layers, [*plain, *relus])
        _leave_unusual(model, jobs, seen, "calibration")
        _calibrate(config, left(jobs), seen)
        keep_tied(model, jobs)
        if config.int8_between:
            connect(plain, left(jobs), places, seen.calls)


def _leave_unusual(model: nn.Module, jobs: list[Job], seen: Seen, inputs: str) -> None:
    for job in left(jobs):
        if job.source in seen.read:
            by = seen.read[job.source]
            job.refusal = f"the model reads its weight outside its forward, by {by}"
        elif not seen.ranges[job.source].batches:
            job.refusal = f"{inputs} never reached it"
    keep_tied(model, jobs)


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
