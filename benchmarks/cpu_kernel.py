"""The CPU kernel beside its peers and the machine's limit: `python benchmarks/cpu_kernel.py`.

`... --write` also rewrites benchmarks/cpu_kernel.txt, which has the last results; `--isa NAME`
measures under another instruction set. onnxruntime is shown if it is installed
(`pip install onnx onnxruntime`). rounds.py tells how it is measured.

Each call is measured in two ways: `layers`, one layer after another as in a model, so that each
call's weight comes from memory; and `again`, one layer repeatedly, so that its weight stays in the
last cache if it fits. Two calls measure the floor, in the same rounds and ways: the int8 products
of the matmul, from registers, and the reading of its weight. The floor is the longer of the two.

A float32 scale of a layer without per-token scale is folded on each call, a packed one is ready:
the line "float scale, over packed" compares the two. The last two sizes are for that alone.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator

from rounds import (
    TO_FLOOR,
    Call,
    Measured,
    Results,
    beside,
    copies,
    forced,
    layers_and_again,
    least,
    main,
)

# isort: split
import torch
from torch import Tensor, nn

import lq_graph
from lq_graph.kernels import prepared

# few products for many columns: the fold of the scale takes most of the time
NARROW = [(1, 64, 4096), (1, 64, 11008)]
OURS = "ours to bfloat16, pertoken"
PREPARED = f"{OURS}, prepared"
FLOAT_SCALE = ", float scale"
# It has no variable that limits it.
OWN_CHOICE = "onnxruntime QLinearMatMul u8"
# with AVX2 alone, oneDNN takes a thousand times as long for bfloat16
ONEDNN_OUT = torch.float32 if forced() in ("avx2", "avxvnni") else torch.bfloat16
ONEDNN = f"oneDNN qlinear u8 to {str(ONEDNN_OUT).removeprefix('torch.')}"


def epilogue(acc: Tensor, scale: Tensor, pertoken: Tensor) -> Tensor:
    """int32 (m, n) to bfloat16 by torch's operators, in the order of the kernel."""
    return (acc.to(torch.float32) * scale * pertoken.unsqueeze(-1)).to(torch.bfloat16)


def in_torch(x: Tensor, weight: Tensor, scale: Tensor, pertoken: Tensor) -> Tensor:
    return epilogue(torch._int_mm(x, weight.t()), scale, pertoken)


inductor = torch.compile(in_torch)


