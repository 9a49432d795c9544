"""A decoder layer of unmodified models of transformers, A8W8 dynamic: its nodes and kernels, its
compilation and a step, beside the vendor's operators and the vendor's own recipe.

    python -m cann_host benchmarks/decoder.py                      # all
    python -m cann_host benchmarks/decoder.py llama --mode GE      # one model, one mode
    python -m cann_host benchmarks/decoder.py --recipes DIR        # and the recipe's Qwen3

`minilm` is an encoder layer of MiniLM's sizes, without a cache. "vendor" is Llama's layer in the
vendor's fused operators (vendor_layer.py), between an embedding and a head. DIR is a checkout of
cann-recipes-infer, and its packages are installed: see recipes.py.

"unfused" is not merged either: without fusions merged layers compute all of each. All of a model's
contestants, each with a model and a cache of its own, compile in this process in a
random order, and take their steps so. Compilation and step are ratios of medians to the unfused
model's. Nodes and kernels are counted by launches.py's rule. Times are those of two layers on
cann_host: they tell how much work the graphs are, and nothing about a chip.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
import torch_npu
import torchair
import transformers
from launches import MODES, SIZES, WAYS, Counts, Step, compiled, of_a_layer
from torch import Tensor, nn
from vendor_layer import PagedLayer, QuantLinear, Sizes, step_inputs

import lq_graph
from lq_graph import converters

LAYERS, POSITION = 2, 100
DECODERS = ("llama", "qwen3", "mistral", "gemma")
MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "vocab_size": 1000,
}
TOKENS = 16  # of MiniLM's text
VENDOR = Sizes(
    SIZES["num_attention_heads"],
    SIZES["num_key_value_heads"],
    SIZES["head_dim"],
    SIZES["intermediate_size"],
    batch=1,
)


class Encoder(nn.Module):
    """A BertModel of MiniLM's sizes."""

    def __init__(self, layers: int, *, merged: bool = True) -> None:
        super().__init__()
        config = transformers.BertConfig(
            **MINILM, num_hidden_layers=layers, attn_implementation="lq_graph"
        )
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False).half().eval()
        lq_graph.quantize(model.requires_grad_(False), lq_graph.A8W8Dynamic())
        self.model = model.npu()
        example = torch.arange(1, TOKENS + 1)[None].npu()
        lq_graph.use_internal_format_weight(self.model, example=example if merged else None)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model(tokens).last_hidden_state
        return hidden


