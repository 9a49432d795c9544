"""Kernels of a decoder layer: one decode step of models of transformers that nobody has rewritten,
in every A8W8 scheme, beside a layer in the vendor's own fused operators.

    python -m cann_host benchmarks/launches.py                              # all
    python -m cann_host benchmarks/launches.py llama --scheme static        # one model, one scheme

A layer's kernels are those of a model of two layers less those of a model of one. By one rule for
all: in a GE graph every node is a kernel except inputs, constants and reshapes
(`Graph.launches`); in npugraph_ex every call in the FX graph after all passes, except views. The
times are those of the model of two layers on cann_host: compilation, and a later call. They tell
how much work the graphs are, and nothing about a chip.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu  # noqa: F401
import torchair
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from vendor_layer import PagedLayer, step_inputs

import lq_graph
from lq_graph import converters
from lq_graph.integrations.transformers import StaticCache

CACHE, PROMPT, ROUNDS = 128, 5, 10
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1000,
}
# name: class in transformers, and what is special
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma": ("Gemma", {"hidden_activation": "silu"}),
}
MODES = ("GE", "npugraph_ex")
SCHEMES = ("dynamic", "static", "smoothed")  # smoothed is static too
WAYS = {  # arguments of set_fusion
    "fused": {},
    "exact": {"exact": True},
    "unfused": {"enabled": False},
}


@dataclass
class Graph:
    """A compiled model: its kernels, the seconds of the first call, and how to call it again."""

    kernels: int
    compilation: float
    call: Callable[[], Any]


class Step(nn.Module):
    """One decode step of a model, its cache written in place."""

    def __init__(self, name: str, layers: int, scheme: str = "dynamic") -> None:
        super().__init__()
        kind, special = MODELS[name]
        config = getattr(transformers, f"{kind}Config")(
            **{**SIZES, **special}, num_hidden_layers=layers, attn_implementation="lq_graph"
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).half().eval()
        quantize(model.requires_grad_(False), scheme)
        self.model = model.npu()
        prompt = torch.arange(1, PROMPT + 1)[None].npu()
        lq_graph.use_internal_format_weight(self.model, example=prompt)
        self.cache = StaticCache(config, CACHE)
        self.model(prompt, past_key_values=self.cache, use_cache=True)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(token, past_key_values=self.cache, use_cache=True).logits
        return logits


def quantize(model: nn.Module, scheme: str) -> None:
    """Quantize a model on the CPU, in place."""
    if scheme == "dynamic":
        lq_graph.quantize(model, lq_graph.A8W8Dynamic())
        return
    texts = [torch.randint(1, SIZES["vocab_size"], (2, 4 * PROMPT)) for _ in range(2)]
    if scheme == "smoothed":
        lq_graph.smooth(model, texts)
    lq_graph.quantize(model, lq_graph.A8W8Static(), texts)


class VendorStep(nn.Module):
    """The same step in the vendor's operators; no embedding and no head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PagedLayer() for _ in range(layers)).npu()
        torchair.experimental.inference.use_internal_format_weight(self)

    def forward(self, x: Tensor, residual: Tensor, *others: Any) -> Tensor:
        for layer in self.layers:
            x, residual = layer(x, residual, *others)
        return x + residual


def compiled(model: nn.Module, inputs: list[Any], mode: str) -> Graph:
    """Compile a model, and count its kernels."""
    torch._dynamo.reset()
    counts: list[int] = []

    def count(module: GraphModule, *_: Any) -> None:
        counts.append(sum(map(is_kernel, module.graph.nodes)))

    if mode == "GE":
        config = torchair.CompilerConfig()
        backend = torchair.get_npu_backend(compiler_config=config)
        run = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        start = time.perf_counter()
        with converters.graph.capture(config) as graphs:
            run(*inputs)
        counts += [len(graph.launches) for graph in graphs]
    else:
        options = {"post_grad_custom_post_pass": count}
        run = torch.compile(model, backend=mode, dynamic=False, fullgraph=True, options=options)
        start = time.perf_counter()
        run(*inputs)
    seconds = time.perf_counter() - start
    return Graph(sum(counts), seconds, lambda: run(*inputs))


def is_kernel(node: torch.fx.Node) -> bool:
    """Whether a call of an FX graph is a kernel: it makes a tensor that is no view of another."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if schema.name in ("aten::reshape", "aten::_unsafe_view"):  # of contiguous memory here
        return False
    if schema.name == "aten::copy_":  # what a graph writes in place is written already
        return False
    results = [result.alias_info for result in schema.returns]
    return not any(alias is not None and not alias.is_write for alias in results)


def measured(make: Callable[[int], nn.Module], inputs: list[Any], mode: str) -> tuple[int, Graph]:
    """The kernels of a layer, and the model of two layers."""
    one, two = (compiled(make(layers), inputs, mode) for layers in (1, 2))
    return two.kernels - one.kernels, two


def later_calls(graphs: dict[str, Graph]) -> dict[str, float]:
    """The median of a later call, all graphs in turns."""
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name in random.sample(list(graphs), len(graphs)):
            start = time.perf_counter()
            graphs[name].call()
            torch.npu.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS])
    parser.add_argument("--scheme", choices=SCHEMES, action="append")
    given = parser.parse_args()
    cases = list(itertools.product(given.models or MODELS, given.scheme or SCHEMES))
    torch.npu.config.allow_internal_format = True
    warnings.simplefilter("ignore")
    token = [torch.tensor([[7]]).npu()]
    print(f"{'':32}{'kernels a layer':>16}{'compilation':>13}{'later call':>12}")
    for mode in MODES:
        theirs, _ = measured(VendorStep, step_inputs(100), mode)
        print(f"{mode}\n  {'vendor operators':30}{theirs:16}")
        for name, scheme in cases:
            report(name, scheme, mode, token)


def report(name: str, scheme: str, mode: str, token: list[Any]) -> None:
    """Print one model's kernels and times, fused and not."""
    found = {}
    for way, choice in WAYS.items():
        lq_graph.set_fusion(**choice)
        found[way] = measured(lambda layers: Step(name, layers, scheme), token, mode)
    graphs = {way: graph for way, (_, graph) in found.items()}
    taken, base = later_calls(graphs), graphs["unfused"]
    for way, (kernels, graph) in found.items():
        print(
            f"  {name:11}{scheme:10}{way:9}{kernels:16}"
            f"{graph.compilation / base.compilation:13.2f}{taken[way] / taken['unfused']:12.2f}",
            flush=True,
        )


if __name__ == "__main__":
    with torch.no_grad():
        main()