class Layer:
    """The operands of one layer."""

    def __init__(self, m: int, k: int, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def ints(*shape: int) -> Tensor:
            return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

        self.x, self.weight = ints(m, k), ints(n, k)
        self.scale = torch.rand(n, generator=generator) * 1e-4
        self.packed = lq_graph.trans_quant_param(self.scale)
        self.pertoken = torch.rand(m, generator=generator)

    def ours(self) -> dict[str, Call]:
        """The calls whose scale is packed or float."""
        op = torch.ops.lq_graph.linear_quant.default
        x, weight, scale, packed = self.x, self.weight, self.scale, self.packed
        return {
            "ours to int8": lambda: op(x, weight, packed),
            f"ours to int8{FLOAT_SCALE}": lambda: op(x, weight, scale),
            "ours to float16": lambda: op(x, weight, packed, output_dtype=torch.float16),
            f"ours to float16{FLOAT_SCALE}": lambda: op(
                x, weight, scale, output_dtype=torch.float16
            ),
            OURS: lambda: op(x, weight, scale, None, self.pertoken, output_dtype=torch.bfloat16),
        }

    def peers(self) -> dict[str, Call]:
        """int4, and other ways to compute the layer."""
        op = torch.ops.lq_graph.linear_quant.default
        x, weight, scale, pertoken = self.x, self.weight, self.scale, self.pertoken
        (m, k), n = x.shape, weight.shape[0]
        x4, w4 = (lq_graph.pack_int4(values >> 4) for values in (x, weight))
        linear, linear16 = nn.Linear(k, n, bias=False), nn.Linear(k, n, bias=False).bfloat16()
        xf, xb = torch.randn(m, k), torch.randn(m, k).bfloat16()
        return {
            "ours int4 to bfloat16": lambda: op(
                x4, w4, scale, None, pertoken, output_dtype=torch.bfloat16
            ),
            **dict(_prepared(x, weight, scale, pertoken)),
            "_int_mm alone": lambda: torch._int_mm(x, weight.t()),
            "_int_mm, torch epilogue": lambda: in_torch(x, weight, scale, pertoken),
            "_int_mm, Inductor epilogue": lambda: inductor(x, weight, scale, pertoken),
            "fp32 nn.Linear": lambda: linear(xf),
            "bf16 nn.Linear": lambda: linear16(xb),
            **dict(_onednn(x, weight, scale)),
            **dict(_onnxruntime(x, weight, scale)),
        }

    def expected(self) -> dict[str, Tensor]:
        """What exact calls return; float64 holds every sum."""
        acc = (self.x.double() @ self.weight.double().t()).to(torch.int32)
        out = epilogue(acc, self.scale, self.pertoken)
        names = "_int_mm, torch epilogue", "_int_mm, Inductor epilogue", OURS, PREPARED
        # oneDNN multiplies in another order
        onednn = (acc * (0.01 * self.scale.double())).to(ONEDNN_OUT)
        return {"_int_mm alone": acc, ONEDNN: onednn, **dict.fromkeys(names, out)}


def _prepared(
    x: Tensor, weight: Tensor, scale: Tensor, pertoken: Tensor
) -> Iterator[tuple[str, Call]]:
    """The same as OURS with a weight that was packed beforehand, as oneDNN's and onnxruntime's."""
    op = torch.ops.lq_graph.linear_quant.default
    own = weight.clone()
    if prepared.prepare(own):
        yield PREPARED, lambda: op(x, own, scale, None, pertoken, output_dtype=torch.bfloat16)


def _onednn(x: Tensor, weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Call]]:
    """qlinear with unsigned activations, which oneDNN computes fast: 128 stands for 0."""
    unsigned = (x.to(torch.int16) + 128).to(torch.uint8)
    ops = torch.ops.onednn
    ready = ops.qlinear_prepack(weight, list(x.shape))
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)

    def run() -> Tensor:
        return ops.qlinear_pointwise(
            unsigned, 0.01, 128, ready, scale, zeros, None, 1.0, 0, ONEDNN_OUT, "none", [], ""
        )

    yield ONEDNN, run


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
    yield OWN_CHOICE, lambda: session.run(None, feed)


def wrong(layer: Layer, calls: dict[str, Call]) -> list[str]:
    """The calls that do not return the exact product, beyond a rounding of bfloat16."""
    names = []
    expected = layer.expected()
    for name in expected.keys() & calls.keys():
        got, want = calls[name](), expected[name]
        assert isinstance(got, Tensor)
        step = 0.0 if want.dtype == torch.int32 else 2**-7
        if not torch.allclose(got.double(), want.double(), rtol=step, atol=0.0):
            names.append(name)
    return sorted(names)


def float_over_packed(results: Results, measured: Measured) -> None:
    """Print the time with a float scale, divided by that with a packed one."""
    ratios = (
        f"{name.removeprefix('ours ')} {seconds[name + FLOAT_SCALE] / seconds[name]:.2f} {way}"
        for name in ("ours to int8", "ours to float16")
        for way, seconds in measured.ways.items()
    )
    results.say("   float scale, over packed: " + ", ".join(ratios))


def report(results: Results, options: argparse.Namespace) -> None:  # noqa: ARG001
    """Print the results of every size."""
    for m, k, n in results.sizes + NARROW:
        calls: dict[str, list[Call]] = {}
        bad: list[str] = []
        for seed in copies(k, n):
            layer = Layer(m, k, n, seed)
            own = {**results.floor.calls(m, k, n, layer.weight), **layer.ours()}
            if (m, k, n) not in NARROW:
                own |= layer.peers()
                bad = bad or wrong(layer, own)
            for name, call in own.items():
                marked = name + (" *" if forced() and name == OWN_CHOICE else "")
                calls.setdefault(marked, []).append(call)
        measured = results.measure(layers_and_again(calls))
        first, again = (least(seconds) * 1e6 for seconds in measured.ways.values())
        title = (
            f"({m}, {k}, {n}): floor {first:,.1f} us in {len(calls[OURS])} layers, "
            f"{again:,.1f} us again"
        )
        results.table(title, measured, [TO_FLOOR, beside(OURS, "it/ours")])
        float_over_packed(results, measured)
        if bad:
            results.say(f"   not the exact product: {'; '.join(bad)}")
    if forced():
        results.say(f"\n* chooses its instructions itself: it may use others than {forced()}")


if __name__ == "__main__":
    main(__doc__ or "", "cpu_kernel.txt", report)
