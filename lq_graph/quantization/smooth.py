"""smooth(): makes activations easier to quantize, without changing what a float model computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LinearQuantValueError
from ..modules.places import places_of
from ..modules.replaceable import why_not_replaceable
from ..modules.transaction import keeps_grad_mode, one_at_a_time, uninterrupted
from ..reports import table
from ..rules.tables import dtype_name
from .calibrate import check_batches
from .smooth_trace import Source, Trace, address_of, trace

__all__ = ["SmoothReport", "Smoothed", "smooth"]

_LOG_LIMIT = 8  # factors are from 2 ** -8 to 2 ** 8
_LOCK = one_at_a_time()  # two threads may smooth one model


@dataclass(frozen=True)
class Smoothed:
    """The result of smooth for one nn.Linear.

    Attributes:
        name: qualified name.
        source: qualified name of the norm or linear layer that rescales its input now; empty if its
            input is as before.
        note: why it is as before.
    """

    name: str
    source: str
    note: str

    @property
    def changed(self) -> bool:
        """Whether the layer's input is rescaled."""
        return bool(self.source)


class SmoothReport(list[Smoothed]):
    """What smooth did, one line for each nn.Linear. Printed as a table, layers whose names differ
    in numbers only are one line."""

    def __str__(self) -> str:
        counts = Counter((_kind(r.name), _kind(r.source) or "-", _kind(r.note)) for r in self)
        rows: list[list[object]] = [["layers", "", "rescaled by", ""]]
        rows += [[name, count, source, note] for (name, source, note), count in counts.items()]
        done = sum(r.changed for r in self)
        return "\n".join([*table(rows), f"inputs of {done} of {len(self)} layers smoothed"])


def _kind(text: str) -> str:
    """A name, or a text with names, that is equal for all layers of a kind."""
    return re.sub(r"\.\d+\b", ".*", text)


@keeps_grad_mode
def smooth(model: nn.Module, inputs: Iterable[Any], *, alpha: float = 0.5) -> SmoothReport:
    """Balance the channels of a float model's activations before `quantize`, in place.

    A token has one scale for all its channels, so a channel with large values takes the steps of
    all others. This divides each channel of a layer's input by a factor, and multiplies the column
    of the layer's weight by it. The division needs no operator: the factors go into the
    parameters of the module that makes the input. This is a norm (all layers that take its output,
    q_proj, k_proj and v_proj for example, get the same factors), or a linear layer whose output is
    multiplied with something else (up_proj, for down_proj). Up to rounding, the model computes
    what it computed before.

    The model is run to see which modules these are. A layer stays as it is, and the report says
    why, where its input comes from something else, where something else also takes that input or
    reads a parameter, where a parameter is shared, or where a layer does more than nn.Linear does.
    A norm's factors are tried before they are used.

    Atomic: if a step fails, the model is unchanged. Ctrl-C waits for the end of the last step. The
    outputs of norms and linear layers are kept in memory during a run.

    Args:
        model: float, on CPU or NPU.
        inputs: an iterable of inputs of the model, each a tensor, a tuple of positional arguments
            or a mapping of keyword arguments. Pass a few that look like the real ones. Tensors are
            moved to the model's device, and float tensors are cast to its dtype.
        alpha: from 0 to 1, how much of an activation's range goes into the weights.

    Returns:
        A SmoothReport: a list with one `Smoothed` for each nn.Linear.

    Raises:
        LinearQuantTypeError: inputs of another type.
        LinearQuantValueError: alpha outside 0 to 1; no inputs; NaN or infinity in an activation; no
            layer can be smoothed.

    Source: SmoothQuant (Xiao et al., 2022), section 4 for the factors.
    """
    if not 0 <= alpha <= 1:
        raise LinearQuantValueError(f"smooth: alpha is {alpha!r}; allowed is 0 to 1.")
    check_batches("smooth", "inputs", inputs)
    with _LOCK, torch.inference_mode(False), torch.no_grad():
        found = trace(model, inputs)
        notes = _notes(model, found)
        groups = {}
        for source in found.sources.values():
            if source.targets and not any(notes[layer] for layer in source.targets):
                factors = _factors(source, alpha)
                if why := _why_not_held(source, factors):
                    notes.update(dict.fromkeys(source.targets, why))
                else:
                    groups[source] = factors
        if notes and not groups:
            reasons = Counter(map(_kind, notes.values())).most_common()
            listed = "; ".join(f"{count} x {why}" for why, count in reasons)
            raise LinearQuantValueError(
                f"smooth: none of the {len(notes)} nn.Linear layers can be smoothed: {listed}."
            )
        with uninterrupted():
            for source, factors in groups.items():
                for parameter, by in _changes(source, factors):
                    parameter.copy_(parameter * by)
    rescaled_by = {layer: source.name for source in groups for layer in source.targets}
    return SmoothReport(
        Smoothed(found.sources[layer].name, rescaled_by.get(layer, ""), note)
        for layer, note in notes.items()
    )


