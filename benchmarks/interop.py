"""Checkpoints that llmcompressor and msmodelslim really make, loaded: a table.

    pip install -e ".[interop]"; python benchmarks/interop.py       # llmcompressor's part
    python -m cann_host benchmarks/interop.py --msmodelslim PYTHON [--quick] [CASE...]

The two tools need different versions of transformers, so each has its own Python: the extras
`interop` and `interop-msmodelslim`. `interop_cases.py` is the table of cases, `interop_make.py`
makes their folders. The columns:

layers      how many are quantized, and how; tensors of the folder that are left out
golden      the largest error of a layer beside the folder's tensors, multiplied in numpy in float64
tool        of a layer beside the tool's own layer in float32, which it fakes in floats
its bf16    the same of the tool's own layer in bfloat16: its noise
added       what rounding the activations adds, in the worst layer, by the tool's way
            and by ours
cosine      of the logits, with the tool's own model (llmcompressor), or with the float model

Errors are relative: the norm of the difference by the norm of the reference.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from interop_cases import CASES, LLMCOMPRESSOR, MSMODELSLIM, TOKENS, VOCABULARY, Case
from safetensors.torch import load_file
from torch import Tensor, nn

import lq_graph
from lq_graph import QuantizedLinear

TOOLS = (LLMCOMPRESSOR, MSMODELSLIM)
PACKAGES = {LLMCOMPRESSOR: "llmcompressor", MSMODELSLIM: "msmodelslim"}
# A layer rounds its output to bfloat16, a static one the reciprocal of its input scale too: some
# activations become the next integer.
LARGEST = {"A8W8 dynamic": 0.005, "A8W8 static": 0.02, "A4W4 dynamic": 0.005}
ADDED = 1.25  # what our rounding of activations adds may be so much more than the tool's
COSINE = {"A8W8": 0.95, "A4W4": 0.6}  # of logits: the models are random, so int4 is far off


@dataclass
class Row:
    """What became of a case. `made` is the tool's error, `said` our refusal; both may be empty."""

    case: Case
    made: str = ""
    said: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    golden: float = 0.0
    beside: float = 0.0
    noise: float = 0.0
    added: tuple[float, float] = (0.0, 0.0)
    cosine: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> str:
        """What is not as the table of cases says; empty if nothing."""
        if self.made:
            return "the tool fails"
        if self.said:
            return (
                "" if self.case.refused and re.search(self.case.refused, self.said) else "refused"
            )
        if self.case.refused:
            return "loads, though it should be refused"
        return "; ".join(self.faults)

    def cells(self) -> list[str]:
        """Of the printed table."""
        head = [self.case.tool, self.case.name, self.case.model]
        if self.made or self.said:
            what = f"the tool fails: {self.made}" if self.made else f"refused: {self.said}"
            return [*head, what]
        kinds = [f"{count} {kind}" for kind, count in sorted(self.kinds.items())]
        layers = ", ".join(kinds + [f"{self.left_out} left out"] * bool(self.left_out))
        added = " / ".join(f"{one:.4f}" for one in self.added) if self.noise else ""
        errors = [f"{e:.4f}" if e else "-" for e in (self.golden, self.beside, self.noise)]
        return [*head, layers, *errors, added or "-", f"{self.cosine:.5f}"]


# ---- making ----


def python_of(tool: str, given: str | None = None) -> str:
    """A Python that has a tool; empty if there is none."""
    python = given or os.environ.get(f"LQ_INTEROP_{tool.upper()}", "")
    if not python and importlib.util.find_spec(PACKAGES[tool]):
        python = sys.executable
    return python


