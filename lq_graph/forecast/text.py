"""A forecast as text for a terminal of 80 columns, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..reports import shortened, table, wrapped
from .checks import Comparison, compare
from .kernels import FLOAT
from .measurements import FIT, HELD_OUT, INFORMATION
from .model import Forecast, ModelForecast, Step, TimedKernel, refusal_of

__all__ = ["as_json", "figures", "measurements_json", "measurements_text", "text"]

GIB = 2**30
_BOUNDS = {"communication": "links"}
_LONG = 24  # kernels of a layer, above which those of an operator share a line
_ROLE = 16  # characters
_NAMES = {"bf16": "bf16", "w8a8": "W8A8", "w4a4": "W4A4"}
_WITH_ATTENTION = ("A2", "A3")  # products whose graphs have FusedInferAttentionScore
_NO_MEASUREMENT = "estimated, no public measurement"


def _name(found: ModelForecast, quant: str) -> str:
    return "fp16" if quant == "bf16" and found.chip.product == "310P" else _NAMES[quant]


def _time(seconds: float, error: float) -> str:
    """ "10.4 ms ± 8 %"."""
    return f"{_number(seconds * 1e3)} ms ± {error:.0%}".replace("%", " %")


def _number(value: float) -> str:
    """Three digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def text(found: ModelForecast, *, kernels: bool = False) -> str:
    """Times and memory; with `kernels` also those of a layer, and what each fusion saves."""
    model, chip = found.model, found.chip
    per = "die" if chip.product == "A3" else "chip"
    devices = f"{found.tp} {per}s" if found.tp > 1 else f"one {per}"
    lines = [
        f"{model.name} ({model.parameters / 1e9:.2f} B parameters) on {devices} of {chip.name}",
        f"batch {found.batch}, context {found.context:,}; prefill of {found.prompt:,} tokens; "
        f"GE graph; fusions {'on' if found.fusions else 'off'}",
    ]
    if found.profile:
        lines += wrapped(found.profile)
    lines += ["", *_summary(found), "", *_memory(found)]
    for forecast in found.forecasts if kernels else ():
        if forecast.decode is not None:
            lines += ["", *_layer(found, forecast, forecast.decode)]
    for forecast in found.forecasts if kernels else ():
        if forecast.savings:
            lines += ["", *_savings(found, forecast)]
    return "\n".join([*lines, "", *_caution(found, kernels)])


def _summary(found: ModelForecast) -> list[str]:
    """One row for each quantization."""
    head = ["", "decode step", "tokens/s", "prefill", "GiB", "binds", "measured"]
    rows: list[list[object]] = [list(head)]
    refused = []
    first = next((one for one in found.forecasts if one.decode), None)
    for one in found.forecasts:
        name = _name(found, one.quant)
        if one.decode is None or one.prefill is None:
            refused.append(f"{name}: not forecast: {one.refused}")
            continue
        decode, prefill = one.decode, one.prefill
        rows.append(
            [
                name,
                _time(decode.seconds, decode.error),
                _number(found.batch / decode.seconds),
                _time(prefill.seconds, prefill.error),
                f"{one.memory.total / GIB:.1f}",
                decode.bound,
                "no" if not _is_measured(found, one) else f"{1 - decode.assumed:.0%}",
            ]
        )
    lines = table(rows) if len(rows) > 1 else []
    for one in found.forecasts:
        if one is first or not (first and first.decode and first.prefill):
            continue
        if one.decode is not None and one.prefill is not None:
            step = one.decode.seconds / first.decode.seconds
            fill = one.prefill.seconds / first.prefill.seconds
            lines.append(
                f"{_name(found, one.quant)} takes {step:.2f} of {_name(found, first.quant)}'s "
                f"decode step, {fill:.2f} of its prefill"
            )
    for one in found.forecasts:
        if one.decode is not None and one.prefill is not None:
            lines.append(f"{_name(found, one.quant)}: decode {_shares(one.decode)}")
            lines.append(f"{' ' * 5} prefill {_shares(one.prefill)}")
    return lines + refused


