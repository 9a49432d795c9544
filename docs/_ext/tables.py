"""Tables of the pages, made from the data that the package itself reads.

`TORCH_DEVICE_BACKEND_AUTOLOAD=0 python docs/_ext/tables.py` writes them into the pages.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import forecasts
import torch
from versions import versions

from lq_graph.fusion.table import FUSIONS
from lq_graph.rules.cann import since_of
from lq_graph.rules.tables import (
    PRODUCTS,
    QUANT_ROWS,
    ROWS,
    QuantRow,
    Row,
    dtype_name,
    storage_name,
)

__all__ = ["TABLES", "markdown", "put_in"]

ROOT = Path(__file__).parents[2]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _releases(row: Row | QuantRow) -> list[str]:
    """For each product the CANN release that brought it the row."""
    return [since_of(row, product) if product in row.products else "" for product in PRODUCTS]


def _names(choices: tuple[torch.dtype | None, ...]) -> str:
    return ", ".join(dtype_name(dtype) for dtype in choices)


def linear_quant() -> str:
    """The rows of LinearQuant."""
    head = ["x1, weight", "scale", "offset", "bias", "pertoken_scale", "output"]
    rows = [
        [
            storage_name(row.storage),
            *map(_names, (row.scale, row.offset, row.bias, row.pertoken_scale)),
            dtype_name(row.output),
            *_releases(row),
        ]
        for row in ROWS
    ]
    return markdown([*head, *(product.name for product in PRODUCTS)], rows)


def later_dtypes() -> str:
    """The dtypes that came later than their row."""
    rows = [
        [
            storage_name(row.storage),
            dtype_name(row.output),
            since.column,
            _names(since.dtypes),
            since.cann,
        ]
        for row in ROWS
        for since in row.since
        if since.column
    ]
    return markdown(["x1, weight", "output", "column", "dtypes", "CANN"], rows)


def activations() -> str:
    """The rows of the operators that quantize activations."""
    rows = [
        [row.op, ", ".join(map(dtype_name, row.x)), storage_name(row.output_dtype), *_releases(row)]
        for row in QUANT_ROWS
    ]
    head = ["operator", "x", "output", *(product.name for product in PRODUCTS)]
    return markdown(head, rows)


def products() -> str:
    """What differs between the products beside the rows."""
    rows = [
        [
            product.name,
            f"`{product.key}`",
            ", ".join(f"`{prefix}...`" for prefix in product.soc_prefixes),
            f"`{product.ge_op}`",
            product.since,
            ", ".join(map(storage_name, product.nz_storage))
            + (
                f"; {storage_name(torch.int32)} from {product.int4_nz_since} on"
                if product.int4_nz_since
                else ""
            ),
            "yes" if product.limits_k else "",
            "yes" if product.empty_m else "",
        ]
        for product in PRODUCTS
    ]
    head = ["product", "name in code", "device names", "GE operator", "CANN", "FRACTAL_NZ weights"]
    return markdown([*head, "k at most 65535", "m may be 0"], rows)


class _Results(NamedTuple):
    """One table of a benchmark of the CPU (benchmarks/rounds.py).

    Attributes:
        title: the line above it.
        cells: for each contestant its times, each with the ratios beside it.
        notes: the lines below it.
    """

    title: str
    cells: dict[str, list[str]]
    notes: list[str]


def _results(file: str) -> list[_Results]:
    """The tables of a file in benchmarks/."""
    found: list[_Results] = []
    for part in (ROOT / "benchmarks" / file).read_text().split("\n\n")[1:]:
        title, _, *lines = part.splitlines()
        one = _Results(title, {}, [])
        for line in lines:
            # two spaces or more end the name; a unit follows each time
            name, *rest = re.split(r" {2,}", line.strip(), maxsplit=1)
            if rest:
                one.cells[name] = re.sub(r" [um]s", "", rest[0]).split()
            else:
                one.notes.append(line.strip())
        found.append(one)
    return found


def _sizes(title: str) -> str:
    """(m, k, n) of a title."""
    found = re.search(r"\(([\d, ]+)\)", title)
    assert found
    return found[1]


_KERNEL = "ours to bfloat16, pertoken"
# heading of a column: the line in benchmarks/cpu_kernel.txt
_PEERS = {
    "`_int_mm` and torch": "_int_mm, torch epilogue",
    "Inductor": "_int_mm, Inductor epilogue",
    "oneDNN u8": "oneDNN qlinear u8 to bfloat16",
    "onnxruntime u8": "onnxruntime QLinearMatMul u8",
    "bf16 `nn.Linear`": "bf16 nn.Linear",
    "fp32 `nn.Linear`": "fp32 nn.Linear",
}


def cpu_kernel() -> str:
    """Times of other ways over those of the CPU kernel, as benchmarks/cpu_kernel.py left them."""
    rows = []
    for one in _results("cpu_kernel.txt"):
        if not any(name in one.cells for name in _PEERS.values()):
            continue  # a size for float scales only
        # time, floor/it, it/ours; then the same with one layer repeatedly
        _, floor, _, _, floor_again, _ = one.cells[_KERNEL]
        packed = one.cells.get(f"{_KERNEL}, prepared", [""] * 6)
        peers = (one.cells.get(name, [""] * 6)[2] for name in _PEERS.values())
        rows.append([_sizes(one.title), floor, floor_again, packed[2], *peers])
    return markdown(["m, k, n", "floor", "floor, again", "prepared", *_PEERS], rows)


def cpu_scales() -> str:
    """Times with a float32 scale over those with a packed one."""
    rows = []
    for one in _results("cpu_kernel.txt"):
        for note in one.notes:
            if note.startswith("float scale, over packed"):
                rows.append([_sizes(one.title), *re.findall(r"\d+\.\d\d", note)])
    head = ["m, k, n", "to int8", "to int8, again", "to float16", "to float16, again"]
    return markdown(head, rows)


_QUANTIZERS = {
    "`dynamic_quant`, int8": "dynamic_quant to int8",
    "int4": "dynamic_quant to int4",
    "`static_quant`": "static_quant",
    "with offset": "static_quant, offset",
}


def cpu_activations() -> str:
    """Times of the operators that quantize activations, and how many copies take as long."""
    rows = []
    for one in _results("cpu_layer.txt"):
        if not one.title.startswith("activations"):
            continue
        for dtype in ("bfloat16", "float16"):
            copied = one.cells[f"copy_ into a ready tensor, {dtype}"][0]
            cells = (one.cells[f"{name}, {dtype}"] for name in _QUANTIZERS.values())
            times = [f"{time} us ({ratio})" for time, ratio in cells]
            rows.append([_sizes(one.title), dtype, f"{copied} us", *times])
    return markdown(["m, k", "dtype", "copy", *_QUANTIZERS], rows)


_LAYER = "ours bfloat16"
# heading of a column: the line in benchmarks/cpu_layer.txt
_LAYERS = {
    "prepared": f"{_LAYER}, prepared",
    "Inductor": f"{_LAYER}, Inductor",
    "torchao": "torchao int8 dynamic",
    "torchao, Inductor": "torchao int8 dynamic, Inductor",
    "`quantize_dynamic`": "quantize_dynamic, per tensor",
    "bf16 `nn.Linear`": "bf16 nn.Linear",
    "fp16 `nn.Linear`": "fp16 nn.Linear",
    "fp32 `nn.Linear`": "fp32 nn.Linear",
}


def cpu_layer() -> str:
    """Times of other layers over those of QuantizedLinear."""
    rows = []
    for one in _results("cpu_layer.txt"):
        if one.title.startswith("layer"):
            ratios = (one.cells.get(name, ["", "", ""])[2] for name in _LAYERS.values())
            rows.append([_sizes(one.title), one.cells[_LAYER][1], *ratios])
    return markdown(["m, k, n", "floor", *_LAYERS], rows)


def cpu_models() -> str:
    """Times of whole models: the fastest dtype of each kind."""
    kinds = {
        "float": re.compile(r"(\w+)"),
        "A8W8": re.compile(r"A8W8 (\w+)"),
        "merged": re.compile(r"A8W8 (\w+), merged(?:, prepared)?"),
        "int8 head": re.compile(r"A8W8 (\w+), int8 head"),
        "no linears": re.compile(r"(\w+), no linears"),
    }
    rows = []
    for one in _results("cpu_models.txt"):
        model, attention, mode = one.title.split("; ")[0].split(", ")
        ways = ["prefill", "decode"] if model.startswith("SmolLM2") else ["forward"]
        for way, column in enumerate(ways):
            row = [f"{model}, {column}", attention.removeprefix("attention "), mode]
            least = math.inf
            for kind, pattern in kinds.items():
                found = [
                    (float(cells[2 * way].replace(",", "")), match[1])
                    for name, cells in one.cells.items()
                    if (match := pattern.fullmatch(name))
                ]
                time, dtype = min(found, default=(math.nan, ""))
                least = min(least, time) if kind == "float" else least
                ratio = "" if kind == "float" else f" ({time / least:.2f})"
                row.append(f"{time:.1f} ms {dtype}{ratio}" if found else "")
            rows.append(row)
    return markdown(["model", "attention", "mode", *kinds], rows)


def fusions() -> str:
    """The fusions in the order in which they run."""
    rows = [
        [
            f"`{fusion.name}`",
            fusion.what,
            fusion.saves,
            "yes" if fusion.exact else fusion.differs,
            fusion.source,
        ]
        for fusion in FUSIONS
    ]
    return markdown(["name", "what becomes what", "saves", "exact", "source"], rows)


# fusions of every graph, which say nothing of a model
_EVERYWHERE = ("shapes", "equal_quantizations", "npu_operators", "equal_calls")


def _measured() -> list[dict[str, Any]]:
    """What benchmarks/architectures.py left."""
    lines = (ROOT / "benchmarks/architectures.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def architectures() -> str:
    """Logits and kernels of public architectures."""
    rows = []
    for one in _measured():
        cells = [f"`{one['name']}`", one["note"]]
        for mode in ("GE", "npugraph_ex"):
            cosines = one["cosines"].get(f"{mode} fused")
            if cosines is None:
                cells += ["refused", "", ""]
                continue
            least = math.floor(min(cosines) * 1e4) / 1e4
            ways = [one["kernels"].get(f"{mode} {way}", "") for way in ("fused", "unfused")]
            ways = [str(kernels) for kernels in ways]
            cells += [f"{least:.4f}", *ways]
        rows.append(cells)
    head = ["model", "what is special", "GE: cosine", "fused", "unfused"]
    return markdown([*head, "npugraph_ex: cosine", "fused", "unfused"], rows)


def architectures_fused() -> str:
    """What fused in public architectures, and what was left."""
    rows = []
    for one in _measured():
        reasons = {why: [mode] for mode, why in one["errors"].items()}
        done: dict[str, str] = {}
        for mode, found in one["step"].items():
            fused = [(n, name) for name, n, why in found if not why and name not in _EVERYWHERE]
            done[mode] = ", ".join(f"{n} {name}" for n, name in fused) or "-"
            for name, _, why in found:
                if why:
                    reasons.setdefault(f"{name}: {why}", []).append(mode)
        what = {f"{mode}: {text}" for mode, text in done.items()}
        if len(set(done.values())) == 1:
            what = set(done.values())
        left = [f"{modes[0]}: {why}" if len(modes) == 1 else why for why, modes in reasons.items()]
        floats = [f"{n} {kind}" for kind, n in one["layers"].items() if kind != "quantized"]
        left += [f"float: {', '.join(floats)}"] if floats else []
        rows.append([f"`{one['name']}`", "; ".join(sorted(what)), "; ".join(left)])
    return markdown(["model", "fused in a layer", "left, because"], rows)


_MADE = (
    linear_quant,
    later_dtypes,
    activations,
    products,
    cpu_kernel,
    cpu_scales,
    cpu_activations,
    cpu_layer,
    cpu_models,
    versions,
    fusions,
    architectures,
    architectures_fused,
)
TABLES: dict[str, Callable[[], str]] = {made.__name__: made for made in _MADE}
TABLES |= {made.__name__: lambda made=made: markdown(*made()) for made in forecasts.TABLES}


def put_in(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with fresh tables between `<!-- table: NAME -->` and `<!-- end -->`."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{tables[found[2]]()}\n\n<!-- end -->"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for page in (ROOT / "docs").rglob("*.md"):
        page.write_text(put_in(page.read_text(), TABLES))
