"""Tables of the forecast: the chips, the fitted parameters, and every published figure."""

from __future__ import annotations

from collections.abc import Iterator

from lq_graph.forecast.checks import Comparison, compare
from lq_graph.forecast.cost import fitted
from lq_graph.forecast.decoders import PUBLIC
from lq_graph.forecast.measurements import FIT, HELD_OUT, INFORMATION
from lq_graph.forecast.operators import OPERATORS
from lq_graph.forecast.text import figures
from lq_graph.rules.chips import CHIPS

__all__ = ["TABLES"]

Rows = Iterator[list[str]]


def forecast_chips() -> tuple[list[str], Rows]:
    """The chips."""
    head = ["chip", "product", "SoC", "cores", "bf16", "int8", "int4", "memory", "L2", "link"]
    head.append("source")

    def rows() -> Rows:
        for one in CHIPS:
            tera = [
                "none" if ops is None else f"{ops / 1e12:,.0f} T"
                for ops in (one.bf16_ops, one.int8_ops, one.int4_ops)
            ]
            memory = f"{one.memory / 2**30:.0f} GiB at {one.bytes_per_second / 1e12:.3g} TB/s"
            link = f"{one.link / 1e9:.0f} GB/s"
            if one.mesh:
                link += f", split among {one.mesh - 1} devices"
            if one.pair:
                link += f"; {one.pair / 1e9:.0f} between two dies of a card"
            cells = [f"`{one.name}`", one.product, f"`{one.soc}`", str(one.cores), *tera, memory]
            yield [*cells, f"{one.l2 / 2**20:.0f} MiB", link, one.source]

    return head, rows()


def forecast_operators() -> tuple[list[str], Rows]:
    """What the fit gave."""
    at = fitted()
    head = [
        "operator",
        "op types",
        "measurements",
        "launch",
        "of the bandwidth",
        "of the peak",
        "error",
    ]

    def rows() -> Rows:
        for one in OPERATORS:
            rate = at.rates[one.family]
            launch = f"{at.launches[one.name] * 1e6:.1f} us"
            launch += ", assumed" if one.launch is not None else ""
            number = f"as {one.like}, assumed" if one.like else str(at.points[one.name])
            computes = one.kind in ("product", "attention")
            yield [
                one.name,
                ", ".join(f"`{kind}`" for kind in one.types),
                number,
                launch,
                f"{rate.bandwidth:.0%}",
                f"{rate.compute:.0%}" if computes else "",
                f"{at.errors[one.name]:.0%}",
            ]
        yield [
            "collectives", "`hcom_allReduce_`, `hcom_allGather_`", "21",
            f"{at.collective * 1e6:.1f} us", f"{at.link:.0%} of the link", "",
            f"{at.collective_error:.0%}",
        ]  # fmt: skip

    return head, rows()


def _compared(use: str) -> tuple[list[str], Rows]:
    head = ["id", "what", "chip", "measured", "forecast", "error", "source"]

    def rows() -> Rows:
        for one in compare():
            if one.measurement.use == use:
                row = one.measurement
                note = f"; {row.note}" if row.note else ""
                yield [row.id, _what(one) + note, row.chip.name, *figures(one), f"`{row.source}`"]

    return head, rows()


def _what(one: Comparison) -> str:
    row, about = one.measurement, one.measurement.about
    if row.is_kernel:
        shapes = "; ".join("x".join(map(str, shape or ())) for _, shape in row.inputs[:2])
        return f"`{row.op}` {row.inputs[0][0]} {shapes}"
    if row.devices:
        return f"`{row.op}` of {row.message:,.0f} bytes, {row.devices} devices"
    if "model" in about:
        return (
            f"{row.op}, {about['model']} {about['quant']}, tp {about['tp']}, batch "
            f"{about['batch']}, context {about['context']}, kernels of {about['kernels']}"
        )
    return row.op


def forecast_held_out() -> tuple[list[str], Rows]:
    return _compared(HELD_OUT)


def forecast_fit() -> tuple[list[str], Rows]:
    return _compared(FIT)


def forecast_information() -> tuple[list[str], Rows]:
    return _compared(INFORMATION)


def forecast_models() -> tuple[list[str], Rows]:
    """The short names."""
    head = ["name", "kind", "hidden", "intermediate", "layers", "heads", "kv heads", "head"]
    head.append("vocabulary")

    def rows() -> Rows:
        for one in PUBLIC.values():
            sizes = (one.hidden, one.intermediate, one.layers, one.heads, one.kv_heads, one.head)
            vocabulary = f"{one.vocab}{', tied' if one.tied else ''}"
            yield [f"`{one.name}`", one.kind, *map(str, sizes), vocabulary]

    return head, rows()


TABLES = (
    forecast_chips,
    forecast_operators,
    forecast_held_out,
    forecast_fit,
    forecast_information,
    forecast_models,
)