def _is_measured(found: ModelForecast, one: Forecast) -> bool:
    return found.is_measured and one.quant != "w4a4"


def _shares(step: Step) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in step.shares.items() if share > 0.005)


def _layer(found: ModelForecast, forecast: Forecast, step: Step) -> list[str]:
    """The kernels of one layer of a decode step."""
    rows: list[list[object]] = [["kernel", "is", "n", "us", "±", "MB", "bound"]]
    inside = [one for one in step.kernels if one.kernel.in_layer]
    groups: dict[tuple[object, ...], list[TimedKernel]] = {}
    for one in inside:
        kernel = one.kernel
        key = (kernel.op,) if len(inside) > _LONG else (kernel.op, kernel.role, kernel.inputs)
        groups.setdefault(key, []).append(one)
    for same in groups.values():
        cost = max((one.cost for one in same), key=lambda cost: cost.seconds)
        rows.append(
            [
                same[0].kernel.op,
                shortened(", ".join(dict.fromkeys(one.kernel.role for one in same)), _ROLE),
                len(same),
                f"{sum(one.cost.seconds for one in same) * 1e6:.1f}",
                f"{cost.error:.0%}" + (" *" if cost.assumed else ""),
                f"{sum(one.cost.bytes for one in same) / 1e6:.2f}",
                _BOUNDS.get(cost.bound, cost.bound),
            ]
        )
    total = sum(one.cost.seconds for one in inside)
    rest = step.seconds - sum(one.seconds for one in inside)
    name = _name(found, forecast.quant)
    count = sum(one.times for one in step.kernels if not one.kernel.in_layer)
    return [
        f"{name}, a decode step: {found.model.layers} layers of {len(inside)} kernels, "
        f"{total * 1e6:.0f} us each",
        *table(rows),
        f"and {count} kernels of embedding, positions and head, {rest * 1e3:.2f} ms",
    ]


def _savings(found: ModelForecast, forecast: Forecast) -> list[str]:
    assert forecast.decode is not None
    rows: list[list[object]] = [["without", "kernels more", "us a step", "of the step"]]
    for one in forecast.savings:
        name = "merging of layers" if one.fusion == "merge" else one.fusion
        name = "all of these" if one.fusion == "all" else name
        share = one.seconds / forecast.decode.seconds
        rows.append([name, one.kernels, f"{one.seconds * 1e6:,.0f}", f"{share:+.1%}"])
    return [
        f"{_name(found, forecast.quant)}, what each fusion saves in a decode step",
        *table(rows),
    ]


def _memory(found: ModelForecast) -> list[str]:
    """Each part, and whether it fits."""
    head = ["GiB a device", "weights", "FRACTAL_NZ", "cache", "workspace", "CANN*", "total"]
    rows: list[list[object]] = [list(head)]
    lines = []
    has = found.chip.memory
    for one in found.forecasts:
        m = one.memory
        parts = (m.weights, m.padding, m.cache, m.workspace, m.runtime, m.total)
        name = _name(found, one.quant)
        rows.append([name, *(f"{part / GIB:.2f}" for part in parts)])
        if refusal_of(found.chip, one.quant):
            continue
        fits = m.sequences_that_fit(has)
        positions = max(found.context, found.prompt)
        if m.total > has:
            what = (
                f"{fits} sequences of {positions:,} positions fit"
                if fits
                else "no sequence fits; share it among more devices (--tp)"
            )
            lines += wrapped(f"{name} does not fit into {has / GIB:.0f} GiB: {what}")
        else:
            lines += wrapped(
                f"{name} fits into {has / GIB:.0f} GiB, with up to {fits:,} sequences of "
                f"{positions:,} positions"
            )
    return [*table(rows), "* assumed", *lines]


