"""The CPU kernel beside its peers and the machine's limit: `python benchmarks/cpu_kernel.py`.

`... --write` also rewrites benchmarks/cpu_kernel.txt, which has the last results. onnxruntime and
torchao are shown if they are installed (`pip install onnx onnxruntime torchao`).

All calls of one size run in one process, interleaved, in another order in each round; the results
are medians. Each call is measured in two ways: `layers`, one layer after another as in a model, so
that each call's weight comes from memory; and `again`, one layer repeatedly, so that its weight
stays in the last cache if it fits. Two calls measure the floor, in the same rounds and ways: the
int8 products of the matmul, from registers, and the reading of its weight. The floor is the longer
of the two. A sentinel, a fixed piece of work, runs between the rounds: rounds in which it is slower
than usual are dropped, and their number is printed.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
import itertools
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # no device is needed

import torch
from torch import Tensor, nn

import lq_graph
from lq_graph.kernels import native

HERE = Path(__file__).parent
SIZES = [
    (1, 4096, 4096),
    (1, 4096, 11008),
    (16, 4096, 4096),
    (128, 4096, 4096),
    (512, 4096, 11008),
    (1, 512, 128),
]
ROUNDS = 31
SLOT = 4e-3  # seconds of calls in a slot, if one call takes less
CACHE = 96 << 20  # bytes; more than any cache holds
DISTURBED = 1.15  # a round is disturbed if its sentinel takes this many times its best time


Call = Callable[[], object]


class Floor:
    """The machine's limits: floor.cpp, compiled."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="lq_graph_")
        library = Path(folder) / "floor.so"
        source = HERE / "floor.cpp"
        # -fopenmp to compile, not to link: torch has a runtime loaded
        compile_ = ["c++", "-O2", "-std=c++17", "-fPIC", "-fopenmp", "-c", str(source)]
        subprocess.run([*compile_, "-o", f"{library}.o"], check=True)
        subprocess.run(["c++", "-shared", f"{library}.o", "-o", str(library)], check=True)
        self.lib = ctypes.CDLL(str(library))
        self.lib.int8_products.argtypes = (ctypes.c_int64, ctypes.c_int)
        self.lib.read_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
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
        address, size = weight.data_ptr(), weight.numel()
        return {
            PRODUCTS: lambda: self.lib.int8_products(m * k * n, threads),
            READING: lambda: self.lib.read_bytes(address, size, threads),
        }


PRODUCTS, READING = "floor: int8 products", "floor: reading the weight"
OURS = "ours to bfloat16, pertoken"


def without_native(call: Call) -> Call:
    """The same call with torch alone, without the compiled kernel."""

    def run() -> object:
        kernel, native.matmul = native.matmul, lambda *_: None  # type: ignore[assignment]
        try:
            return call()
        finally:
            native.matmul = kernel

    return run


@torch.compile
def inductor(x: Tensor, weight: Tensor, scale: Tensor, pertoken: Tensor) -> Tensor:
    acc = torch._int_mm(x, weight.t()).to(torch.float32)
    return (acc * scale * pertoken.unsqueeze(-1)).to(torch.bfloat16)


def calls_for(m: int, k: int, n: int, seed: int) -> tuple[dict[str, Call], Tensor]:
    """The calls to compare at one size, for one layer; and its weight."""
    generator = torch.Generator().manual_seed(seed)

    def ints(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

    x, weight = ints(m, k), ints(n, k)
    scale = torch.rand(n, generator=generator) * 1e-4
    packed, pertoken = lq_graph.trans_quant_param(scale), torch.rand(m, generator=generator)
    x4, w4 = (lq_graph.pack_int4(values >> 4) for values in (x, weight))
    op = torch.ops.lq_graph.linear_quant.default

    def to_int8() -> Tensor:
        return op(x, weight, packed)

    def to_bf16() -> Tensor:
        return op(x, weight, scale, None, pertoken, output_dtype=torch.bfloat16)

    linear, linear16 = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False).bfloat16()
    xf, xb = torch.randn(m, k), torch.randn(m, k).bfloat16()
    calls: dict[str, Call] = {
        "ours to int8": to_int8,
        OURS: to_bf16,
        "ours int4 to bfloat16": lambda: op(
            x4, w4, scale, None, pertoken, output_dtype=torch.bfloat16
        ),
        "_int_mm alone": lambda: torch._int_mm(x, weight.t()),
        "_int_mm, torch epilogue": without_native(to_bf16),
        "_int_mm, Inductor epilogue": lambda: inductor(x, weight, scale, pertoken),
        "fp32 nn.Linear": lambda: linear(xf),
        "bf16 nn.Linear": lambda: linear16(xb),
        **dict(_onednn(x, weight, scale)),
        **dict(_onnxruntime(x, weight, scale)),
        **dict(_torchao(xb, k, n)),
    }
    return calls, weight


