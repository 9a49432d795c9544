"""Which nn.Linear layers of a model may be quantized, and why not the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import LinearQuantValueError
from ..modules.linear_quant import LinearQuant
from ..modules.places import held_elsewhere
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import why_not_replaceable
from ..modules.vendor import vendor_layers
from ..rules.tables import dtype_name
from .layer import Job, illegal
from .schemes import Config

__all__ = ["FilterFn", "Places", "check_finite", "keep_tied", "left", "quantized_kinds", "survey"]

FilterFn = Callable[[nn.Module, str], bool]
Places = dict[nn.Module, list[tuple[nn.Module, str]]]


def left(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not job.refusal]


def quantized_kinds() -> tuple[type[nn.Module], ...]:
    return (QuantizedLinear, LinearQuant, *vendor_layers())


def survey(
    model: nn.Module, config: Config, filter_fn: FilterFn | None, places: Places
) -> list[Job]:
    """Every nn.Linear of a model, in order; a refusal where it must not be touched."""
    elsewhere = held_elsewhere(model)
    jobs = [
        Job(name, module, config, places.get(module, []))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, quantized_kinds())
    ]
    for job in jobs:
        job.refusal = _why_not(job, filter_fn) or illegal(job)
        if not job.refusal and job.source in elsewhere:
            job.refusal = f"{elsewhere[job.source]} holds it too, where it would stay what it is"
    return jobs


def keep_tied(model: nn.Module, jobs: list[Job]) -> None:
    """A refusal may leave float a weight that another layer shares; that one stays float too."""
    floats = set(model.modules()) - {job.source for job in left(jobs)}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if module in floats:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(name)
    for job in left(jobs):
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


def check_finite(job: Job) -> None:
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
