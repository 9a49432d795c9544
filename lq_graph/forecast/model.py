"""The forecast of a step, and of a whole model: time, memory, and what binds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LinearQuantValueError
from ..rules.chips import MEASURED, Chip, chip_of
from .cost import COLLECTIVES, KernelCost, Parameters, communication_cost, fitted, kernel_cost
from .decoders import Decoder, read_decoder
from .kernels import FUSIONS, QUANTS, Kernel, Shape, step_kernels
from .memory import Memory, memory_of

__all__ = [
    "Forecast",
    "ModelForecast",
    "Saving",
    "Step",
    "TimedKernel",
    "forecast_model",
    "step_of",
]

BOUNDS = ("bandwidth", "compute", "launch", "communication")
SYSTEMATIC = 0.05  # what all kernels share and no residual shows: another run, another release
GAP_ERROR = 0.5  # the gap between kernels is an upper bound


@dataclass(frozen=True)
class TimedKernel:
    """A kernel, and its cost. `times` is how many a step has."""

    kernel: Kernel
    cost: KernelCost

    @property
    def times(self) -> int:
        return self.kernel.times

    @property
    def seconds(self) -> float:
        """Of all of them in a step."""
        return self.times * self.cost.seconds


@dataclass(frozen=True)
class Step:
    """A forecast of one step: a prefill, or a decode of one token for each sequence."""

    kernels: tuple[TimedKernel, ...]
    gap: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.kernels)

    @property
    def launches(self) -> int:
        """Kernels and collectives."""
        return sum(one.times for one in self.kernels)

    @property
    def computing(self) -> float:
        """Seconds of the kernels alone: without gaps and collectives, as a profile sums them."""
        return sum(
            one.times * (one.cost.seconds - self.gap)
            for one in self.kernels
            if one.kernel.op not in COLLECTIVES
        )

    @property
    def error(self) -> float:
        """Relative. Kernels of one operator and shape err together, different ones by chance."""
        parts = [(one.seconds, one.cost.error) for one in self.kernels]
        gaps = self.launches * self.gap
        squares = sum((seconds * error) ** 2 for seconds, error in parts)
        squares += (gaps * GAP_ERROR) ** 2
        return math.hypot(math.sqrt(squares) / self.seconds, SYSTEMATIC)

    @property
    def shares(self) -> dict[str, float]:
        """How much of the time each of BOUNDS takes."""
        found = dict.fromkeys(BOUNDS, 0.0)
        for one in self.kernels:
            cost = one.cost
            if cost.bound == "communication":
                found["communication"] += one.seconds
                continue
            found["bandwidth"] += one.times * cost.memory_seconds
            found["compute"] += one.times * cost.compute_seconds
            found["launch"] += one.times * cost.launch_seconds
        return {name: seconds / self.seconds for name, seconds in found.items()}

    @property
    def bound(self) -> str:
        """The largest share."""
        shares = self.shares
        return max(shares, key=lambda name: shares[name])

    @property
    def assumed(self) -> float:
        """The share of the time that no public measurement is behind."""
        return sum(one.seconds for one in self.kernels if one.cost.assumed) / self.seconds


@dataclass(frozen=True)
class Saving:
    """What a fusion saves in a step, with all others on."""

    fusion: str
    kernels: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """One model in one quantization.

    Attributes:
        quant: "bf16" (float16 on 310P), "w8a8" or "w4a4".
        decode, prefill: the steps, prefill of one prompt; None if `refused`.
        memory: of one device.
        savings: what each fusion saves in a decode step.
        refused: why the chip does not compute it; "".
    """

    quant: str
    decode: Step | None
    prefill: Step | None
    memory: Memory
    savings: tuple[Saving, ...]
    refused: str = ""


@dataclass(frozen=True)
class ModelForecast:
    """What `forecast_model` found; `print(it)` is the terminal's text.

    Attributes:
        model: its sizes.
        chip: of each device.
        batch, context, prompt, tp: what was asked.
        fusions: which were on.
        forecasts: one for each quantization.
        profile: what the user's profile gave, in a sentence; "".
    """

    model: Decoder
    chip: Chip
    batch: int
    context: int
    prompt: int
    tp: int
    fusions: tuple[str, ...]
    forecasts: tuple[Forecast, ...]
    profile: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether public measurements of kernels are of this chip."""
        return self.chip.name == MEASURED

    def __str__(self) -> str:
        from .text import text

        return text(self)

    def as_json(self) -> dict[str, Any]:
        """Everything, in seconds and bytes."""
        from .text import as_json

        return as_json(self)