def _onednn(x: Tensor, weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Call]]:
    """qlinear with unsigned activations, which oneDNN computes fast: 128 stands for 0."""
    unsigned = (x.to(torch.int16) + 128).to(torch.uint8)
    ops = torch.ops.onednn
    ready = ops.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)

    def run() -> Tensor:
        return ops.qlinear_pointwise(
            unsigned, 0.01, 128, ready, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    yield "oneDNN qlinear u8 to bfloat16", run


def _onnxruntime(x: Tensor, weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Call]]:
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        return
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n = weight.shape[0]
    constants = {
        "x_scale": np.float32(0.01),
        "x_zero": np.uint8(128),  # it computes unsigned activations fast
        "w": weight.t().contiguous().numpy(),
        "w_scale": scale.numpy(),
        "w_zero": np.zeros(n, np.int8),
        "y_scale": np.float32(0.5),
        "y_zero": np.uint8(128),
    }
    node = helper.make_node("QLinearMatMul", ["x", *list(constants)], ["y"], domain="")
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [x.shape[0], n])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # otherwise its threads would spin while other calls are measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": (x.to(torch.int16) + 128).to(torch.uint8).numpy()}
    yield "onnxruntime QLinearMatMul u8", lambda: session.run(None, feed)


def _torchao(x: Tensor, k: int, n: int) -> Iterator[tuple[str, Call]]:
    """torchao quantizes the activations in the call, so it does more work."""
    if not importlib.util.find_spec("torchao"):
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(k, n, bias=False).bfloat16())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    yield "torchao int8 dynamic", lambda: model(x)


class Slots:
    """The slots of one call: its layers, and the number of calls in a slot."""

    def __init__(self, layers: list[Call]) -> None:
        self.layers = layers
        self.next = itertools.cycle(layers)
        for call in layers * 2:
            call()
        self.count = 1
        self.count = max(1, min(200, int(SLOT / self.seconds(self.next))))

    def seconds(self, calls: Iterator[Call]) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        for call in itertools.islice(calls, self.count):
            call()
        return (time.perf_counter() - start) / self.count

    def both(self) -> tuple[float, float]:
        """Seconds of a call with one layer after another, and with one layer repeatedly."""
        layers = self.seconds(self.next)
        self.layers[0]()
        return layers, self.seconds(itertools.repeat(self.layers[0]))


def measure(calls: dict[str, list[Call]], floor: Floor) -> tuple[list[dict[str, float]], int]:
    """Median seconds of each call over the undisturbed rounds, in both ways, and how many rounds
    were disturbed."""
    slots = [(name, Slots(layers)) for name, layers in calls.items()]
    rounds: list[dict[str, tuple[float, float]]] = []
    disturbed = 0
    while len(rounds) < ROUNDS and disturbed < 6 * ROUNDS:
        before = floor.sentinel()
        # in another order each round, because the contents of the caches depend on the call before
        order = random.Random(len(rounds) + disturbed).sample(slots, len(slots))
        seconds = {name: calls_of.both() for name, calls_of in order}
        if max(before, floor.sentinel()) > DISTURBED:
            disturbed += 1
        else:
            rounds.append(seconds)
    kept = rounds or [seconds]
    return [
        {name: statistics.median(r[name][way] for r in kept) for name in calls} for way in (0, 1)
    ], disturbed


def report(out: io.StringIO) -> None:
    """Print the results of every size to the terminal and to `out`."""

    def say(text: str = "") -> None:
        print(text, flush=True)
        out.write(text + "\n")

    floor = Floor()
    say(f"torch {torch.__version__}, {floor.threads} threads, {platform.machine()}")
    say(f"compiled kernel: {'yes' if native.is_available() else 'no, torch computes'}")
    say(f"int8 peak {(1 << 30) / floor.best / 1e9:.0f} GMAC/s")
    with torch.no_grad():
        for m, k, n in SIZES:
            calls: dict[str, list[Call]] = {}
            for seed in range(min(8, CACHE // (k * n) + 1)):
                layer, weight = calls_for(m, k, n, seed)
                for name, call in {**floor.calls(m, k, n, weight), **layer}.items():
                    calls.setdefault(name, []).append(call)
            ways, disturbed = measure(calls, floor)
            least = [max(seconds[PRODUCTS], seconds[READING]) for seconds in ways]
            say(
                f"\n({m}, {k}, {n}): floor {least[0] * 1e6:,.1f} us in {len(calls[OURS])} layers, "
                f"{least[1] * 1e6:,.1f} us again"
                + (f"; {disturbed} disturbed rounds dropped" if disturbed else "")
                + (" - ALL OF THEM: do not trust these" if disturbed == 6 * ROUNDS else "")
            )
            heads = (f"{way:>14s}  floor/it   it/ours" for way in ("layers", "again"))
            say(f"   {'':30s}" + "".join(heads))
            for name in calls:
                say(
                    f"   {name:30s}"
                    + "".join(
                        f"{seconds[name] * 1e6:11,.1f} us{floor_ / seconds[name]:10.2f}"
                        f"{seconds[name] / seconds[OURS]:10.2f}"
                        for seconds, floor_ in zip(ways, least, strict=True)
                    )
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite benchmarks/cpu_kernel.txt")
    arguments = parser.parse_args()
    out = io.StringIO()
    report(out)
    if arguments.write:
        (HERE / "cpu_kernel.txt").write_text(out.getvalue())


if __name__ == "__main__":
    main()
