"""Public architectures of transformers that nobody has rewritten, A8W8 dynamic: what fuses in each,
and whether the logits are right.

    python -m cann_host benchmarks/architectures.py               # all, a process for each
    python -m cann_host benchmarks/architectures.py llama bert    # some

Each is a tiny model with random weights (`architecture_list.py`): quantized, merged, prepared, and
compiled in GE graphs and in npugraph_ex; a prompt and a decode step are two graphs. Its logits are
compared with those of the same quantized model on the CPU, eagerly, by transformers' eager
attention without a cache. Kernels of a layer are counted as in `launches.py`. The results go to
`architectures.jsonl`, and `docs/_ext/tables.py` puts them into docs/architectures.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import subprocess
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch_npu  # noqa: F401
import torchair
import transformers
from architecture_list import ARCHITECTURES, SIZES, Architecture
from architecture_results import RESULTS, Measured, Outcome, read, write
from launches import compiled, counts_of
from torch import Tensor, nn
from torch.fx import GraphModule

import lq_graph
from lq_graph import converters
from lq_graph.fusion.editor import FusionReport
from lq_graph.fusion.passes import reports
from lq_graph.integrations.transformers import StaticCache

MODES = ("GE", "npugraph_ex")
WAYS: dict[str, dict[str, Any]] = {  # arguments of set_fusion
    "fused": {},
    "exact": {"exact": True},
    "unfused": {"enabled": False},
}
PROMPT, CACHE = 12, 32  # tokens, positions
SPREAD, EMBEDDING = 0.6, 0.5  # of random weights: the logits hang on every layer
OURS = "lq_graph"


def tokens(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, SIZES["vocab_size"], (batch, PROMPT + 1), generator=generator)


@torch.no_grad()
def quantized(name: str, layers: int, dtype: torch.dtype) -> Any:
    """A model of the table on the CPU."""
    chosen = ARCHITECTURES[name]
    sizes = {**SIZES, **chosen.special, "num_hidden_layers": layers}
    for key in ("layer_types", "no_rope_layers"):
        if key in sizes:
            sizes[key] = sizes[key][:layers]
    kind = transformers.CONFIG_MAPPING[name]
    config = kind(**{k: v for k, v in sizes.items() if not _is_computed(kind, k)})
    auto = transformers.AutoModelForCausalLM if chosen.is_decoder else None
    torch.manual_seed(0)
    model = (auto or transformers.AutoModelForMaskedLM).from_config(
        config, attn_implementation="eager", **_experts(config)
    )
    for key, parameter in model.eval().requires_grad_(False).named_parameters():
        if any(part in key for part in ("embed", "wte", "wpe")) and parameter.dim() > 1:
            parameter.normal_(std=EMBEDDING / chosen.multiplier)
        elif parameter.dim() > 1:
            parameter.normal_(std=SPREAD * parameter.shape[-1] ** -0.5)
        else:  # weights of norms are 1 or 0 at first, biases 0
            parameter.add_(torch.randn(parameter.shape) * (0.1 if "bias" in key else 0.25))
    model.to(dtype)
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    lq_graph.quantize(model, dict.fromkeys(linears, lq_graph.A8W8Dynamic()))  # the output layer too
    return model


def _is_computed(kind: type, key: str) -> bool:
    """Whether a configuration computes a value: Falcon's head_dim."""
    value = getattr(kind, key, None)
    return isinstance(value, property) and value.fset is None


def _experts(config: Any) -> dict[str, str]:
    """Experts in one product each: transformers' other ways have no graph, or no CPU kernel."""
    has = any("experts" in key for key in config.to_dict())
    return {"experts_implementation": "batched_mm"} if has else {}