def _caution(found: ModelForecast, kernels: bool) -> list[str]:
    """What the figures rest on."""
    lines = []
    if not found.is_measured:
        lines += wrapped(
            f"{found.chip.name}: {_NO_MEASUREMENT} of its kernels. The figures are those of an A3 "
            "die, carried over by bandwidth and operations."
        )
    if found.chip.product not in _WITH_ATTENTION:
        lines += wrapped(
            f"The kernels are those of A2 and A3. On {found.chip.product} the attention of our "
            "graphs is torch's own, in more kernels."
        )
    if found.fusions and any(one.quant == FLOAT for one in found.forecasts):
        lines += wrapped(
            f"{_name(found, FLOAT)}: as lq_graph.fuse leaves it in a pass of your own; a graph "
            "without a quantized layer is not fused by itself. Its layers are not merged."
        )
    if any(one.quant == "w4a4" and one.decode for one in found.forecasts):
        lines += wrapped(f"W4A4: {_NO_MEASUREMENT} of an int4 product.")
    if found.tp > 1 and found.tp not in (8, 16):
        lines += wrapped(
            f"Collectives of {found.tp} devices: {_NO_MEASUREMENT}. Those of 8 and 16 A3 dies are "
            "carried over."
        )
    marked = "marked * " if kernels else ""
    lines += wrapped(
        f"±: one standard deviation. measured: the share of the time that rests on published "
        f"measurements; the other kernels {marked}rest on assumptions. Sampling and the host "
        "between steps are not in it."
    )
    if not kernels:
        lines += wrapped("--kernels adds the kernels of a layer, and what each fusion saves.")
    return lines


def as_json(found: ModelForecast) -> dict[str, Any]:
    """Everything, in seconds and bytes."""
    return {
        "model": asdict(found.model),
        "parameters": found.model.parameters,
        "chip": {**asdict(found.chip), "also": list(found.chip.also)},
        "batch": found.batch,
        "context": found.context,
        "prompt": found.prompt,
        "tp": found.tp,
        "fusions": list(found.fusions),
        "profile": found.profile,
        "forecasts": [_forecast_json(found, one) for one in found.forecasts],
    }


def _forecast_json(found: ModelForecast, one: Forecast) -> dict[str, Any]:
    return {
        "quant": one.quant,
        "refused": one.refused,
        "measured": one.decode is not None and _is_measured(found, one),
        "decode": one.decode and _step_json(one.decode),
        "prefill": one.prefill and _step_json(one.prefill),
        "tokens_per_second": one.decode and found.batch / one.decode.seconds,
        "memory": {**asdict(one.memory), "total": one.memory.total},
        "fits": one.memory.total <= found.chip.memory,
        "savings": [asdict(saving) for saving in one.savings],
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "seconds": step.seconds,
        "error": step.error,
        "launches": step.launches,
        "bound": step.bound,
        "shares": step.shares,
        "assumed": step.assumed,
        "kernels": [
            {
                "op": one.kernel.op,
                "role": one.kernel.role,
                "in_layer": one.kernel.in_layer,
                "times": one.times,
                **asdict(one.cost),
            }
            for one in step.kernels
        ],
    }


def measurements_text() -> str:
    """Every measurement beside its forecast."""
    lines = []
    titles = {HELD_OUT: "held out of the fit", FIT: "in the fit", INFORMATION: "for information"}
    for use, title in titles.items():
        rows: list[list[object]] = [["", "chip", "measured", "forecast", "error"]]
        for one in compare():
            row = one.measurement
            if row.use == use:
                rows.append([shortened(row.id, 36), row.chip.name, *figures(one)])
        lines += [title, *table(rows), ""]
    return "\n".join(lines + ["Sources: measurements.json of lq_graph.forecast, or --json."])


def figures(one: Comparison) -> list[str]:
    """Measured, forecast and error, as text."""
    row = one.measurement
    return [
        f"{_number(row.value)} {row.unit}".strip(),
        "" if one.forecast is None else _number(one.forecast),
        "" if one.error is None else f"{one.error:+.1%}",
    ]


def measurements_json() -> list[dict[str, Any]]:
    """The same, with sources and notes."""
    found = []
    for one in compare():
        row = one.measurement
        found.append(
            {
                "id": row.id,
                "op": row.op,
                "chip": row.chip.name,
                "measured": row.value,
                "unit": row.unit,
                "forecast": one.forecast,
                "error": one.error,
                "use": row.use,
                "source": row.source,
                "note": row.note,
            }
        )
    return found
