"""The CPU kernel beside its peers and the machine's limit: `python benchmarks/cpu_kernel.py`.

`... --write` also rewrites benchmarks/cpu_kernel.txt, which holds the last results. onnxruntime and
torchao are shown where they are installed (`pip install onnx onnxruntime torchao`).

All calls of one size take turns in one process, in another order each round; shown are medians. Two
measure the floor, in the same rounds: as many int8 products as the matmul has, from registers,
and reading its weight. The floor is the longer of the two. A sentinel, a known piece of work, runs
between the rounds: rounds in which it is slower than usual are dropped, and their number is told.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import io
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
from lq_graph import native

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
DISTURBED = 1.15  # a sentinel so many times its best marks the round


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
        """Seconds a known piece of work takes now."""
        start = time.perf_counter()
        self.lib.int8_products(1 << 30, self.threads)
        return time.perf_counter() - start

    def sentinel(self) -> float:
        """The same, as times its best."""
        now = self.work()
        self.best = min(self.best, now)
        return now / self.best

    def calls(self, m: int, k: int, n: int, weight: Tensor) -> dict[str, Callable[[], object]]:
        """The two limits of a matmul of this size."""
        threads = 1 if m * k * n < 1 << 20 else self.threads
        address, size = weight.data_ptr(), weight.numel()
        return {
            PRODUCTS: lambda: self.lib.int8_products(m * k * n, threads),
            READING: lambda: self.lib.read_bytes(address, size, threads),
        }


PRODUCTS, READING = "floor: int8 products", "floor: reading the weight"


def without_native(call: Callable[[], object]) -> Callable[[], object]:
    """The same call on torch alone."""

    def run() -> object:
        kernel, native.matmul = native.matmul, lambda *_: None  # type: ignore[assignment]
        try:
            return call()
        finally:
            native.matmul = kernel

    return run


def calls_for(m: int, k: int, n: int) -> tuple[dict[str, Callable[[], object]], Tensor]:
    """What is compared at one size, and the weight all of them read."""
    generator = torch.Generator().manual_seed(0)

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

    def formula(x: Tensor, weight: Tensor, scale: Tensor, pertoken: Tensor) -> Tensor:
        acc = torch._int_mm(x, weight.t()).to(torch.float32)
        return (acc * scale * pertoken.unsqueeze(-1)).to(torch.bfloat16)

    inductor = torch.compile(formula)
    linear, linear16 = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False).bfloat16()
    xf, xb = torch.randn(m, k), torch.randn(m, k).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "ours to int8": to_int8,
        "ours to bfloat16, pertoken": to_bf16,
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


def _onednn(x: Tensor, weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """qlinear with unsigned activations, the form of oneDNN that is fast: 128 stands for 0."""
    unsigned = (x.to(torch.int16) + 128).to(torch.uint8)
    ops = torch.ops.onednn
    ready = ops.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)

    def run() -> Tensor:
        return ops.qlinear_pointwise(
            unsigned, 0.01, 128, ready, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )

    yield "oneDNN qlinear u8 to bfloat16", run


def _onnxruntime(
    x: Tensor, weight: Tensor, scale: Tensor
) -> Iterator[tuple[str, Callable[[], object]]]:
    if not (importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx")):
        return
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n = weight.shape[0]
    constants = {
        "x_scale": np.float32(0.01),
        "x_zero": np.uint8(128),  # unsigned is its fast form
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
    # its threads would spin on while the others are measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {"x": (x.to(torch.int16) + 128).to(torch.uint8).numpy()}
    yield "onnxruntime QLinearMatMul u8", lambda: session.run(None, feed)


def _torchao(x: Tensor, k: int, n: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Its activations are quantized in the call, so it does more."""
    if not importlib.util.find_spec("torchao"):
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(k, n, bias=False).bfloat16())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    yield "torchao int8 dynamic", lambda: model(x)


def measure(calls: dict[str, Callable[[], object]], floor: Floor) -> tuple[dict[str, float], int]:
    """Median seconds of each call over the undisturbed rounds, and how many were disturbed."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(200, int(2e-3 / (time.perf_counter() - start))))
    rounds: list[dict[str, float]] = []
    disturbed = 0
    turns = list(calls.items())
    while len(rounds) < ROUNDS and disturbed < 6 * ROUNDS:
        before = floor.sentinel()
        seconds = {}
        # in another order each round: who comes after whom finds other things in the caches
        for name, call in random.Random(len(rounds) + disturbed).sample(turns, len(turns)):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name] = (time.perf_counter() - start) / repeats[name]
        if max(before, floor.sentinel()) > DISTURBED:
            disturbed += 1
        else:
            rounds.append(seconds)
    kept = rounds or [seconds]
    return {name: statistics.median(r[name] for r in kept) for name in calls}, disturbed


def report(out: io.StringIO) -> None:
    """Every size, to the terminal and to `out`."""

    def say(text: str = "") -> None:
        print(text, flush=True)
        out.write(text + "\n")

    floor = Floor()
    say(f"torch {torch.__version__}, {floor.threads} threads, {platform.machine()}")
    say(f"compiled kernel: {'yes' if native.is_available() else 'no, torch computes'}")
    say(f"int8 peak {(1 << 30) / floor.best / 1e9:.0f} GMAC/s")
    with torch.no_grad():
        for m, k, n in SIZES:
            calls, weight = calls_for(m, k, n)
            seconds, disturbed = measure({**floor.calls(m, k, n, weight), **calls}, floor)
            least = max(seconds[PRODUCTS], seconds[READING])
            ours = seconds["ours to bfloat16, pertoken"]
            say(
                f"\n({m}, {k}, {n}): floor {least * 1e6:,.1f} us"
                + (f"; {disturbed} disturbed rounds dropped" if disturbed else "")
                + (" - ALL OF THEM: do not trust these" if disturbed == 6 * ROUNDS else "")
            )
            for name, time_ in seconds.items():
                say(
                    f"   {name:34s} {time_ * 1e6:12,.1f} us   floor / it {least / time_:5.2f}"
                    f"   it / ours {time_ / ours:6.2f}"
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
