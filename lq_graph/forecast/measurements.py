"""The published measurements that the forecast uses, or is compared with: measurements.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..rules.chips import Chip, chip_of
from .operators import Tensors

__all__ = ["FIT", "HELD_OUT", "INFORMATION", "Measurement", "measurements"]

FIT, HELD_OUT, INFORMATION = "fit", "held out", "information"
FILE = Path(__file__).with_name("measurements.json")


@dataclass(frozen=True)
class Measurement:
    """One published figure.

    Attributes:
        id: a name for it.
        op: an op type of GE, a collective, or what of a whole model was measured: "decode" (ms a
            step), "prefill", "computing" (the kernels of a step without collectives), "ratio".
        chip: on which; see `lq_graph.rules.chips`.
        value, unit: as published, or derived from what is; the note says so.
        source: repository@commit:path, or an address.
        use: FIT (the parameters come from it), HELD_OUT (they do not, and the forecast is compared
            with it) or INFORMATION.
        inputs, outputs: of a kernel.
        message, devices: of a collective.
        about: of a whole model: which, its dtypes, batch, context, tp, kernels.
        note: what has to be known.
    """

    id: str
    op: str
    chip: Chip
    value: float
    unit: str
    source: str
    use: str
    inputs: Tensors = ()
    outputs: Tensors = ()
    message: float = 0.0
    devices: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def is_kernel(self) -> bool:
        return bool(self.inputs)


@cache
def measurements() -> tuple[Measurement, ...]:
    """All of them, in the file's order."""
    names = set(Measurement.__dataclass_fields__) - {"about", "chip", "inputs", "outputs"}
    found = []
    for row in json.loads(FILE.read_text()):
        known = {key: row.pop(key) for key in names & set(row)}
        inputs, outputs = (_tensors(row.pop(key, ())) for key in ("inputs", "outputs"))
        chip = chip_of(row.pop("chip"))
        found.append(Measurement(chip=chip, inputs=inputs, outputs=outputs, about=row, **known))
    return tuple(found)


def _tensors(found: Sequence[Any]) -> Tensors:
    return tuple((dtype, tuple(shape)) for dtype, shape in found)
