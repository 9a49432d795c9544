"""Layout tools against a plain copy of the same bytes: `python benchmarks/layout.py`.

Ratios of medians, measured in one run and interleaved. Both sides allocate their result.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # no device is needed

import torch

import lq_graph

SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
ROUNDS = 9


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call; the calls are interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; times of a copy: 1.00\n")
    print(f"{'n x k':>12}  {'copy ms':>8}  pack_int4  unpack_int4  to_fractal_nz  from_fractal_nz")
    for n, k in SHAPES:
        int4 = torch.randint(-8, 8, (n, k), dtype=torch.int8)
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        packed, blocks = lq_graph.pack_int4(int4), lq_graph.to_fractal_nz(weight)
        t = medians(
            {
                "copy": lambda weight=weight: weight.clone(),
                "pack": lambda int4=int4: lq_graph.pack_int4(int4),
                "unpack": lambda packed=packed: lq_graph.unpack_int4(packed),
                "to_nz": lambda weight=weight: lq_graph.to_fractal_nz(weight),
                "from_nz": lambda b=blocks, n=n, k=k: lq_graph.from_fractal_nz(b, n, k),
            }
        )
        copy = t["copy"]
        print(
            f"{n:>5} x {k:<5} {copy * 1e3:>8.2f}  {t['pack'] / copy:9.2f}  "
            f"{t['unpack'] / copy:11.2f}  {t['to_nz'] / copy:13.2f}  {t['from_nz'] / copy:15.2f}"
        )


if __name__ == "__main__":
    main()