def make(tool: str, python: str, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Make folders; returns the tool's error for each case, empty if it has none."""
    program = Path(__file__).resolve().with_name("interop_make.py")
    folder = folder.resolve()
    done = subprocess.run(
        [os.path.abspath(shutil.which(python) or python), str(program), tool, str(folder), *names],
        stdout=subprocess.PIPE,
        stderr=(folder / "log").open("w"),
        cwd=folder,  # msmodelslim leaves files there
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["case"]: str(line["failed"]) for line in lines}
    died = f"{python} ended with {done.returncode}: see {folder / 'log'}"
    return {name: found.get(name, died) for name in names}


# ---- measuring ----


def error_of(got: Any, want: Any) -> float:
    """The norm of the difference by the norm of the reference."""
    got, want = (np.asarray(t, dtype=np.float64).reshape(-1) for t in (got, want))
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def golden(of: dict[str, Tensor], x: np.ndarray, layer: QuantizedLinear) -> tuple[Any, Any]:
    """float64, from a folder's tensors: the layer's output, and that without rounded activations.

    Args:
        of: the tensors of one layer, by the last part of their name.
        x: its input, (rows, k).
        layer: says whether it is static, and its bits.
    """
    weight, bias = _integers(of["weight"], layer), 0.0
    if "bias" in of:
        bias = array(of["bias"])
    static, top = (
        layer.input_scale is not None,
        7 if layer.linear.weight.dtype == torch.int32 else 127,
    )
    if "weight_scale" in of:
        floats = weight * array(of["weight_scale"]).reshape(-1, 1)
    else:  # msmodelslim, static: deq_scale is the product of both scales
        floats = weight * (_floats(of["deq_scale"]) / array(of["input_scale"])).reshape(-1, 1)
    if not static:
        x32 = x.astype(np.float32)  # DynamicQuant computes in float32
        peak = np.abs(x32).max(-1, keepdims=True)
        peak[peak == 0] = 1
        rounded = np.rint(x32 * (np.float32(top) / peak)) * (peak / np.float32(top))
        return rounded.astype(np.float64) @ floats.T + bias, x @ floats.T + bias
    step = array(of["input_scale"]).item()
    name = next((n for n in ("input_zero_point", "input_offset") if n in of), "")
    zero = array(of[name]).item() if name else 0.0
    rounded = np.clip(np.rint(x / step + zero), -128, 127)
    if "deq_scale" not in of:
        return (rounded - zero) * step @ floats.T + bias, x @ floats.T + bias
    total = rounded @ weight.T + array(of["quant_bias"])
    bias = (array(of["quant_bias"]) + zero * weight.sum(1)) * _floats(of["deq_scale"])
    return total * _floats(of["deq_scale"]), x @ floats.T + bias


def _floats(deq_scale: Tensor) -> np.ndarray:
    """A deq_scale of msmodelslim: float32, or its bits in an int64."""
    if deq_scale.dtype == torch.int64:
        return deq_scale.numpy().astype(np.uint32).view(np.float32).astype(np.float64).reshape(-1)
    return array(deq_scale).reshape(-1)


def _integers(weight: Tensor, layer: QuantizedLinear) -> np.ndarray:
    """(n, k); two int4 of a byte are the lower bits first."""
    values = weight.numpy()
    if values.shape[1] != layer.in_features:
        values = values.astype(np.uint8)
        both = np.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)
        values = np.where(both > 7, both.astype(np.int8) - 16, both.astype(np.int8))
    return values.astype(np.float64)


