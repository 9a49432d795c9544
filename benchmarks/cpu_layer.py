"""Layers that take floats, on the CPU, beside their peers: `python benchmarks/cpu_layer.py`.

`... --write` also rewrites benchmarks/cpu_layer.txt, which has the last results; `--isa NAME`
measures under another instruction set. torchao is shown if it is installed. rounds.py tells how it
is measured.

The first tables have the operators that quantize activations, beside a copy of their input. The bar
is `copy_` into a tensor that is there; `clone` allocates one. All data stay in the cache, as
activations do.

The second tables have the whole layer: QuantizedLinear as quantize() makes it from nn.Linear (A8W8
dynamic), and its peers, all from the same float weight, each with copies of its own. There are
several layers, one called after another, so that each call's weight comes from memory. The floor is
that of cpu_kernel.py: it holds the matmul only, not the quantization of the activations.

torchao quantizes per token, as A8W8Dynamic does. quantize_dynamic of torch quantizes per tensor, to
8 bits without sign, and takes and returns float32.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Iterator

from rounds import TO_FLOOR, Call, Results, Slot, beside, copies, least, main, prepared_copy

# isort: split
import torch
from torch import Tensor, nn

import lq_graph

ROWS = [(1, 4096), (16, 4096), (128, 4096), (512, 4096), (1, 576)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COPY = "copy_ into a ready tensor"
OURS = "ours bfloat16"
CLOSE = 0.99  # cosine of a layer's output to that of the float32 layer


def quantizers(x: Tensor) -> dict[str, Call]:
    """The operators that quantize x, and copies of x."""
    reciprocal, offset = torch.tensor([40.0], dtype=x.dtype), torch.tensor([3.0], dtype=x.dtype)
    out = torch.empty_like(x)
    return {
        COPY: lambda: out.copy_(x),
        "clone": lambda: x.clone(),
        "dynamic_quant to int8": lambda: lq_graph.dynamic_quant(x),
        "dynamic_quant to int4": lambda: lq_graph.dynamic_quant(x, dtype=torch.int32),
        "static_quant": lambda: lq_graph.static_quant(x, reciprocal),
        "static_quant, offset": lambda: lq_graph.static_quant(x, reciprocal, offset),
    }


def quantizers_table(results: Results, m: int, k: int) -> None:
    calls = {
        f"{name}, {dtype}": call
        for dtype in DTYPES
        for name, call in quantizers(torch.randn(m, k).to(DTYPES[dtype])).items()
    }
    measured = results.measure({name: {"time": Slot([call])} for name, call in calls.items()})
    title = f"activations ({m}, {k})"
    # the copy is of two bytes an element in both dtypes
    results.table(title, measured, [beside(f"{COPY}, bfloat16", "it/copy")])


def layers(m: int, weight: Tensor) -> Iterator[tuple[str, Call]]:
    """The whole layer with a float weight (n, k), ours and its peers."""
    n, k = weight.shape
    float_layer = nn.Linear(k, n, bias=False)
    float_layer.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(float_layer)
    x = torch.randn(m, k)

    def call(layer: nn.Module, dtype: torch.dtype) -> Call:
        own = x.to(dtype)
        return lambda: layer(own)

    yield "fp32 nn.Linear", call(copy.deepcopy(model), torch.float32)
    for name, dtype in DTYPES.items():
        in_dtype = copy.deepcopy(model).to(dtype)
        yield f"{'bf16' if dtype == torch.bfloat16 else 'fp16'} nn.Linear", call(in_dtype, dtype)
        ours = copy.deepcopy(in_dtype)
        lq_graph.quantize(ours, lq_graph.A8W8Dynamic())
        yield f"ours {name}", call(ours, dtype)
        if (ready := prepared_copy(ours)) is not None:
            yield f"ours {name}, prepared", call(ready, dtype)
        compiled = torch.compile(copy.deepcopy(ours), dynamic=False)
        yield f"ours {name}, Inductor", call(compiled, dtype)
    yield "quantize_dynamic, per tensor", call(_torch_dynamic(model), torch.float32)
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        theirs = copy.deepcopy(model).bfloat16()
        quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
        yield "torchao int8 dynamic", call(theirs, torch.bfloat16)
        compiled = torch.compile(copy.deepcopy(theirs), dynamic=False)
        yield "torchao int8 dynamic, Inductor", call(compiled, torch.bfloat16)


def _torch_dynamic(model: nn.Module) -> nn.Module:
    """torch's own dynamic quantization, by oneDNN or FBGEMM, whichever torch chooses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated for torchao
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )


def check(calls: dict[str, Call]) -> None:
    """Every contestant computes the layer."""
    want = calls["fp32 nn.Linear"]()
    assert isinstance(want, Tensor)
    for name, call in calls.items():
        got = call()
        assert isinstance(got, Tensor)
        cosine = nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)
        assert cosine > CLOSE, f"{name}: cosine {cosine}"


def layers_table(results: Results, m: int, k: int, n: int) -> None:
    # Dynamo compiles each copy by itself
    torch._dynamo.reset()
    calls: dict[str, list[Call]] = {}
    for seed in copies(k, n):
        torch.manual_seed(seed)
        weight = torch.randn(n, k) / k**0.5
        own = dict(layers(m, weight))
        if not calls:
            check(own)
        int8 = torch.ones(n, k, dtype=torch.int8)  # not zeros, which are memory only when written
        for name, call in {**results.floor.calls(m, k, n, int8), **own}.items():
            calls.setdefault(name, []).append(call)
    measured = results.measure({name: {"layers": Slot(each)} for name, each in calls.items()})
    floor = least(measured.ways["layers"]) * 1e6
    title = f"layer ({m}, {k}, {n}): floor {floor:,.1f} us in {len(calls[OURS])} layers"
    results.table(title, measured, [TO_FLOOR, beside(OURS, "it/ours")])


def report(results: Results, options: argparse.Namespace) -> None:  # noqa: ARG001
    """Print all tables."""
    for m, k in ROWS:
        quantizers_table(results, m, k)
    for size in results.sizes:
        layers_table(results, *size)


if __name__ == "__main__":
    # a compiled function is compiled again for each layer
    torch._dynamo.config.recompile_limit = 64
    main(__doc__ or "", "cpu_layer.txt", report)