class VendorModel(nn.Module):
    """A Llama's step in the vendor's operators."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SIZES["vocab_size"], VENDOR.width).half()
        self.layers = nn.ModuleList(PagedLayer(VENDOR) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(VENDOR.width).half())
        self.head = QuantLinear(VENDOR.width, SIZES["vocab_size"])
        torchair.experimental.inference.use_internal_format_weight(self.npu())

    def forward(self, token: Tensor, residual: Tensor, *others: Any) -> Tensor:
        x = self.embedding(token)[0]
        for layer in self.layers:
            x, residual = layer(x, residual, *others)
        quantized, _, _, scale, _ = torch_npu.npu_add_rms_norm_dynamic_quant(x, residual, self.norm)
        logits: Tensor = self.head(quantized, scale)
        return logits


@dataclass
class Contestant:
    """One way of a model.

    Attributes:
        make: a model of so many layers.
        inputs: of a step.
        fusion: arguments of set_fusion.
        counts: of a layer.
        compilation, step: seconds.
    """

    make: Callable[[int], nn.Module]
    inputs: list[Any]
    fusion: dict[str, Any]
    counts: Counts = field(init=False)
    compilation: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)


def contestants(name: str) -> dict[str, Contestant]:
    """Of a model; the vendor's layer is Llama's."""
    make: Callable[..., nn.Module] = partial(Step, name)
    inputs = [torch.tensor([[7]]).npu()]
    if name == "minilm":
        make, inputs = Encoder, [torch.arange(1, TOKENS + 1)[None].npu()]
    found = {
        f"ours, {way}": Contestant(partial(make, merged=way != "unfused"), inputs, choice)
        for way, choice in WAYS.items()
    }
    if name == "llama":
        others = step_inputs(POSITION, sizes=VENDOR)[1:]
        found["vendor operators"] = Contestant(VendorModel, [*inputs, *others], {})
    return found


def measure(runners: list[Contestant], mode: str, compilations: int, steps: int) -> None:
    """Fill in what was counted and measured, the contestants in turns."""
    for one in runners:
        lq_graph.set_fusion(**one.fusion)
        one.counts = of_a_layer(one.make, one.inputs, mode)
    models = [_apart(one.make(LAYERS)) for one in runners]
    pairs = list(zip(runners, models, strict=True))
    for _ in range(compilations):
        for one, model in random.sample(pairs, len(pairs)):
            torch._dynamo.reset()
            gc.collect()
            lq_graph.set_fusion(**one.fusion)
            one.compilation.append(_seconds(compiled(model, mode), one.inputs))
    torch._dynamo.reset()
    calls = []
    for one, model in pairs:
        lq_graph.set_fusion(**one.fusion)
        calls.append((one, compiled(model, mode)))
        calls[-1][1](*one.inputs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(steps):
            for one, call in random.sample(calls, len(calls)):
                one.step.append(_seconds(call, one.inputs))


def _apart(model: nn.Module) -> nn.Module:
    """A model whose forward has code of its own: torch.compile keeps graphs by code and backend, so
    a contestant could run the graph of another."""
    forward = type(model).forward
    code, name = forward.__code__.replace(), forward.__name__
    own = FunctionType(code, forward.__globals__, name, forward.__defaults__, forward.__closure__)
    model.forward = MethodType(own, model)
    return model


def _seconds(call: Callable[..., Any], inputs: list[Any]) -> float:
    start = time.perf_counter()
    call(*inputs)
    torch.npu.synchronize()
    return time.perf_counter() - start


def report(name: str, mode: str, compilations: int, steps: int) -> None:
    """Measure a model in a mode, and print it."""
    found = contestants(name)
    measure(list(found.values()), mode, compilations, steps)
    base = found["ours, unfused"]
    for way, one in found.items():
        compilation, step = (
            statistics.median(mine) / statistics.median(theirs)
            for mine, theirs in ((one.compilation, base.compilation), (one.step, base.step))
        )
        _print(mode, name, way, one.counts, f"{compilation:13.2f}{step:8.2f}")


def _print(mode: str, name: str, way: str, counts: Counts, times: str) -> None:
    print(f"{mode:13}{name:9}{way:18}{counts.nodes:7}{counts.kernels:9}{times}", flush=True)


# ---- the vendor's recipe ----


def recipe_counts(recipes: Path) -> Counts | str:
    """A layer of the decode graph of the recipe's Qwen3, w8a8 in GE mode; or why there is none.

    It runs in processes of its own, with the recipe's own configuration. Its npugraph_ex mode is
    not counted: the recipe gives torchair no pass of ours that could see the FX graph.
    """
    program = Path(__file__).with_name("recipes.py")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in (1, 2):
            graphs = Path(folder, str(layers))
            command = [sys.executable, program, "--recipes", recipes, "--layers", layers]
            command += ["--only", "qwen3-w8a8-ge_graph", "--tokens", 4, "--graphs", graphs]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True)
            files = sorted(graphs.glob("dynamo_optimized_*.txt"), key=lambda f: f.stat().st_mtime)
            if not files:
                return (done.stderr + done.stdout).strip().rpartition("\n")[2]
            graph = converters.graph.read(files[-1])  # the prompt is not the last
            found.append(Counts(len(graph.compute), len(graph.launches)))
    return Counts(found[1].nodes - found[0].nodes, found[1].kernels - found[0].kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*DECODERS, "minilm"]
    parser.add_argument("models", nargs="*", choices=[[], *names])
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--compilations", type=int, default=3, help="of each contestant")
    parser.add_argument("--steps", type=int, default=30, help="of each contestant")
    parser.add_argument("--recipes", type=Path, metavar="DIR", help="of cann-recipes-infer")
    given = parser.parse_args()
    torch.npu.config.allow_internal_format = True
    warnings.simplefilter("ignore")
    print(f"{'':40}  nodes  kernels  compilation    step")
    for mode in given.mode or MODES:
        for name in given.models or names:
            report(name, mode, given.compilations, given.steps)
        if given.recipes and mode == "GE":
            counts = recipe_counts(given.recipes)
            if isinstance(counts, str):
                print(f"{mode:13}qwen3    the recipe is not counted: {counts}")
            else:
                _print(mode, "qwen3", "vendor's recipe", counts, f"{'-':>13}{'-':>8}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
