"""What explain() found: one line for each quantized layer, its graphs, and the model's kernels."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..fusion.editor import FusionReport
from ..rules.plan import Plan, Spec
from ..rules.products import get_cann_version
from ..rules.tables import Peak, Product
from .explain_fold import LayerGroup, fold
from .explain_kernels import Total, kernels_of
from .explain_layers import Block, groups_of

__all__ = ["Explanation", "LayerExplanation", "Machine"]


@dataclass(frozen=True)
class Machine:
    """On what the model was lowered.

    Attributes:
        versions: of the packages that lower, by name, and of CANN.
        stand_in: whether it is cann_host, and no device.
    """

    versions: Mapping[str, str]
    stand_in: bool

    @staticmethod
    def here() -> Machine:
        """This process."""
        versions = {}
        for name in ("lq_graph", "torch", "torch_npu"):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:  # run from its folder
                continue
        if cann := get_cann_version():
            versions["CANN"] = str(cann)
        host = sys.modules.get("cann_host")
        return Machine(versions, host is not None and host.is_active())

    @property
    def warning(self) -> str:
        """What a reader has to know about the numbers."""
        if not self.stand_in:
            return ""
        return (
            "Made on cann_host, a stand-in for CANN, without an NPU: shapes, GE nodes and "
            "launches are the real ones of torch_npu and torchair; no time is measured."
        )


@dataclass(frozen=True)
class LayerExplanation:
    """One LinearQuant at the inputs it was called with.

    Attributes:
        name: the module's qualified name.
        plan: the row of the support table and the sizes.
        tensors: dtype and shape of every tensor the layer reads, by name, once prepared.
        weight_format: "ND" or "FRACTAL_NZ".
        ours, vendor: the GE graphs of the layer and of the vendor's module, from torchair
            (`lq_graph.converters.graph.Graph`).
        peak: the chip's published figures.
    """

    name: str
    plan: Plan
    tensors: dict[str, Spec]
    weight_format: str
    ours: Any
    vendor: Any
    peak: Peak

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        count = self.plan.k
        for size in self.plan.output_shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Bytes that the device reads and writes, each tensor once."""
        out = Spec(self.plan.output_dtype, self.plan.output_shape)
        return sum(_bytes(spec) for spec in (*self.tensors.values(), out))

    @property
    def intensity(self) -> float:
        """Operations (two for each MAC) per byte."""
        return 2 * self.macs / self.bytes

    @property
    def seconds(self) -> float:
        """Seconds of one call at the chip's published peaks, a lower bound."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def compute_seconds(self) -> float:
        """Seconds for the operations at the peak of int8 operations."""
        return 2 * self.macs / self.peak.int8_ops

    @property
    def memory_seconds(self) -> float:
        """Seconds for the bytes at the peak bandwidth."""
        return self.bytes / self.peak.bytes_per_second

    @cached_property
    def forecast(self) -> Total:
        """The forecast of its kernels (`lq_graph.forecast`)."""
        return Total.of(kernels_of(self.ours, self.plan.product.key))

    @property
    def bound(self) -> str:
        """Which peak limits it, "compute" or "memory"."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as text, and writes a page.

    Attributes:
        device: name of the device, from the driver.
        product: whose support table was read.
        layers: one for each LinearQuant that was called, in order of the calls.
        graphs: the GE graphs of the whole model.
        unfused: the same, lowered without our fusions, and not merged unless the model was.
        fusions: what fused in each graph, and what did not and why
            (`lq_graph.fusion.editor.FusionReport`).
        blocks: the same for each layer of the model, such as model.layers.0, with its kernels.
        peak: the figures from which the bounds are estimated.
        model: the class of the model, and its inputs.
        machine: on what the model was lowered.
    """

    device: str
    product: Product
    layers: tuple[LayerExplanation, ...]
    graphs: tuple[Any, ...]
    unfused: tuple[Any, ...]
    fusions: tuple[FusionReport, ...]
    blocks: tuple[Block, ...]
    peak: Peak
    model: str
    machine: Machine = field(default_factory=Machine.here)

    @property
    def launches(self) -> tuple[int, int]:
        """Kernels of the whole model, without fusions and with them."""
        unfused, fused = (sum(len(g.launches) for g in w) for w in (self.unfused, self.graphs))
        return unfused, fused

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layers, equal ones together."""
        return fold(self.layers)

    @cached_property
    def block_groups(self) -> list[tuple[Block, list[str]]]:
        """Each different layer of the model, and the names of all that are like it."""
        return groups_of(self.blocks)

    @property
    def peak_seconds(self) -> float:
        """Seconds of the quantized layers at the chip's published peaks, a lower bound."""
        return sum(layer.seconds for layer in self.layers)

    @cached_property
    def total(self) -> Total:
        """The forecast of the whole model, with fusions."""
        return Total.of(kernel for block in self.blocks for kernel in block.after)

    @cached_property
    def unfused_total(self) -> Total:
        """The forecast of the whole model, without fusions."""
        return Total.of(kernel for block in self.blocks for kernel in block.before)

    def nodes(self) -> tuple[int, int]:
        """GE nodes of the quantized layers, and of the vendor's modules in their place."""
        ours = sum(len(layer.ours.compute) for layer in self.layers)
        return ours, sum(len(layer.vendor.compute) for layer in self.layers)

    def __str__(self) -> str:
        from .explain_text import explanation_text

        return explanation_text(self)

    def as_json(self) -> dict[str, Any]:
        """All of it as dicts, lists, numbers and strings: bytes, seconds, counts, each exact."""
        from .explain_json import as_json

        return as_json(self)

    def html(self, path: str | Path) -> None:
        """Write one self-contained page.

        Args:
            path: the file to write.
        """
        from .explain_page import page

        Path(path).write_text(page(self), encoding="utf-8")


def _bytes(spec: Spec) -> int:
    count = spec.dtype.itemsize
    for size in spec.shape:
        count *= size
    return count