@torch.no_grad()
def inputs_of(model: nn.Module, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the linear layers of a model, and its logits."""
    found: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return found, logits


def load(folder: Path) -> Any:
    """A model with random weights for a folder, in bfloat16."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(case: Case, folder: Path) -> Row:
    """Load a folder, and compare each quantized layer and the logits."""
    row = Row(case)
    model = load(folder / case.name)
    try:
        report = lq_graph.load_checkpoint(model, folder / case.name, **dict(case.options))
    except lq_graph.LinearQuantError as error:
        row.said = str(error).replace(f"{folder}/", "")
        return row
    row.left_out = len(report.left_out)
    theirs = folder / f"{case.name}.safetensors"
    if theirs.exists():
        beside = load_file(theirs)
        ids, logits = beside["ids"], beside["logits"]
        inputs = {name[2:]: tensor for name, tensor in beside.items() if name.startswith("x ")}
    else:
        beside = {}
        ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(2))
        source = transformers.AutoModelForCausalLM.from_pretrained(
            folder / f"float_{case.model}", dtype=torch.bfloat16
        )
        inputs, logits = inputs_of(source.eval(), ids)
    with torch.no_grad():
        got = model(ids).logits
    row.cosine = float(
        nn.functional.cosine_similarity(got.double().ravel(), logits.double().ravel(), 0)
    )
    tensors = tensors_of(folder / case.name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, layer in layers.items():
        _measure_layer(row, name, layer, tensors, inputs[name], beside)
    if not layers:
        row.faults.append("no layer is quantized")
    elif not row.cosine > min(COSINE[kind.partition(" ")[0]] for kind in row.kinds):
        row.faults.append(f"the logits' cosine is {row.cosine:.3f}")
    return row


def _measure_layer(
    row: Row,
    name: str,
    layer: QuantizedLinear,
    tensors: dict[str, Tensor],
    x: Tensor,
    beside: dict[str, Tensor],
) -> None:
    of = {
        key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")
    }
    bits = "A4W4" if layer.linear.weight.dtype == torch.int32 else "A8W8"
    kind = f"{bits} {'static' if layer.input_scale is not None else 'dynamic'}"
    row.kinds[kind] += 1
    with torch.no_grad():
        ours = array(layer(x)).reshape(-1, layer.out_features)
    want, exact = golden(of, array(x).reshape(-1, layer.in_features), layer)
    error = error_of(ours, want)
    row.golden = max(row.golden, error)
    if not error <= LARGEST[kind]:
        row.faults.append(f"{name} is {error:.3f} off the folder's tensors")
    if beside:
        theirs, exactly = array(beside[f"y {name}"]), array(beside[f"y32 {name}"])
        row.beside = max(row.beside, error_of(ours, exactly))
        row.noise = max(row.noise, error_of(theirs, exactly))
        added = error_of(theirs, exact), error_of(ours, exact)
        row.added = max(row.added, added)
        if added[1] > ADDED * added[0]:
            row.faults.append(f"{name} adds {added[1]:.4f}, the tool {added[0]:.4f}")


# ---- the table ----


def run(names: list[str], pythons: dict[str, str], folder: Path) -> list[Row]:
    """Make and measure cases; those of a tool without a Python are left out."""
    rows = []
    for tool, python in pythons.items():
        mine = [name for name in names if CASES[name].tool == tool]
        place = folder / tool
        place.mkdir(parents=True, exist_ok=True)
        for name, failed in make(tool, python, place, mine).items() if python and mine else ():
            row = Row(CASES[name], made=failed) if failed else measure(CASES[name], place)
            rows.append(row)
    return rows


def table(rows: list[Row]) -> str:
    """One line for each case; "<-" marks what is not as the table of cases says."""
    head = ["tool", "case", "model", "layers", "golden", "tool", "its bf16", "added", "cosine"]
    lines = [head, *(row.cells() for row in rows)]
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in (lines if i < 3 else full)) for i in range(len(head))]
    text = ["  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=False)) for line in lines]
    marks = ["", *(f"  <- {row.wrong}" if row.wrong else "" for row in rows)]
    return "\n".join(line.rstrip() + mark for line, mark in zip(text, marks, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for tool in TOOLS:
        parser.add_argument(f"--{tool}", metavar="PYTHON", help=f"a Python that has {tool}")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints there")
    parser.add_argument("--quick", action="store_true", help="what the tests run")
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = given.cases or [n for n, case in CASES.items() if case.quick or not given.quick]
    pythons = {tool: python_of(tool, getattr(given, tool)) for tool in TOOLS}
    for tool in (tool for tool, python in pythons.items() if not python):
        print(f"no Python that has {tool}: its cases are left out (--{tool} PYTHON)")
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(names, pythons, given.folder or Path(scratch))
    print(table(rows))
    return any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