def _notes(model: nn.Module, found: Trace) -> dict[nn.Linear, str]:
    """For each linear layer, why its input cannot be rescaled; empty if it can."""
    places = places_of(model)
    owners = Counter(address_of(p) for m in model.modules() for p in m.parameters(recurse=False))

    def why_fixed(module: nn.Module) -> str:
        """Why a module's parameters must stay as they are."""
        name = found.sources[module].name
        if module in found.read:
            return f"the parameters of {name} are not its own: {found.read[module]}"
        held_by = places.get(module, ())
        if isinstance(module, nn.Linear) and (
            why := why_not_replaceable(module, nn.Linear, held_by)
        ):
            return f"{name}: {why}"
        for parameter in module.parameters(recurse=False):
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                return f"a parameter of {name} is a {type(parameter).__name__} that may not change"
            if owners[address_of(parameter)] > 1:
                return f"{name} shares a parameter with another module"
        return ""

    notes: dict[nn.Linear, str] = {}
    for layer in (m for m in found.sources if isinstance(m, nn.Linear)):
        fed_by = found.fed_by.get(layer, set())
        if not fed_by or any(source is not None and source.peak is None for source in fed_by):
            notes[layer] = "inputs never reached it"
        elif len(fed_by) > 1 or None in fed_by:
            notes[layer] = "its input is not the output of one norm, nor of one linear layer"
        else:
            (source,) = fed_by
            assert source is not None
            notes[layer] = source.refusal and f"the output of {source.name}: {source.refusal}"
            notes[layer] = notes[layer] or why_fixed(source.module) or why_fixed(layer)
    for source in found.sources.values():  # all layers that take an output, or none
        if why := next((notes[layer] for layer in source.targets if notes[layer]), ""):
            for layer in source.targets:
                notes[layer] = notes[layer] or f"another layer takes the same input: {why}"
    return notes


def _factors(source: Source, alpha: float) -> Tensor:
    """float32 (k,): what each channel of the source's output is divided by.

    They have the 8 bits of bfloat16 and are from 1 / 256 to 256, so every dtype holds them, and
    parameters are rounded once.
    """
    peak = source.peak
    assert peak is not None
    if not peak.isfinite().all():
        half = any(p.dtype == torch.float16 for p in source.module.parameters(recurse=False))
        wider = ", or call model.bfloat16() first" if half else ""
        raise LinearQuantValueError(
            f"smooth: the output of {source.name} holds NaN or infinity; the model is unchanged. "
            f"What to do: check the inputs{wider}."
        )
    columns = [layer.weight.abs().amax(0).float() for layer in source.targets]
    weights = torch.stack(columns).amax(0)
    used = (peak > 0) & (weights > 0)
    if not used.any():
        return torch.ones_like(peak)
    logs = alpha * peak.log2() - (1 - alpha) * weights.log2()
    logs = (logs - logs[used].mean()).clamp(-_LOG_LIMIT, _LOG_LIMIT)
    return logs.where(used, 0.0).exp2().bfloat16().float()


def _changes(source: Source, factors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The parameters to change, and what to multiply them by, float32."""
    for parameter in source.module.parameters(recurse=False):
        rows = factors.reshape([-1] + [1] * (parameter.dim() - 1))
        yield parameter, rows.reciprocal()
    for layer in source.targets:
        yield layer.weight, factors


def _why_not_held(source: Source, factors: Tensor) -> str:
    """Why a dtype cannot hold a result; empty if all fit."""
    assert source.peak is not None
    output, before = float((source.peak / factors).max()), float(source.peak.max())
    for parameter, by in _changes(source, factors):
        most = torch.finfo(parameter.dtype).max / 2**_LOG_LIMIT  # it may be changed twice
        peak = float((parameter * by).abs().max()) if parameter.numel() else 0.0
        if not peak <= most or output > max(most, before):
            return f"{dtype_name(parameter.dtype)} may not hold the values that it would get"
    return ""
