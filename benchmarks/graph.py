"""Graph mode and eager calls, ours beside the vendor's: `python -m cann_host benchmarks/graph.py`.

`... benchmarks/graph.py --write` also rewrites benchmarks/graph.txt, which holds the last results.

Both run in this process, interleaved; the results are medians and their ratios. Under cann_host the
times are those of the wheels' Python and C++ and of the stand-in's arithmetic, not of a chip: read
the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch_npu
import torchair
from torch import nn

import lq_graph
from lq_graph import converters

VendorLinearQuant = torch_npu.contrib.module.LinearQuant
WIDTH = 64
torch.npu.config.allow_internal_format = True


def chain(kind: type[nn.Module], layers: int) -> nn.Module:
    """A chain of A8W8 layers, prepared by the function of lq_graph or of the vendor."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        layer = kind(WIDTH, WIDTH, bias=True, offset=True)
        layer.weight.data = torch.randint(
            -128, 128, (WIDTH, WIDTH), dtype=torch.int8, generator=generator
        )
        layer.scale.data = torch.rand(WIDTH, generator=generator) * 1e-3
        layer.offset.data = torch.zeros(WIDTH)
        layer.bias.data = torch.zeros(WIDTH, dtype=torch.int32)
        model.append(layer)
    model = model.npu()
    if kind is VendorLinearQuant:
        torchair.experimental.inference.use_internal_format_weight(model)
    else:
        lq_graph.use_internal_format_weight(model)
    return model


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    torch._dynamo.reset()
    backend = torchair.get_npu_backend(compiler_config=torchair.CompilerConfig())
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True)


def seconds(call: Callable[[], object]) -> float:
    torch.npu.synchronize()
    start = time.perf_counter()
    call()
    torch.npu.synchronize()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call. The calls are interleaved, in another order in each round: a
    call after one that runs the same code is faster."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            taken[name].append(seconds(calls[name]))
    return {name: statistics.median(values) for name, values in taken.items()}


def compile_times(sizes: list[int], rounds: int) -> None:
    x = torch.randint(-128, 128, (4, WIDTH), dtype=torch.int8).npu()
    kinds = {"ours": lq_graph.LinearQuant, "vendor": VendorLinearQuant}
    print("chained layers   first call ms          later calls ms")
    print("                 ours    vendor  ratio  ours   vendor  ratio")
    first: dict[str, dict[int, float]] = {name: {} for name in kinds}
    for layers in sizes:
        models = {name: chain(kind, layers) for name, kind in kinds.items()}
        for model in models.values():  # once before, so that imports and caches are not measured
            compiled(model)(x)
        times: dict[str, list[float]] = {name: [] for name in kinds}
        runs = {}
        for _ in range(rounds):
            for name, model in models.items():
                function = compiled(model)
                times[name].append(seconds(lambda f=function: f(x)))
                runs[name] = function
        # dynamo was reset between the two, so each is traced again before its later calls
        later = in_turns({name: lambda f=f: f(x) for name, f in runs.items()}, 2)
        later = in_turns({name: lambda f=f: f(x) for name, f in runs.items()}, 15)
        for name in kinds:
            first[name][layers] = statistics.median(times[name])
        a, b = first["ours"][layers], first["vendor"][layers]
        c, d = later["ours"], later["vendor"]
        print(
            f"{layers:>14} {a * 1e3:>7.0f} {b * 1e3:>9.0f} {a / b:>6.2f} "
            f"{c * 1e3:>6.2f} {d * 1e3:>7.2f} {c / d:>6.2f}"
        )
    largest = [n for n in sizes if n >= 8]
    if len(largest) > 1:
        for name, values in first.items():
            slope = exponent(values, largest)
            print(f"growth exponent, {largest[0]} to {largest[-1]} layers, {name}: {slope:.2f}")


def exponent(times: dict[int, float], sizes: list[int]) -> float:
    """Slope of log time over log layers, least squares."""
    xs, ys = [math.log(n) for n in sizes], [math.log(times[n]) for n in sizes]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )


def eager_calls(rounds: int) -> None:
    n, k = 128, 512
    x = torch.randint(-128, 128, (4, k), dtype=torch.int8).npu()
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(n) * 1e-3
    made = {}
    for name, kind in (("ours", lq_graph.LinearQuant), ("vendor", VendorLinearQuant)):
        layer = kind(k, n, bias=False)
        layer.weight.data, layer.scale.data = weight.clone(), scale.clone()
        made[name] = layer.npu()
    prepared = lq_graph.LinearQuant(k, n, bias=False)
    prepared.weight.data, prepared.scale.data = weight.clone(), scale.clone()
    prepared = prepared.npu()
    prepared.fold_scale()
    packed, transposed = prepared.scale.data, made["vendor"].weight.data.t()
    calls = {
        "ours, float scale": lambda: made["ours"](x),
        "vendor's module, float scale": lambda: made["vendor"](x),
        "ours, packed scale": lambda: prepared(x),
        "npu_quant_matmul, packed scale": lambda: torch_npu.npu_quant_matmul(
            x, transposed, packed, output_dtype=torch.int8
        ),
    }
    times = in_turns(calls, rounds)
    print("\neager call, k=512, n=128, m=4   us     to vendor  to bare")
    vendor, bare = times["vendor's module, float scale"], times["npu_quant_matmul, packed scale"]
    for name, t in times.items():
        print(f"{name:30s} {t * 1e6:>6.0f} {t / vendor:>10.2f} {t / bare:>8.2f}")


def nodes() -> None:
    print("\nGE compute nodes per layer, prepared")
    x8 = torch.randint(-128, 128, (4, 512), dtype=torch.int8).npu()
    int4 = lq_graph.pack_int4(torch.randint(-8, 8, (128, 512), dtype=torch.int8))
    x4 = int4[:4].contiguous().npu()
    for title, x, weight, output in (
        ("A8W8", x8, torch.zeros(128, 512, dtype=torch.int8), torch.int8),
        ("A4W4", x4, int4, torch.float16),
    ):
        counts = {}
        for name, kind in (("ours", lq_graph.LinearQuant), ("vendor", VendorLinearQuant)):
            layer = kind(512, 128, bias=False, output_dtype=output)
            layer.weight.data, layer.scale.data = weight.clone(), torch.ones(128)
            layer = layer.npu()
            if name == "ours":
                lq_graph.use_internal_format_weight(layer)
            torch._dynamo.reset()
            config = torchair.CompilerConfig()
            backend = torchair.get_npu_backend(compiler_config=config)
            with converters.graph.capture(config) as graphs:
                torch.compile(layer, backend=backend, dynamic=False)(x)
            counts[name] = len(graphs[0].compute)
        print(f"{title}: ours {counts['ours']}, vendor {counts['vendor']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 8, 32, 96, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the output in graph.txt")
    asked = parser.parse_args()
    if not asked.write:
        return report(asked.layers, asked.rounds)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        report(asked.layers, asked.rounds)
    print(output.getvalue(), end="")
    Path(__file__).with_suffix(".txt").write_text(output.getvalue())
    return None


def report(layers: list[int], rounds: int) -> None:
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}", end=", ")
    threads = torch.get_num_threads()
    print(f"{torch.npu.get_device_name()}, torch_npu {torch_npu.__version__}, {threads} threads")
    nodes()
    eager_calls(400)
    print()
    compile_times(layers, rounds)


if __name__ == "__main__":
    main()
