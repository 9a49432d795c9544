"""prepare_for_cpu: pack the weights of quantized linear layers for the compiled CPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..kernels import library, prepare_weight
from ..reports import counted, folded, table
from .linear_quant import LinearQuant

__all__ = ["CpuReport", "PreparedForCpu", "prepare_for_cpu"]


@dataclass(frozen=True)
class PreparedForCpu:
    """What prepare_for_cpu did to one layer.

    Attributes:
        name: the module's qualified name.
        bytes: size of the weight.
        copy: size of its copy; 0 if there is none.
        note: why there is no copy; empty if there is one.
    """

    name: str
    bytes: int
    copy: int
    note: str


class CpuReport(list[PreparedForCpu]):
    """What prepare_for_cpu did, one line for each layer; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no LinearQuant in this model"
        rows: list[list[object]] = [["module", "bytes of the weight", "bytes of its copy", ""]]
        for group in folded(self, lambda r: r.name, lambda r: (r.bytes, r.copy, r.note)):
            r, name = group[0], counted([r.name for r in group]) or "(model)"
            rows.append([name, r.bytes * len(group), r.copy * len(group), r.note])
        total, copies = sum(r.bytes for r in self), sum(r.copy for r in self)
        return "\n".join(
            [*table(rows), f"{total:,} bytes of weights, and {copies:,} bytes of copies"]
        )


def prepare_for_cpu(model: nn.Module) -> CpuReport:
    """Pack the weights of quantized linear layers on the CPU in the order in which this processor
    reads them fastest.

    The compiled kernel reads the copies for inputs of 16 rows or more, and the weights for fewer.
    The outputs stay the same, bit by bit. Each copy takes as much memory as its weight. State
    dicts, saved files and copies of the model do not have them, and this may be called again at any
    time: a layer that is prepared stays as it is.

    A copy is freed with its weight. It is not used any more when the weight was written in place,
    replaced (as by `merge`) or moved; then call this again. The kernel notices a write through
    `weight.data` only if the write changes one of the eight places that it compares.

    Args:
        model: with LinearQuant layers; others are left alone.

    Returns:
        A CpuReport, one line for each LinearQuant in the order of `named_modules`.
    """
    why_not = _why_not()
    report = CpuReport()
    for name, module in model.named_modules():
        if not isinstance(module, LinearQuant) or "weight" not in module._parameters:
            continue
        weight = module.weight
        note, copy = why_not, 0
        if not weight.is_cpu:
            note = f"its weight is on {weight.device}"
        elif not note:
            copy = prepare_weight(weight)
            note = "" if copy else "the kernel reads this weight as fast as it is stored"
        report.append(PreparedForCpu(name, weight.nbytes, copy, note))
    return report


def _why_not() -> str:
    """Why no layer can be prepared; empty if it can."""
    if library.loaded() is None:
        return "the compiled CPU kernel is not used here; see python -m lq_graph doctor"
    return ""
