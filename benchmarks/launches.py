"""Kernels of a decoder layer: one decode step of models of transformers that nobody has rewritten,
in every A8W8 scheme, beside a layer in the vendor's own fused operators.

    python -m cann_host benchmarks/launches.py                              # all
    python -m cann_host benchmarks/launches.py llama --scheme static        # one model, one scheme

A layer's kernels are those of a model of two layers less those of a model of one. By one rule for
all: in a GE graph every node is a kernel except inputs, constants and reshapes
(`Graph.launches`); in npugraph_ex every call in the FX graph after all passes, except views. The
times of compilation and of a step are measured by decoder.py.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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

CACHE, PROMPT = 128, 5
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
    "gemma": ("Gemma", {}),
    "gemma_silu": ("Gemma", {"hidden_activation": "silu"}),
}
MODES = ("GE", "npugraph_ex")
SCHEMES = ("dynamic", "static", "smoothed")  # smoothed is static too
WAYS = {  # arguments of set_fusion; without fusions, merged layers would compute all of each
    "fused": {},
    "exact": {"exact": True},
    "unfused": {"enabled": False},
}


class Counts(NamedTuple):
    """Of a graph: what computes, and what of it is a kernel on a device."""

    nodes: int
    kernels: int


class Step(nn.Module):
    """One decode step of a model, its cache written in place."""

    def __init__(
        self, name: str, layers: int, scheme: str = "dynamic", *, merged: bool = True
    ) -> None:
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
        lq_graph.use_internal_format_weight(self.model, example=prompt if merged else None)
        self.cache = StaticCache(config, CACHE)
        self.model(prompt, past_key_values=self.cache, use_cache=True)

    def forward(self, token: Tensor) -> Tensor:
        logits: Tensor = self.model(token, past_key_values=self.cache, use_cache=True).logits
        return logits


def quantize(model: nn.Module, scheme: str) -> None:
    """Quantize a model on the CPU, in place."""
    if scheme == "dynamic":
        lq_graph.quantize(model, dict.fromkeys(("lm_head", "*"), lq_graph.A8W8Dynamic()))
        return
    texts = [torch.randint(1, SIZES["vocab_size"], (2, 4 * PROMPT)) for _ in range(2)]
    if scheme == "smoothed":
        lq_graph.smooth(model, texts)
    lq_graph.quantize(model, dict.fromkeys(("lm_head", "*"), lq_graph.A8W8Static()), texts)


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


def compiled(model: nn.Module, mode: str, config: Any = None, **options: Any) -> Any:
    """A model for torch.compile's backend of a mode, with a configuration or options of its own."""
    backend: Any = mode
    if mode == "GE":
        backend = torchair.get_npu_backend(compiler_config=config or torchair.CompilerConfig())
    return torch.compile(
        model, backend=backend, dynamic=False, fullgraph=True, options=options or None
    )


def counted(model: nn.Module, inputs: list[Any], mode: str) -> Counts:
    """Compile a model, and count."""
    torch._dynamo.reset()
    found: list[Counts] = []

    def count(module: GraphModule, *_: Any) -> None:
        found.append(counts_of(module))

    if mode == "GE":
        config = torchair.CompilerConfig()
        with converters.graph.capture(config) as graphs:
            compiled(model, mode, config)(*inputs)
        found += [Counts(len(graph.compute), len(graph.launches)) for graph in graphs]
    else:
        compiled(model, mode, post_grad_custom_post_pass=count)(*inputs)
    return Counts(*map(sum, zip(*found, strict=True)))


def counts_of(module: GraphModule) -> Counts:
    """Those of an FX graph after all passes."""
    calls = [n for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return Counts(len(calls), sum(map(_is_kernel, calls)))


def _is_kernel(node: torch.fx.Node) -> bool:
    """Whether a call of an FX graph is a kernel: it makes a tensor that is no view of another."""
    schema = node.target._schema
    if schema.name in ("aten::reshape", "aten::_unsafe_view"):  # of contiguous memory here
        return False
    if schema.name == "aten::copy_":  # what a graph writes in place is written already
        return False
    results = [result.alias_info for result in schema.returns]
    return not any(alias is not None and not alias.is_write for alias in results)


def of_a_layer(make: Callable[[int], nn.Module], inputs: list[Any], mode: str) -> Counts:
    """Those of a model of two layers less those of a model of one."""
    one, two = (counted(make(layers), inputs, mode) for layers in (1, 2))
    return Counts(two.nodes - one.nodes, two.kernels - one.kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS])
    parser.add_argument("--scheme", choices=SCHEMES, action="append")
    given = parser.parse_args()
    cases = list(itertools.product(given.models or MODELS, given.scheme or SCHEMES))
    torch.npu.config.allow_internal_format = True
    warnings.simplefilter("ignore")
    token = [torch.tensor([[7]]).npu()]
    print(f"{'':26}{'':6}" + "".join(f"{way:>10}" for way in WAYS))
    for mode in MODES:
        theirs = of_a_layer(VendorStep, step_inputs(100), mode)
        print(f"{mode}\n  {'vendor operators':30}{theirs.kernels:10}")
        for name, scheme in cases:
            line = f"  {name:16}{scheme:14}"
            for way, choice in WAYS.items():
                lq_graph.set_fusion(**choice)
                make = partial(_step, name, scheme, way != "unfused")
                found = of_a_layer(make, token, mode)
                line += f"{found.kernels:10}"
            print(line, flush=True)


def _step(name: str, scheme: str, merged: bool, layers: int) -> Step:
    return Step(name, layers, scheme, merged=merged)


if __name__ == "__main__":
    with torch.no_grad():
        main()
