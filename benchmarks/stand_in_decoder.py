"""One decode step of a Llama of SmolLM2-135M's sizes, A8W8 dynamic, random weights: what the
stand-in adds to it. `stand_in.py decoder` runs this.

Plain CPU tensors, eager npu, a GE graph and npugraph_ex, each with a model and a cache of its own,
take their steps in this process in a random order; their numbers are compared first. Beside the
time by the clock is the process's CPU time, which other programs on the machine change less. Set
OMP_NUM_THREADS to compare runs.
"""

from __future__ import annotations

import copy
import functools
import os
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchair
from torch import Tensor, nn

import lq_graph
from cann_host import runtime
from cann_host.aten.captured import CapturedWork
from cann_host.graph import compiler

os.environ["HF_HUB_OFFLINE"] = "1"

CACHE, POSITION = 128, 100  # length of the cache, and the place of the token
SIZES: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


def quantized(layers: int) -> nn.Module:
    """The model, its linear layers quantized, except lm_head, which is tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, attn_implementation="eager")
    model = LlamaForCausalLM(config).half().eval().requires_grad_(False)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model


class Decoder(nn.Module):
    """A model with a cache of keys and values, which a step writes in place."""

    def __init__(self, model: nn.Module, device: str) -> None:
        from lq_graph.integrations.transformers import StaticCache

        super().__init__()
        config: Any = model.config
        self.model = copy.deepcopy(model).to(device)
        self.cache = StaticCache(config, CACHE)
        size = config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, POSITION, size)
        zeros = torch.zeros(shape, dtype=torch.float16, device=device)
        for layer in range(config.num_hidden_layers):
            self.cache.update(zeros, zeros, layer)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        places = torch.arange(CACHE, device=token.device)
        mask = torch.where(places <= position, 0.0, -65504.0).to(torch.float16)
        logits: Tensor = self.model(
            token,
            position_ids=position[None],
            attention_mask=mask[None, None, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.cache.crop(-1)  # the next step is this one again
        return logits


def step(decode: Callable[[Tensor, Tensor], Tensor], device: str) -> Callable[[], Tensor]:
    token = torch.tensor([[7]], device=device)
    position = torch.tensor([POSITION], device=device)

    @torch.no_grad()
    def run() -> Tensor:
        logits = decode(token, position)
        torch.npu.synchronize()
        return logits

    return run


@contextmanager
def _ours_timed() -> Iterator[Counter[str]]:
    """CPU seconds in the functions with which lq_graph and cann_host take part in a compilation."""
    from lq_graph import converters
    from lq_graph.backends import fake
    from lq_graph.converters import linear_quant
    from lq_graph.fusion import torchair as fusion

    seconds: Counter[str] = Counter()

    def timed(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[what] += time.thread_time() - start

        return wrapper

    places = [
        (fusion, "fuse", "lq_graph, fusions"),
        (CapturedWork, "record", "cann_host, capturing its work"),
        (compiler, "compile_graph", "cann_host, the graph's compilation"),
        *((linear_quant, o.name, "lq_graph, converters") for o in lq_graph.ops.OPERATORS),
        *((fake, o.name, "lq_graph, fake kernels") for o in lq_graph.ops.OPERATORS),
    ]
    kept = [
        (owner, name, getattr(owner, name)) for owner, name, _ in places if hasattr(owner, name)
    ]
    for owner, name, what in places:
        if hasattr(owner, name):
            setattr(owner, name, timed(getattr(owner, name), what))
    converters.register()
    try:
        yield seconds
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
        converters.register()


def _in_turns(
    calls: dict[str, Callable[[], object]], rounds: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each call by the clock and in CPU time; the order of a round is random."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    order = [name for name in calls for _ in range(2)]
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            taken[name][0].append(time.perf_counter() - start)
            taken[name][1].append(time.process_time() - cpu)
    return taken


MODES = "eager npu", "GE graph", "npugraph_ex"


def _in_mode(decoder: Decoder, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    if mode == "eager npu":
        return decoder
    backend: Any = torchair.get_npu_backend()
    if mode == "npugraph_ex":
        backend = mode
        if mode not in torch._dynamo.list_backends():  # its name in older versions
            config = torchair.CompilerConfig()
            config.mode = "reduce-overhead"
            backend = torchair.get_npu_backend(compiler_config=config)
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        decoder, backend=backend, dynamic=False, fullgraph=True
    )
    return compiled


def _print_steps(taken: dict[str, tuple[list[float], list[float]]]) -> None:
    print(f"{'':12}{'clock, ms':>20}{'':10}{'CPU time, ms':>20}")
    print(f"{'':12}" + f"{'min':>10}{'median':>10}{'/ plain':>10}" * 2)
    for name, times in taken.items():
        line = f"{name:12}"
        for one, base in zip(times, taken["plain CPU"], strict=True):
            ratio = min(one) / min(base)
            line += f"{min(one) * 1e3:10.1f}{statistics.median(one) * 1e3:10.1f}{ratio:10.2f}"
        print(line)


def main(layers: int = 30, rounds: int = 20) -> None:
    """Print the time of a step, and whose time the compilations take."""
    torch.npu.config.allow_internal_format = True
    warnings.simplefilter("ignore")
    lq_graph.set_fusion(exact=True)  # the others round less often than plain tensors
    model = quantized(layers)
    calls = {"plain CPU": step(Decoder(model, "cpu"), "cpu")}
    expected = calls["plain CPU"]()
    compilations = {}
    for mode in MODES:
        decoder = Decoder(model, "npu")
        for layer in decoder.modules():  # lm_head's weight is the embedding's and stays ND
            if isinstance(layer, lq_graph.QuantizedLinear):
                lq_graph.use_internal_format_weight(layer)
        calls[mode] = step(_in_mode(decoder, mode), "npu")
        start = time.process_time()
        with _ours_timed() as ours:
            logits = calls[mode]()
        if mode != "eager npu":
            compilations[mode] = time.process_time() - start, ours
        assert torch.equal(logits.cpu(), expected), f"{mode} computes other numbers"

    graph = next(iter(runtime.current().graphs.compiled))
    print(
        f"\n{layers} layers, {len(graph.steps):,} nodes a step; {torch.get_num_threads()} threads"
    )
    taken = _in_turns(calls, rounds)
    _print_steps(taken)
    for mode, (first, ours) in compilations.items():
        theirs = first - sum(ours.values()) - min(taken[mode][1])
        print(f"\n{f'compilation, {mode}':44}{'CPU s':>8}{'/ theirs':>10}")
        parts = {"dynamo, AOT autograd and torchair": theirs, **ours}
        for what, seconds in {**parts, "ours, all": sum(ours.values())}.items():
            print(f"{what:44}{seconds:8.2f}{seconds / theirs:10.3f}")