class Step(nn.Module):
    """Tokens and the place of the first -> logits, with a cache that is written in place."""

    def __init__(self, model: nn.Module, cache: Any) -> None:
        super().__init__()
        self.model, self.cache = model, cache

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        given: dict[str, Any] = {"attention_mask": mask}
        if self.cache is not None:
            given |= {"position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        logits: Tensor = self.model(ids, **given).logits
        return logits


def inputs_of(chosen: Architecture, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of a prompt and a step, as `generate` makes them; of an encoder's one call."""
    ids = tokens(batch)
    at = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    if not chosen.is_decoder:
        return [(ids.npu(), at.npu(), torch.ones_like(ids).npu())]
    mask = torch.ones(batch, CACHE, dtype=torch.int64).npu()
    parts = (slice(0, PROMPT), slice(PROMPT, None))
    return [(ids[:, p].npu(), at[:, p].contiguous().npu(), mask) for p in parts]


def prepared(model: Any, chosen: Architecture, batch: int) -> tuple[Step, str]:
    """A model on the NPU: merged, in FRACTAL_NZ, with a cache; and the attention that it takes."""
    model = copy.deepcopy(model)
    with contextlib.suppress(ValueError):  # it has an attention of its own
        model.set_attn_implementation(OURS)
    attention = str(model.config._attn_implementation)
    model = model.npu()
    cache = StaticCache(model.config, CACHE) if chosen.is_decoder else None
    step, first = Step(model, cache), inputs_of(chosen, batch)[0]
    lq_graph.use_internal_format_weight(step, example=first)  # the cache takes its memory
    if cache is not None:
        cache.reset()
    return step, attention


@dataclass
class Run:
    """The graphs of a model in one mode."""

    logits: list[Tensor] = field(default_factory=list)
    kernels: list[int] = field(default_factory=list)
    found: list[FusionReport] = field(default_factory=list)


def run(step: Step, mode: str, inputs: list[tuple[Tensor, ...]]) -> Run:
    """Compile a step for each of the inputs, and run it."""
    torch._dynamo.reset()
    result, counts = Run(), [0]
    config = torchair.CompilerConfig()

    def count(module: GraphModule, *_: Any) -> None:
        counts[0] += counts_of(module).kernels

    given = {} if mode == "GE" else {"post_grad_custom_post_pass": count}
    call = compiled(step, mode, config, **given)
    for one in inputs:
        counts[0] = 0
        with reports() as found:
            if mode == "GE":
                with converters.graph.capture(config) as graphs:
                    logits = call(*one)
                counts[0] = sum(len(graph.launches) for graph in graphs)
            else:
                logits = call(*one)
        result.logits.append(logits.float().cpu())
        result.kernels.append(counts[0])
        result.found += found
    return result


def cosine(one: Tensor, two: Tensor) -> float:
    """Of the worst token."""
    return float(torch.cosine_similarity(one.double(), two.double(), dim=-1).min())


def outcomes(larger: FusionReport, smaller: FusionReport | None) -> list[Outcome]:
    """What fused and what was left, less the same of a smaller model."""
    found = Counter((line.fusion, line.why_not) for line in larger.lines)
    if smaller is not None:
        found.subtract(Counter((line.fusion, line.why_not) for line in smaller.lines))
    return [Outcome(name, n, why) for (name, why), n in found.items() if n > 0]


def count_layers(model: nn.Module) -> Counter[str]:
    """Linear layers: quantized, float, and the experts' tensors, which are no layers."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, lq_graph.QuantizedLinear):
            found["quantized"] += 1
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[type(module).__name__] += 1
        found["expert tensors"] += sum(p.dim() == 3 for p in module.parameters(recurse=False))
    return found


@torch.no_grad()
def measure(
    name: str,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    modes: tuple[str, ...] = MODES,
    ways: tuple[str, ...] = tuple(WAYS),
) -> Measured:
    """Measure one architecture: a prompt and a step, fused; a step in the other ways."""
    torch.npu.config.allow_internal_format = True
    chosen = ARCHITECTURES[name]
    model, lesser = (quantized(name, chosen.layers - less, dtype) for less in (0, 1))
    alone = {"use_cache": False} if chosen.is_decoder else {}
    want = model(tokens(batch), **alone).logits.float()
    wanted = [want[:, :PROMPT], want[:, PROMPT:]] if chosen.is_decoder else [want]
    layers = count_layers(model)
    layers.subtract(count_layers(lesser))
    result = Measured(name, chosen.note, layers={k: n for k, n in layers.items() if n})
    for mode in modes:
        try:
            _measure_in(mode, result, ways, batch, (model, lesser), wanted)
        except Exception as error:
            traceback.print_exc()
            result.errors[mode] = said(error)
    lq_graph.set_fusion()
    return result


def _measure_in(
    mode: str,
    result: Measured,
    ways: tuple[str, ...],
    batch: int,
    models: tuple[Any, Any],
    wanted: list[Tensor],
) -> None:
    """Measure a model and one of a layer less in one mode."""
    chosen, got = ARCHITECTURES[result.name], dict[str, Run]()
    inputs = inputs_of(chosen, batch)
    for way in ways:
        lq_graph.set_fusion(**WAYS[way])
        step, result.attention = prepared(models[0], chosen, batch)
        graphs = inputs
        if way != "fused":  # the prompt without a graph
            graphs = inputs[-1:]
            for one in inputs[:-1]:
                step(*one)
        got[way] = run(step, mode, graphs)
        pairs = zip(got[way].logits, wanted[-len(graphs) :], strict=True)
        result.cosines[f"{mode} {way}"] = [cosine(*pair) for pair in pairs]
        if way == "exact":
            continue
        less = run(prepared(models[1], chosen, batch)[0], mode, inputs[-1:])
        result.kernels[f"{mode} {way}"] = got[way].kernels[-1] - less.kernels[-1]
        if way == "fused" and got[way].found:
            result.step[mode] = outcomes(got[way].found[-1], less.found[-1] if less.found else None)
            result.prompt[mode] = outcomes(got[way].found[0], None)
    if {"exact", "unfused"} <= got.keys():
        one, other = (got[way].logits[-1] for way in ("exact", "unfused"))
        result.equal[mode] = torch.equal(one, other)


def said(error: Exception) -> str:
    """What is missing, if the error names it; else its first line."""
    lines = str(error).splitlines()
    known = [line.strip() for line in lines if "not implemented" in line or "op type" in line]
    return f"{type(error).__name__}: {' '.join(known[:2] or lines[:1])}"


def in_process(names: list[str], arguments: list[str]) -> Iterator[Measured]:
    """Measure architectures in a process of their own, and in another one after a crash."""
    start = ["-m", "cann_host"] if "cann_host" in sys.modules else []
    while names:
        command = [sys.executable, *start, __file__, *names, "--here", *arguments]
        done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert done.stdout is not None
        for line in done.stdout:
            if line.startswith(b"{"):
                names = names[1:]
                yield Measured.of(line)
        if names:
            lost, *names = names
            yield Measured(
                lost, ARCHITECTURES[lost].note, errors={"": f"the process ended: {done.wait()}"}
            )


def report(names: list[str], arguments: list[str], jobs: int, out: Path) -> None:
    """Measure architectures, print each, and put the results to those in a file."""
    lock, known = Lock(), read(out)

    def some(part: list[str]) -> None:
        for one in in_process(part, arguments):
            with lock:
                known[one.name] = known[one.name].updated(one) if one.name in known else one
                print(one, flush=True)
                write(out, [known[name] for name in ARCHITECTURES if name in known])

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(some, (names[i::jobs] for i in range(jobs))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *ARCHITECTURES])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a file of results; they stay")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    names = chosen.names or list(ARCHITECTURES)
    if not chosen.here:
        more = ["--batch", str(chosen.batch), "--dtype", chosen.dtype, "--ways", *chosen.ways]
        report(names, more, chosen.jobs, chosen.out)
        return
    warnings.simplefilter("ignore")
    dtype = getattr(torch, chosen.dtype)
    for name in names:
        try:
            measured = measure(name, batch=chosen.batch, dtype=dtype, ways=tuple(chosen.ways))
        except Exception as error:
            traceback.print_exc()
            measured = Measured(name, ARCHITECTURES[name].note, errors={"": said(error)})
        print(measured.to_json(), flush=True)


if __name__ == "__main__":
    main()
