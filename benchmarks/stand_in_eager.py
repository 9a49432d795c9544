"""What the stand-in adds to a decoder: `python -m cann_host benchmarks/stand_in_eager.py`.

One decode step of a Llama of SmolLM2-135M's sizes, random weights, A8W8 dynamic, with a static
cache: on plain CPU tensors, eagerly on the npu, and as a captured graph (npugraph_ex). All run in
this process, in a random order in each round; the results are the least times of a step, by the
clock and in this process's CPU time, and their ratios to plain CPU. Each mode's numbers are
compared with those of plain CPU first. Times are those of this machine's CPU, not of a chip.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from decoder import quantized
from torch import Tensor, nn


class Step(NamedTuple):
    """Decodes one token; `rewind` lets the cache forget it."""

    run: Callable[[], Tensor]
    rewind: Callable[[], None]


CACHE, POSITION = 256, 100


def make_step(model: nn.Module, device: str, wrap: Callable[..., Any] = lambda f: f) -> Step:
    """A function that decodes one token at POSITION."""
    from transformers import StaticCache

    config: Any = model.config
    model = copy.deepcopy(model).to(device)
    cache = StaticCache(config=config, max_cache_len=CACHE)
    prompt = torch.arange(POSITION).unsqueeze(0).to(device)

    def run(tokens: Tensor, positions: Tensor) -> Tensor:
        result: Tensor = model(
            tokens,
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        ).logits
        return result

    run(prompt, torch.arange(POSITION, device=device))
    token = torch.tensor([[7]], device=device)
    position = torch.tensor([POSITION], device=device)
    decode = wrap(run)

    def step() -> Tensor:
        logits: Tensor = decode(token, position)
        if device == "npu":
            torch.npu.synchronize()
        return logits

    def rewind() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(POSITION)
        if device == "npu":
            torch.npu.synchronize()

    return Step(step, rewind)


def npugraph_ex(run: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(run, backend="npugraph_ex", dynamic=False)


def contestants(layers: int, wanted: list[str]) -> dict[str, Step]:
    model = quantized(layers, torch.bfloat16)
    makers: dict[str, Callable[[], Step]] = {
        "plain CPU": lambda: make_step(model, "cpu"),
        "eager": lambda: make_step(model, "npu"),
        "npugraph_ex": lambda: make_step(model, "npu", npugraph_ex),
    }
    found: dict[str, Step] = {}
    for name in ["plain CPU", *(one for one in makers if one in wanted and one != "plain CPU")]:
        start = time.perf_counter()
        found[name] = makers[name]()
        first = once(found[name])
        taken = time.perf_counter() - start
        expected = once(found["plain CPU"])
        off = (first - expected).abs().max().item() / expected.abs().max().item()
        assert torch.equal(first.argmax(-1), expected.argmax(-1)) and off < 1e-2, (name, off)
        print(f"{name:12s} made in {taken:6.1f} s, largest difference {off:.1e}", flush=True)
    return found


def once(step: Step) -> Tensor:
    logits = step.run().cpu()
    step.rewind()
    return logits


def measure(calls: dict[str, Step], seconds: float) -> dict[str, tuple[float, float]]:
    """The least clock and CPU time of each; in a random order in each round."""
    least = {name: (float("inf"), float("inf")) for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in random.sample(list(calls), len(calls)):
            clock, used = time.perf_counter(), time.process_time()
            calls[name].run()
            clock, used = time.perf_counter() - clock, time.process_time() - used
            calls[name].rewind()
            least[name] = (min(least[name][0], clock), min(least[name][1], used))
    return least


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--modes", default="eager,npugraph_ex")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    calls = contestants(options.layers, options.modes.split(","))
    least = measure(calls, options.seconds)
    plain = least["plain CPU"]
    for name, (clock, used) in least.items():
        print(
            f"{name:12s} {clock * 1e3:7.1f} ms, it / plain CPU {clock / plain[0]:5.2f}; "
            f"CPU time {used * 1e3:7.1f} ms, {used / plain[1]:5.2f}"
        )


if __name__ == "__main__":
    main()
