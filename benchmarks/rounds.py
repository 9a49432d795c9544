"""What the benchmarks of the CPU share: interleaved rounds, the machine's limits, --isa.

All calls of one table run in one process, interleaved, in another order in each round; the results
are medians. A sentinel, a fixed piece of work, runs between the rounds: rounds in which it is
slower than usual are dropped, and their number is printed.

`--isa NAME` (or LQ_GRAPH_NATIVE=NAME) measures under another instruction set than the best one:
lq_graph's kernel, the floor, and the libraries that have a variable for it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # no device is needed

import torch
from torch import Tensor, nn

import lq_graph
from lq_graph.kernels import library

HERE = Path(__file__).parent
ROUNDS, QUICK = 31, 3
SLOT = 4e-3  # seconds of calls in a slot, if one call takes less
CACHE = 96 << 20  # bytes; more than any cache holds
DISTURBED = 1.15  # a round is disturbed if its sentinel takes this many times its best time

SIZES = [
    (1, 4096, 4096),
    (1, 4096, 11008),
    (16, 4096, 4096),
    (128, 4096, 4096),
    (512, 4096, 11008),
    (1, 512, 128),
]
QUICK_SIZES = [(1, 4096, 4096), (128, 4096, 4096), (1, 512, 128)]

# For each name of LQ_GRAPH_NATIVE the variables that keep other libraries to its instruction set.
# oneDNN is under nn.Linear and _int_mm, MKL under float32 nn.Linear, FBGEMM under quantize_dynamic;
# ATEN_CPU_CAPABILITY is torch's own and Inductor's.
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
LIMITS: dict[str, dict[str, str]] = {
    "amx": {},
    "avx512vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avxvnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", **_AVX2},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", **_AVX2},
    "neon_i8mm": {},
    "neon_dot": {},
}
PRODUCTS, READING = "floor: int8 products", "floor: reading the weight"

Call = Callable[[], object]


def forced() -> str:
    """The instruction set that LQ_GRAPH_NATIVE asks for, "" for the best one."""
    value = os.environ.get("LQ_GRAPH_NATIVE", "").strip().lower()
    return value if value in LIMITS else ""


class Floor:
    """The machine's limits: floor.cpp, compiled.

    Attributes:
        isa: the instruction set of the int8 products.
    """

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="lq_graph_")
        file = Path(folder) / "floor.so"
        source = HERE / "floor.cpp"
        # -fopenmp to compile, not to link: torch has a runtime loaded
        compile_ = ["c++", "-O2", "-std=c++17", "-fPIC", "-fopenmp", "-c", str(source)]
        subprocess.run([*compile_, "-o", f"{file}.o"], check=True)
        subprocess.run(["c++", "-shared", f"{file}.o", "-o", str(file)], check=True)
        self.lib = ctypes.CDLL(str(file))
        self.lib.use.restype = ctypes.c_char_p
        self.lib.int8_products.argtypes = (ctypes.c_int64, ctypes.c_int)
        self.lib.read_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
        found = self.lib.use(forced().encode())
        if found is None:
            sys.exit(
                f"this processor does not have {forced() or 'an instruction set of floor.cpp'}"
            )
        self.isa: str = found.decode()
        self.threads = torch.get_num_threads()
        self.best = min(self.work() for _ in range(20))

    def work(self) -> float:
        """Seconds of a fixed piece of work."""
        start = time.perf_counter()
        self.lib.int8_products(1 << 30, self.threads)
        return time.perf_counter() - start

    def sentinel(self) -> float:
        """The time of the same work, divided by its best time."""
        now = self.work()
        self.best = min(self.best, now)
        return now / self.best

    def calls(self, m: int, k: int, n: int, weight: Tensor) -> dict[str, Call]:
        """The two limits of a matmul of this size."""
        threads = 1 if m * k * n < 1 << 20 else self.threads
        address, size = weight.data_ptr(), weight.nbytes

        def read(held: Tensor = weight) -> None:  # noqa: ARG001  (its memory is read)
            self.lib.read_bytes(address, size, threads)

        return {PRODUCTS: lambda: self.lib.int8_products(m * k * n, threads), READING: read}


class Slot:
    """What is timed at a time: calls one after another, again from the first, for about SLOT.

    Args:
        calls: to time.
        warm: call the first once before each time, so that its data are in the cache.
    """

    def __init__(self, calls: list[Call], warm: bool = False) -> None:
        self.first = calls[0] if warm else None
        self.next = itertools.cycle(calls)
        for call in calls * 2:
            call()
        self.count = 1
        self.count = max(1, min(200, int(SLOT / self.seconds())))

    def seconds(self) -> float:
        """Seconds of one call."""
        if self.first:
            self.first()
        start = time.perf_counter()
        for call in itertools.islice(self.next, self.count):
            call()
        return (time.perf_counter() - start) / self.count


Ways = dict[str, Slot]  # the ways in which one contestant is measured, in columns of a table
Seconds = dict[str, float]  # of each contestant


class Measured(NamedTuple):
    """Medians over the undisturbed rounds."""

    ways: dict[str, Seconds]
    disturbed: int  # rounds
    all_disturbed: bool


class Column(NamedTuple):
    """A ratio beside each time."""

    head: str
    of: Callable[[str, Seconds], float]


def least(seconds: Seconds) -> float:
    """The floor: the longer of the two limits."""
    return max(seconds[PRODUCTS], seconds[READING])


TO_FLOOR = Column("floor/it", lambda name, seconds: least(seconds) / seconds[name])


def beside(base: str, head: str) -> Column:
    """The time of each contestant, divided by that of one."""
    return Column(head, lambda name, seconds: seconds[name] / seconds[base])


class Results:
    """Where a benchmark prints; the text goes to the terminal and to a file.

    Attributes:
        floor: the machine's limits.
        rounds: of each table.
        sizes: m, k, n of the matmuls to measure.
        text: what was printed.
    """

    def __init__(self, quick: bool) -> None:
        self.text = ""
        self.rounds = QUICK if quick else ROUNDS
        self.sizes = QUICK_SIZES if quick else SIZES
        self.floor = Floor()
        threads = self.floor.threads
        self.say(f"torch {torch.__version__}, {threads} threads, {platform.machine()}")
        why = f"LQ_GRAPH_NATIVE={forced()}" if forced() else "the best of this processor"
        self.say(f"instruction set: {self.floor.isa}, {why}")
        kernel = library.loaded()
        uses = (
            kernel.instruction_set if kernel else f"none ({library.why_not_used()}), torch computes"
        )
        self.say(f"compiled kernel: {uses}")
        self.say(f"int8 peak {(1 << 30) / self.floor.best / 1e9:.0f} GMAC/s")

    def say(self, text: str = "") -> None:
        """Print a line."""
        print(text, flush=True)
        self.text += text + "\n"

    def measure(self, contestants: dict[str, Ways], rounds: int | None = None) -> Measured:
        """Time all ways of all contestants in each round."""
        rounds = min(rounds or self.rounds, self.rounds)
        kept: list[dict[str, dict[str, float]]] = []
        disturbed = 0
        while len(kept) < rounds and disturbed < 6 * rounds:
            before = self.floor.sentinel()
            # in another order each round: the contents of the caches depend on the call before
            order = random.Random(len(kept) + disturbed).sample(list(contestants), len(contestants))
            found = {
                name: {way: slot.seconds() for way, slot in contestants[name].items()}
                for name in order
            }
            if max(before, self.floor.sentinel()) > DISTURBED:
                disturbed += 1
            else:
                kept.append(found)
        none = not kept
        kept = kept or [found]
        ways = {
            way: {name: statistics.median(one[name][way] for one in kept) for name in contestants}
            for way in next(iter(contestants.values()))
        }
        return Measured(ways, disturbed, none)

    def table(
        self, title: str, measured: Measured, columns: list[Column], unit: str = "us"
    ) -> None:
        """Print the times of all contestants, and the ratios of `columns` beside each time."""
        size = {"us": 1e6, "ms": 1e3}[unit]
        digits = {"us": 1, "ms": 2}[unit]
        lost = f"; {measured.disturbed} disturbed rounds dropped" if measured.disturbed else ""
        lost += " - ALL OF THEM: do not trust these" if measured.all_disturbed else ""
        self.say(f"\n{title}{lost}")
        heads = (
            f"{way:>15s}" + "".join(f"{c.head:>10s}" for c in columns) for way in measured.ways
        )
        self.say(f"   {'':38s}" + "".join(heads))
        for name in next(iter(measured.ways.values())):
            cells = (
                f" {seconds[name] * size:11,.{digits}f} {unit}"
                + "".join(f"{c.of(name, seconds):10.2f}" for c in columns)
                for seconds in measured.ways.values()
            )
            self.say(f"   {name:38s}" + "".join(cells))


def layers_and_again(layers: dict[str, list[Call]]) -> dict[str, Ways]:
    """Each contestant in two ways: one layer after another as in a model, so that each call's
    weight comes from memory; and one layer repeatedly, so that its weight stays in the last cache
    if it fits."""
    return {
        name: {"layers": Slot(calls), "again": Slot(calls[:1], warm=True)}
        for name, calls in layers.items()
    }


def copies(k: int, n: int) -> Iterator[int]:
    """Seeds of as many layers as no cache holds."""
    yield from range(min(8, CACHE // (k * n) + 1))


def prepared_copy(model: nn.Module) -> nn.Module | None:
    """A copy of a quantized model, its weights packed beforehand for the kernel; None if the kernel
    would not be faster with them."""
    model = copy.deepcopy(model)
    return model if any(layer.copy for layer in lq_graph.prepare_for_cpu(model)) else None


def main(
    doc: str,
    file: str,
    report: Callable[[Results, argparse.Namespace], None],
    add: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """The command line of a benchmark.

    Args:
        doc: its docstring.
        file: the name of the file of its last results.
        report: prints the results.
        add: adds arguments of its own.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite benchmarks/{file}")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and sizes, to see that it works"
    )
    parser.add_argument("--isa", choices=LIMITS, help="measure under this instruction set")
    add(parser)
    options = parser.parse_args()
    if options.write and (options.quick or options.isa or forced()):
        parser.error("--write is for a whole run under the best instruction set")
    if isa := options.isa or forced():
        wanted = {"LQ_GRAPH_NATIVE": isa, **LIMITS[isa]}
        if any(os.environ.get(name) != value for name, value in wanted.items()):
            # the libraries read their variables when they are loaded
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)
    results = Results(options.quick)
    with torch.no_grad():
        report(results, options)
    if options.write:
        (HERE / file).write_text(results.text)
