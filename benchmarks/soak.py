"""Checks that memory stays flat: `python -m cann_host benchmarks/soak.py [--calls N] [--runs N]`.

Runs eager calls of a prepared layer and of the vendor's operator, and a static and a dynamic graph,
interleaved; then a decoder layer in the vendor's operators (vendor_layer.py), which writes its
cache of blocks in place: eagerly, as a GE graph, and as a captured graph that is replayed. Prints
the resident memory of the process ten times for each; the exit status is 1 if one has grown by more
than --bound since the warm-up. A leak of one descriptor in each call, about 150 bytes, is 15 MiB
after 100,000 calls.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch_npu
import torchair
from vendor_layer import PagedLayer, step_inputs

import lq_graph
import lq_graph.converters

WARM_UP = 10  # the warm-up is one tenth


def resident() -> float:
    """Resident memory of the process, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def eager() -> Callable[[int], object]:
    """A function that makes one eager call, chosen by its number."""
    x, weight = (torch.ones(size, 64, dtype=torch.int8, device="npu") for size in (4, 32))
    layer = lq_graph.LinearQuant(64, 32, bias=False, output_dtype=torch.float16).npu()
    lq_graph.use_internal_format_weight(layer)
    scale = torch_npu.npu_trans_quant_param(torch.ones(32, device="npu"))

    def call(number: int) -> object:
        if number % 2:
            return layer(x)
        return torch_npu.npu_quant_matmul(x, weight.t(), scale, output_dtype=torch.int8)

    return call


def graphs() -> Callable[[int], object]:
    """A function that runs one compiled graph, chosen by its number."""
    layer = lq_graph.LinearQuant(64, 32, bias=False, output_dtype=torch.bfloat16).npu()
    static, dynamic = (
        torch.compile(layer, backend=torchair.get_npu_backend(), dynamic=dynamic)
        for dynamic in (False, True)
    )
    inputs = [torch.ones(m, 64, dtype=torch.int8, device="npu") for m in (4, 5, 6, 7)]

    def run(number: int) -> object:
        if number % 2:
            return static(inputs[0])
        return dynamic(inputs[number // 2 % 4])

    return run


POSITIONS = 8


def decoder(way: str) -> Callable[[int], object]:
    """A function that makes one step of a decoder layer, at a position chosen by its number."""
    layer: Callable[..., object] = PagedLayer().npu()
    if way != "eager":
        config = torchair.CompilerConfig()
        config.mode = "reduce-overhead" if way == "captured" else "max-autotune"
        backend = torchair.get_npu_backend(compiler_config=config)
        torch._dynamo.reset()
        layer = torch.compile(layer, backend=backend, dynamic=False)
    steps = [step_inputs(position) for position in range(POSITIONS)]
    for step in steps:  # one length, so one graph
        step[-1] = steps[-1][-1]

    def run(number: int) -> object:
        return layer(*steps[number % POSITIONS])

    return run


def soak(what: str, step: Callable[[int], object], times: int) -> float:
    """Call `step` `times` times after a warm-up. Returns the growth in MiB."""
    for number in range(max(times // WARM_UP, 100)):
        step(number)
    torch.npu.synchronize()
    first = resident()
    print(f"{what:16} warm     {first:9.2f} MiB")
    done = 0
    for tenth in range(1, 11):
        end = times * tenth // 10
        for number in range(done, end):
            step(number)
        done = end
        torch.npu.synchronize()
        print(f"{what:16} {done:7,}  {resident():9.2f} MiB", flush=True)
    grown = resident() - first
    print(f"{what:16} grown by {grown:9.2f} MiB\n")
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--bound", type=float, default=4.0, help="MiB that each may grow by")
    options = parser.parse_args()
    torch.npu.config.allow_internal_format = True
    torch.set_num_threads(1)
    with torch.no_grad():
        grown = [
            soak("eager calls", eager(), options.calls),
            soak("graph runs", graphs(), options.runs),
            *(
                soak(f"decoder {way}", decoder(way), options.runs)
                for way in ("eager", "graph", "captured")
            ),
        ]
    flat = max(grown) <= options.bound
    print(f"{'flat' if flat else 'NOT FLAT'}: the bound is {options.bound:g} MiB")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
