"""What `inspect` returns, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..reports import folded, pattern_of, table, wrapped
from ..rules.tables import PRODUCTS, dtype_name
from .choose import lines_of_left_out
from .files import shown

__all__ = ["InspectedLayer", "InspectedTensor", "Inspection"]

_LINES = 12  # of a list, unless everything is asked for


@dataclass(frozen=True)
class InspectedLayer:
    """A quantized layer of the files.

    Attributes:
        name: qualified name.
        scheme: "A8W8 dynamic", "A8W8 static" or "A4W4 dynamic".
        n, k: its sizes.
        bytes: size of its weight in memory.
        output: the float dtype that it takes and returns.
        scale, bias: the dtypes of these, when it is loaded; None for no bias.
        products: for each product, by its key, "yes: " and the dtypes in which it runs the layer,
            or why it does not.
    """

    name: str
    scheme: str
    n: int
    k: int
    bytes: int
    output: torch.dtype
    scale: torch.dtype | None
    bias: torch.dtype | None
    products: Mapping[str, str]

    @property
    def row(self) -> str:
        """The dtypes of the layer's row of the support table."""
        storage = "int4" if self.scheme.startswith("A4W4") else "int8"
        pertoken = "" if self.scheme.endswith("static") else ", pertoken_scale float32"
        bias = "" if self.bias is None else f", bias {dtype_name(self.bias)}"
        scale = f"scale {dtype_name(self.scale)}"
        return f"{storage} x {storage}, {scale}{pertoken}{bias} -> {dtype_name(self.output)}"


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor of the files outside the quantized layers; dtype None for one that torch lacks."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; true if nothing in it is refused.

    Attributes:
        path: of the folder or file.
        format: "msmodelslim", "compressed-tensors", or the quant_method that the JSON says; empty
            for none.
        words: what the JSON says of the whole model.
        files: the safetensors files, with their sizes in bytes.
        layers: the quantized layers.
        tensors: the others, which are loaded by name.
        left_out: tensors that are not loaded, with the reason.
        bytes_left_out: their sizes.
        problems: what load_checkpoint would refuse, all of it.
        notes: what load_checkpoint takes and other programs may not.
        model: the class of the model that the files were compared with; empty for none.
    """

    path: str
    format: str = ""
    words: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[InspectedLayer, ...] = ()
    tensors: tuple[InspectedTensor, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    bytes_left_out: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: str = ""

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return self.text()

    def text(self, *, everything: bool = False) -> str:
        """As tables that fit the terminal.

        Args:
            everything: one line for each tensor, with the whole name; otherwise those with the same
                name but for numbers, and the same sizes, share a line, and long names are
                shortened.
        """
        lines = [shown(self.path, 4096), *self._head()]
        groups: dict[object, list[InspectedLayer]] = {}
        for layer in self.layers:
            key = (layer.scheme, layer.row, tuple(layer.products.items()))
            groups.setdefault(key, []).append(layer)
        for layers in groups.values():
            lines += ["", *_layers_text(layers, everything)]
        if self.tensors:
            lines += ["", *_tensors_text(self.tensors, everything)]
        if self.left_out:
            lines.append("")
            for line in lines_of_left_out(self.left_out, self.bytes_left_out):
                lines += wrapped(line, "  ")
        return "\n".join([*lines, "", *self._verdict(everything)])

    def _head(self) -> list[str]:
        if not self.files:
            return []
        parts = [part for part in (self.format or "not quantized", self.words) if part]
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        return wrapped(f"{', '.join(parts)}; {files}, {sum(self.files.values()):,} bytes", "  ")

    def _verdict(self, everything: bool) -> list[str]:
        lines = []
        folder = f"{shown(self.path, 4096)}/"
        problems = [problem.replace(folder, "") for problem in self.problems]
        alike = folded(problems, lambda text: text, everything=everything, few=1)
        if alike:
            lines.append("load_checkpoint refuses this:")
        for number, group in enumerate(alike, 1):
            head = f"{number}. "
            more = f" ({len(group) - 1:,} more like it)" if len(group) > 1 else ""
            lines += wrapped(f"{head}{group[0]}{more}", " " * len(head))
        if not alike and self.model:
            lines += wrapped(
                f"load_checkpoint loads this into {self.model}, if the values of the scales are "
                "right, which were not read.",
                "",
            )
        elif not alike:
            lines += wrapped(
                "Nothing is refused. Not compared with a model; the values of the scales were not "
                "read.",
                "",
            )
        for note in self.notes:
            lines += wrapped(f"note: {note}", "      ")
        return lines

    def as_json(self) -> dict[str, Any]:
        """The structure that docs/inspect.md describes."""
        return {
            "structure": 1,
            "ok": bool(self),
            "path": self.path,
            "format": self.format,
            "words": self.words,
            "model": self.model,
            "files": dict(self.files),
            "layers": [
                {
                    "name": layer.name,
                    "scheme": layer.scheme,
                    "n": layer.n,
                    "k": layer.k,
                    "bytes": layer.bytes,
                    "row": layer.row,
                    "products": dict(layer.products),
                }
                for layer in self.layers
            ],
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": None if tensor.dtype is None else dtype_name(tensor.dtype),
                    "shape": list(tensor.shape),
                    "bytes": tensor.bytes,
                }
                for tensor in self.tensors
            ],
            "left_out": [
                {"name": name, "bytes": self.bytes_left_out.get(name, 0), "why": why}
                for name, why in self.left_out.items()
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def _layers_text(layers: Sequence[InspectedLayer], everything: bool) -> list[str]:
    """Layers of one row that the same products run."""
    first = layers[0]
    lines = [*wrapped(f"{first.scheme}: {first.row}", "  "), *_products_text(first.products)]
    rows: list[list[object]] = [["layer", "count", "n", "k", "bytes"]]
    for group in folded(
        layers, lambda x: x.name, lambda x: (x.n, x.k), everything=everything, few=1
    ):
        name = _pattern([layer.name for layer in group])
        rows.append([name, len(group), group[0].n, group[0].k, sum(x.bytes for x in group)])
    return [*lines, *table(rows, "  ", 0 if everything else None)]


def _products_text(products: Mapping[str, str]) -> list[str]:
    """Which products run a layer, and why others do not."""
    names = {product.key: str(product) for product in PRODUCTS}
    answers: dict[str, list[str]] = {}
    for key, answer in products.items():
        answers.setdefault(answer, []).append(names[key])
    lines = []
    for answer, on in sorted(answers.items(), key=lambda item: not item[0].startswith("yes: ")):
        if answer.startswith("yes: "):
            dtypes = answer.removeprefix("yes: ").replace(", ", " and ")
            lines += wrapped(f"  runs on {', '.join(on)} in {dtypes}", "    ")
        else:
            lines += wrapped(f"  not on {', '.join(on)}: {answer}", "    ")
    return lines


def _tensors_text(tensors: Sequence[InspectedTensor], everything: bool) -> list[str]:
    """The tensors outside the quantized layers."""
    rows: list[list[object]] = [["other tensors", "count", "dtype", "shape", "bytes"]]
    groups = folded(
        tensors, lambda x: x.name, lambda x: (x.dtype, x.shape), everything=everything, few=1
    )
    groups.sort(key=lambda group: -sum(one.bytes for one in group))
    shown = groups if everything or len(groups) <= _LINES else groups[: _LINES - 1]
    for group in shown:
        dtype = "unknown" if group[0].dtype is None else dtype_name(group[0].dtype)
        shape = "x".join(map(str, group[0].shape)) or "one"
        size = sum(one.bytes for one in group)
        rows.append([_pattern([one.name for one in group]), len(group), dtype, shape, size])
    rest = [one for group in groups[len(shown) :] for one in group]
    if rest:
        rows.append(["others", len(rest), "", "", sum(one.bytes for one in rest)])
    return table(rows, width=0 if everything else None)


def _pattern(names: Sequence[str]) -> str:
    """The name of several tensors, as it can be printed."""
    return shown(pattern_of(names), 10_000)
