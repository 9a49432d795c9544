"""An Explanation as plain data, for --json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..rules.tables import dtype_name
from .explain_kernels import Kernel, Total
from .explain_layers import VENDOR_KERNELS, VENDOR_SOURCE, Block

if TYPE_CHECKING:
    from .explanation import Explanation, LayerExplanation

__all__ = ["as_json"]


def as_json(e: Explanation) -> dict[str, Any]:
    """Units: bytes and seconds. Keys are those of the Explanation."""
    before, after = e.launches
    return {
        "model": e.model,
        "device": e.device,
        "product": e.product.key,
        "stand_in": e.machine.stand_in,
        "versions": dict(e.machine.versions),
        "peak": asdict(e.peak),
        "launches": {"unfused": before, "fused": after},
        "forecast": {"unfused": _total(e.unfused_total), "fused": _total(e.total)},
        "seconds_at_peak": e.peak_seconds,
        "vendor_layer": {"kernels": dict(VENDOR_KERNELS), "source": VENDOR_SOURCE},
        "layers": [_layer(layer) for layer in e.layers],
        "blocks": [_block(block, names) for block, names in e.block_groups],
    }


def _total(total: Total) -> dict[str, Any]:
    return asdict(total)


def _layer(layer: LayerExplanation) -> dict[str, Any]:
    p = layer.plan
    return {
        "name": layer.name,
        "row": {
            "x1": "int4" if p.int4 else "int8",
            "output": dtype_name(p.output_dtype),
            "source": p.row.source,
            "since": p.since,
        },
        "m": p.m,
        "k": p.k,
        "n": p.n,
        "output_shape": list(p.output_shape),
        "tensors": {
            name: {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape)}
            for name, spec in layer.tensors.items()
        },
        "weight_format": layer.weight_format,
        "nodes": {"ours": layer.ours.ops(), "vendor": layer.vendor.ops()},
        "macs": layer.macs,
        "bytes": layer.bytes,
        "seconds_at_peak": layer.seconds,
        "bound_at_peak": layer.bound,
        "forecast": _total(layer.forecast),
    }


def _block(block: Block, names: Sequence[str]) -> dict[str, Any]:
    return {
        "names": list(names),
        "unfused": [_kernel(kernel) for kernel in block.before],
        "fused": [_kernel(kernel) for kernel in block.after],
        "has_attention": block.has_attention,
        "fusions": [
            {"fusion": line.fusion, "module": line.layer, "blocked_by": line.why_not}
            for line in block.lines
        ],
    }


def _kernel(kernel: Kernel) -> dict[str, Any]:
    return {
        "op": kernel.op,
        "module": kernel.module,
        "reads": list(kernel.reads),
        "writes": list(kernel.writes),
        "is_sized": kernel.is_sized,
        "forecast": asdict(kernel.cost) if kernel.cost else None,
    }