def timed(kernels: Sequence[Kernel], chip: Chip, tp: int, parameters: Parameters) -> Step:
    """The time of kernels, one after the other: compute and collectives do not overlap."""
    found = []
    for kernel in kernels:
        if kernel.op in COLLECTIVES:
            cost = communication_cost(kernel.op, kernel.message, tp, chip, parameters)
        else:
            cost = kernel_cost(kernel.op, kernel.inputs, kernel.outputs, chip, parameters)
        found.append(TimedKernel(kernel, cost))
    return Step(tuple(found), parameters.gap)


def step_of(
    model: Decoder,
    shape: Shape,
    quant: str,
    chip: Chip,
    fusions: Collection[str] = FUSIONS,
    parameters: Parameters | None = None,
) -> Step:
    """A step of a model as our GE graphs compute it."""
    dtype = "float16" if chip.product == "310P" else "bfloat16"
    kernels = step_kernels(model, shape, quant, fusions, dtype)
    return timed(kernels, chip, shape.tp, parameters or fitted())


def forecast_model(
    model: str | Path | Mapping[str, Any],
    product: str = "A3",
    *,
    batch: int = 1,
    context: int = 4096,
    prompt: int | None = None,
    tp: int = 1,
    quants: Sequence[str] = QUANTS,
    fusions: bool = True,
    profile: str | Path | None = None,
) -> ModelForecast:
    """Forecast a decoder from its config.json: no weights, no NPU, no transformers.

    Args:
        model: a short name ("qwen3-8b"), a folder with a config.json, such a file, or its content.
        product: "A2", "A3" (one die), "950", "310P", or the name of a chip or its SoC in
            `lq_graph.rules.chips.CHIPS`.
        batch: sequences of a decode step.
        context: positions that a decode step reads, with the new one.
        prompt: tokens of a prefill, which is of one sequence; default context.
        tp: devices (dies on A3) that share the model.
        quants: of "bf16", "w8a8" (int8, per token, dynamic) and "w4a4".
        fusions: whether ours are on.
        profile: kernel_details.csv or op_summary csv of your own device, to fit to.

    Raises:
        LinearQuantValueError: a name, size or file that cannot be forecast; the text says why.
    """
    decoder, chip = read_decoder(model), chip_of(product)
    prompt = context if prompt is None else prompt
    for name, value in (("batch", batch), ("context", context), ("prompt", prompt), ("tp", tp)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LinearQuantValueError(
                f"forecast: {name} is {value!r}; it has to be a whole number from 1"
            )
    for quant in quants:
        if quant not in QUANTS:
            raise LinearQuantValueError(
                f"forecast: quantization {quant!r} is not known; allowed are {', '.join(QUANTS)}"
            )
    parameters, said = fitted(), ""
    if profile is not None:
        from .profile import fit_profile

        found = fit_profile(profile, chip, parameters)
        parameters, said = found.parameters, str(found)
    chosen = FUSIONS if fusions else ()
    decode, fill = Shape(batch, 1, context, tp), Shape(1, prompt, prompt, tp)
    forecasts = []
    for quant in quants:
        memory = memory_of(decoder, quant, batch, max(context, prompt), prompt, tp)
        why = refusal_of(chip, quant)
        if why:
            forecasts.append(Forecast(quant, None, None, memory, (), why))
            continue
        step, first = (
            step_of(decoder, shape, quant, chip, chosen, parameters) for shape in (decode, fill)
        )
        savings = _savings(decoder, decode, quant, chip, parameters) if fusions else ()
        forecasts.append(Forecast(quant, step, first, memory, savings))
    return ModelForecast(
        decoder, chip, batch, context, prompt, tp, tuple(chosen), tuple(forecasts), said
    )


def refusal_of(chip: Chip, quant: str) -> str:
    """Why the chip does not compute a quantization; "" if it does."""
    if quant == "w4a4" and chip.int4_ops is None:
        return f"the matrix unit of {chip.name} has no int4"
    if quant == "w8a8" and chip.product == "310P":
        return "its products take no pertoken_scale: no dynamic quantization"
    return ""


def _savings(
    model: Decoder, shape: Shape, quant: str, chip: Chip, parameters: Parameters
) -> tuple[Saving, ...]:
    """Each fusion alone turned off, and all of them."""
    whole = step_of(model, shape, quant, chip, FUSIONS, parameters)
    found = []
    for name in (*FUSIONS, "all"):
        left = () if name == "all" else tuple(one for one in FUSIONS if one != name)
        without = step_of(model, shape, quant, chip, left, parameters)
        if without.launches != whole.launches:
            found.append(
                Saving(name, without.launches - whole.launches, without.seconds - whole.seconds)
            )
    return tuple(found)
