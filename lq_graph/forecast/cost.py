"""The time of one kernel.

    kernel_cost(op_type, inputs, outputs, product="A3") -> KernelCost

    from lq_graph.forecast import kernel_cost

    cost = kernel_cost(
        "QuantBatchMatmulV3",
        inputs=[("int8", (1, 4096)), ("int8", (4096, 6144)), ("float32", (6144,))],
        outputs=[("bfloat16", (1, 6144))],
        product="A3",
    )
    cost.seconds, cost.bound, cost.error

`op_type` is a GE op type, as in a graph or a profile. A tensor is its dtype (torch's, or a name:
"int8", "bf16", "float16", "int4") and its logical shape, of a FRACTAL_NZ weight too. The order is
the operator's; absent inputs are left out. A shape may be None if a graph does not have it: that
tensor then counts no bytes. Of the operands of a product and of an attention that is refused. An op
type without a record of its own costs what an elementwise kernel costs, and says `assumed`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..rules.chips import MEASURED, Chip, chip_of
from .operators import Operator, Tensors, Work, operator_of, work_of

__all__ = [
    "KernelCost",
    "Parameters",
    "Rate",
    "communication_cost",
    "fitted",
    "kernel_cost",
    "of_work",
]

FITTED = Path(__file__).with_name("fitted.json")
# Relative errors, where the residuals say nothing.
ASSUMED = 0.5  # an operator, a dtype or a path that nobody has measured
OTHER_CHIP = {"A2": 0.25, "A3": 0.25, "950": 0.5, "310P": 0.5}  # than the measured one
# A2: pairs of the vendor's A2 and A3 figures differ by 1.24 to 1.47 on equal chips.
COLLECTIVES = ("allReduce", "allGather", "reduceScatter")


@dataclass(frozen=True)
class Rate:
    """Shares of the peaks that kernels of a family reach."""

    bandwidth: float
    compute: float


@dataclass(frozen=True)
class Parameters:
    """Of the cost model.

    Attributes:
        launches: seconds of a kernel without work, by operator.
        rates: by family; by operator where a profile gave it.
        errors: relative error of a kernel's time, by operator.
        gap: seconds between two kernels of a graph.
        collective: seconds of a collective without a message.
        link: share of the link's peak.
        collective_error: relative.
        points: measurements that each operator's own parameters rest on.
    """

    launches: Mapping[str, float]
    rates: Mapping[str, Rate]
    errors: Mapping[str, float]
    gap: float
    collective: float
    link: float
    collective_error: float
    points: Mapping[str, int] = field(default_factory=dict)
    profiled: frozenset[str] = frozenset()  # operators fitted to the user's own profile

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["profiled"]
        return found

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Parameters:
        rates = {name: Rate(**rate) for name, rate in found["rates"].items()}
        names = Parameters.__dataclass_fields__
        rest = {key: value for key, value in found.items() if key in names and key != "rates"}
        return Parameters(rates=rates, **rest)


@dataclass(frozen=True)
class KernelCost:
    """The forecast of one kernel.

    Attributes:
        seconds: the sum of the next three, with the gap to the next kernel of a graph.
        memory_seconds, compute_seconds: for what it moves and computes; of a collective, the
            first is for what it receives.
        launch_seconds: without any work, and the gap.
        bytes: read and written, each tensor once; of a collective, received.
        operations: two for each multiply-accumulate.
        bound: the largest part: "bandwidth", "compute", "launch", or "communication" for all
            collectives.
        error: relative, of seconds.
        assumed: whether no public measurement of this kernel, on any product, is behind its largest
            part.
    """

    seconds: float
    memory_seconds: float
    compute_seconds: float
    launch_seconds: float
    bytes: float
    operations: float
    bound: str
    error: float
    assumed: bool


@cache
def fitted() -> Parameters:
    """The parameters that `python -m lq_graph.forecast.fit` wrote."""
    return Parameters.from_json(json.loads(FITTED.read_text()))


def kernel_cost(
    op_type: str,
    inputs: Tensors,
    outputs: Tensors,
    product: str | Chip = "A3",
    parameters: Parameters | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> KernelCost:
    """The time of one kernel, from its bytes, its operations and a launch.

    Args:
        op_type: GE's, "QuantBatchMatmulV3".
        inputs, outputs: (dtype, shape) of each tensor, in the operator's order.
        product: "A2", "A3", "950", "310P", or a chip: "A3-560T".
        parameters: default `fitted()`.
        attributes: of the node; only `input_layout` of an attention is read, "BSND" by default.

    Raises:
        LinearQuantValueError: an unknown product or dtype, a size that is not known, or int4 on a
            chip whose matrix unit has none.
    """
    chip = product if isinstance(product, Chip) else chip_of(product)
    operator, known = operator_of(op_type, inputs, outputs)
    work = work_of(operator, inputs, outputs, chip, attributes or {})
    return of_work(operator, known, work, chip, parameters or fitted())


def of_work(
    operator: Operator, known: bool, work: Work, chip: Chip, parameters: Parameters
) -> KernelCost:
    """The time of a call whose work is known."""
    rate = parameters.rates.get(operator.name) or parameters.rates[operator.family]
    launch = parameters.launches[operator.name] + parameters.gap
    memory = work.moved / (chip.bytes_per_second * rate.bandwidth)
    compute = work.computed / (chip.peak(work.dtype) * rate.compute) if work.computed else 0.0
    profiled = operator.name in parameters.profiled
    error = parameters.errors[operator.name]
    if not known:
        error = max(error, ASSUMED)
    if chip.name != MEASURED and not profiled:
        error = math.hypot(error, OTHER_CHIP[chip.product])
    parts = {"bandwidth": memory, "compute": compute, "launch": launch}
    bound = max(parts, key=lambda part: parts[part])
    assumed = (
        not known or bool(operator.like) or (operator.launch is not None and bound == "launch")
    )
    return KernelCost(
        launch + memory + compute,
        memory,
        compute,
        launch,
        work.bytes,
        work.operations,
        bound,
        error,
        assumed and not profiled,
    )


def communication_cost(
    collective: str,
    message: float,
    devices: int,
    product: str | Chip = "A3",
    parameters: Parameters | None = None,
) -> KernelCost:
    """The time of a collective.

    Each device reads what the others have in one step. A large allReduce goes in two: each device
    sums its part, and gathers the parts of the others. No measurement of 2 or 4 devices is public.

    Args:
        collective: "allReduce" (message: the bytes of the whole tensor), "allGather" or
            "reduceScatter" (message: the bytes of one device's part).
        devices: how many take part.
    """
    chip = product if isinstance(product, Chip) else chip_of(product)
    at = parameters or fitted()
    link = chip.link_of(devices) * at.link
    received = float((devices - 1) * message)
    steps = 1
    if collective == "allReduce":
        halves = 2 * (devices - 1) / devices * message
        if 2 * at.collective + halves / link < at.collective + received / link:
            steps, received = 2, halves
    memory = received / link
    launch = steps * at.collective + at.gap
    error = at.collective_error if devices in (8, 16) else math.hypot(at.collective_error, ASSUMED)
    if chip.name != MEASURED:
        error = math.hypot(error, OTHER_CHIP[chip.product])
    return KernelCost(
        launch + memory,
        memory,
        0.0,
        launch,
        received,
        0.0,
        "communication",
        error,
        devices not in (8, 16),
    )
