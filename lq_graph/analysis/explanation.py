"""What explain() found: one line for each quantized layer, its graphs, and the model's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..fusion.editor import FusionReport
from ..reports import table
from ..rules.plan import Plan, Spec
from ..rules.tables import Peak, Product, dtype_name, storage_name
from .explain_layers import VENDOR_SOURCE, Block, groups_of

__all__ = ["Explanation", "LayerExplanation"]


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
    """

    device: str
    product: Product
    layers: tuple[LayerExplanation, ...]
    graphs: tuple[Any, ...]
    unfused: tuple[Any, ...]
    fusions: tuple[FusionReport, ...]
    blocks: tuple[Block, ...]
    peak: Peak

    @property
    def launches(self) -> tuple[int, int]:
        """Kernels of the whole model, without fusions and with them."""
        unfused, fused = (sum(len(g.launches) for g in w) for w in (self.unfused, self.graphs))
        return unfused, fused

    def rows(self) -> list[list[object]]:
        """The table of layers, its head first."""
        words = (
            "layer, m x k x n, row, weight, nodes, vendor, MACs, bytes, ops/byte, us at peak, bound"
        )
        head: list[object] = [*words.split(", ")]
        rows: list[list[object]] = [head]
        for layer in self.layers:
            p = layer.plan
            batch = "".join(f"{size} x " for size in p.output_shape[:-2])
            rows.append(
                [
                    layer.name or "(model)",
                    f"{batch}{p.m} x {p.k} x {p.n}",
                    f"{storage_name(p.row.storage)} to {dtype_name(p.output_dtype)}",
                    layer.weight_format,
                    len(layer.ours.compute),
                    len(layer.vendor.compute),
                    layer.macs,
                    layer.bytes,
                    f"{layer.intensity:.1f}",
                    f"{layer.seconds * 1e6:.2f}",
                    layer.bound,
                ]
            )
        return rows

    def __str__(self) -> str:
        total = sum(layer.seconds for layer in self.layers)
        nodes = sum(len(graph.compute) for graph in self.graphs)
        ours = sum(len(layer.ours.compute) for layer in self.layers)
        theirs = sum(len(layer.vendor.compute) for layer in self.layers)
        lines = [
            f"{self.device}, {self.product}: {len(self.layers)} LinearQuant layers, {ours} GE "
            f"nodes (the vendor's module: {theirs}); whole model {nodes} GE nodes",
            "",
            *table(self.rows()),
            "",
            f"at least {total * 1e6:.2f} us in these layers: {self.peak}",
        ]
        before, after = self.launches
        lines += ["", f"whole model: {before} kernels without fusion, {after} with"]
        for block, others in groups_of(self.blocks):
            lines += block.text(len(others))
        if any(block.has_attention for block in self.blocks):
            lines += ["", f"vendor: {VENDOR_SOURCE}"]
        seen = set()
        for layer in self.layers:
            shown = (str(layer.ours), str(layer.vendor))
            if shown in seen:
                continue
            seen.add(shown)
            lines += ["", f"{layer.name or '(model)'}: {layer.plan.row.source}"]
            for title, graph in (("ours", layer.ours), ("vendor", layer.vendor)):
                lines.append(f"  {title}, {len(graph.compute)} nodes")
                lines += [f"    {line}" for line in str(graph).splitlines()]
        return "\n".join(lines)

    def html(self, path: str | Path) -> None:
        """Write one self-contained page, with the graphs drawn.

        Args:
            path: the file to write.

        Raises:
            LinearQuantValueError: matplotlib is not installed.
        """
        from .explain_page import page

        Path(path).write_text(page(self))


def _bytes(spec: Spec) -> int:
    count = spec.dtype.itemsize
    for size in spec.shape:
        count *= size
    return count
