"""The report of quantize(): one line for each nn.Linear, and the tensors that stay float."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..modules.places import tensors_beside
from ..reports import counted, folded, table
from .choose import quantized_kinds

__all__ = ["QuantizeReport", "Quantized", "StaysFloat", "bytes_of", "stays_float"]

_SHOWN = 5  # of what stays float, in a printed report


@dataclass(frozen=True)
class Quantized:
    """The result of quantize for one nn.Linear.

    Attributes:
        name: qualified name.
        scheme: "A8W8 dynamic", "A8W8 static" or "A4W4 dynamic"; empty if the layer stays float.
        k, n: its sizes.
        output: dtype of the new layer's output; empty if the layer stays float.
        bytes_before, bytes: size of its parameters, before and after.
        note: why it stays float, or what else changed.
    """

    name: str
    scheme: str
    k: int
    n: int
    output: str
    bytes_before: int
    bytes: int
    note: str

    @property
    def changed(self) -> bool:
        """Whether the layer was quantized."""
        return bool(self.scheme)


@dataclass(frozen=True)
class StaysFloat:
    """Float tensors of one name that a model has after quantize.

    Attributes:
        name: qualified name, with `*` in place of numbers, so layers of one kind have one name.
        kind: class of the module that holds them.
        shape: of the first of them.
        bytes: size of all of them.
        share: of the bytes that the model had before, 0 to 1.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    share: float


class QuantizeReport(list[Quantized]):
    """What quantize did, one line for each nn.Linear; prints as a table, layers that are
    equal but for numbers in their names on one line.

    Attributes:
        stays_float: the tensors that are float afterwards: nn.Linear layers and everything else
            (embeddings, convolutions, experts in one tensor of 3 dims), the largest first.
    """

    stays_float: tuple[StaysFloat, ...] = ()

    @property
    def summary(self) -> str:
        """How many layers were quantized, and their bytes, in one line."""
        done = [r for r in self if r.changed]
        before, after = sum(r.bytes_before for r in done), sum(r.bytes for r in done)
        return f"{len(done)} of {len(self)} layers quantized, {before:,} bytes to {after:,}"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, everything: bool = False) -> str:
        """As tables that fit the terminal.

        Args:
            everything: one line for each layer, with the whole name; otherwise layers whose names
                differ in numbers alone share a line, if the rest is equal.
        """
        lines = ["no nn.Linear to quantize in this model"]
        if self:
            rows: list[list[object]] = [
                ["module", "scheme", "k", "n", "output", "bytes before", "bytes", ""]
            ]
            for group in folded(self, lambda r: r.name, _rest_of, everything=everything):
                r, name = group[0], counted([r.name for r in group])
                scheme, output = r.scheme or "left float", r.output or "-"
                sizes = [sum(r.bytes_before for r in group), sum(r.bytes for r in group)]
                rows.append([name, scheme, r.k, r.n, output, *sizes, r.note])
            lines = [*table(rows, width=0 if everything else None), self.summary]
        if self.stays_float:
            share = sum(left.share for left in self.stays_float)
            lines.append(f"{share:.1%} of the model's bytes stay float, most of them in")
            rows = [["tensor", "of", "shape", "bytes", "share"]]
            for left in self.stays_float[:_SHOWN]:
                shape = " x ".join(map(str, left.shape))
                rows.append([left.name, left.kind, shape, left.bytes, f"{left.share:.1%}"])
            lines += table(rows, "  ", 0 if everything else None)
        return "\n".join(lines)


def _rest_of(r: Quantized) -> tuple[object, ...]:
    """What layers on one line have in common."""
    return (r.scheme, r.k, r.n, r.output, r.note)


def bytes_of(model: nn.Module) -> int:
    """Size in bytes of the tensors that a model holds."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    tensors.update((id(t), t) for _, _, t in tensors_beside(model))
    return sum(t.nbytes for t in tensors.values() if not is_lazy(t))


def stays_float(model: nn.Module, bytes_before: int) -> tuple[StaysFloat, ...]:
    """Float parameters, buffers and tensors in plain attributes, outside quantized layers, by name,
    the largest first."""
    inside = {p for m in model.modules() if isinstance(m, quantized_kinds()) for p in m.modules()}
    seen: set[int] = set()
    groups: dict[tuple[str, str], list[Tensor]] = {}
    held = [
        (f"{prefix}.{name}", module, tensor)
        for prefix, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
    ]
    for name, module, tensor in [*held, *tensors_beside(model)]:
        if module in inside or tensor is None or id(tensor) in seen or is_lazy(tensor):
            continue
        seen.add(id(tensor))
        if tensor.is_floating_point():
            parts = ["*" if p.isdigit() else p for p in name.split(".") if p]
            groups.setdefault((".".join(parts), type(module).__name__), []).append(tensor)
    found = []
    for (name, kind), tensors in groups.items():
        size = sum(t.nbytes for t in tensors)
        found.append(
            StaysFloat(name, kind, tuple(tensors[0].shape), size, size / max(bytes_before, 1))
        )
    return tuple(sorted(found, key=lambda left: -left.bytes))
