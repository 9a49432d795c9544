"""Norms in whole graphs: torchair's GE graphs and npugraph_ex, the patterns that torchair has, and
small random graphs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cann_host
import lq_graph
from lq_graph.fusion.passes import reports
from support import golden_fused
from support.eager import BF16, F16, F32
from support.fused import EPSILON, K, as_array, assert_bits, exact, norm_of
from support.fused_graphs import calls_of, fused, outcomes, traced
from support.has import need_converter, need_operator

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.filterwarnings("ignore"),
]
torch_npu = pytest.importorskip("torch_npu")

PARTS = {"pow.Tensor_Scalar", "mean.dim", "rsqrt", "_to_copy", "mul.Tensor", "npu_dynamic_quant"}


class Norm(nn.Module):
    """As transformers writes it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(exact(K, dtype=dtype, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(F32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        return self.weight * wide.to(x.dtype)


class Layer(nn.Module):
    """A sum, its norm, and two quantized layers that read it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = Norm(dtype)
        self.first = nn.Linear(K, K, bias=False, dtype=dtype)
        self.second = nn.Linear(K, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        total = x + residual
        y = self.norm(total)
        return self.first(y), self.second(y), total


def layer_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Layer(dtype).eval().requires_grad_(False)
    lq_graph.quantize(model, lq_graph.A8W8Dynamic())
    return model.npu()


def compiled(
    function: Callable[..., Any], mode: str, dynamic: bool | None = False
) -> tuple[Callable[..., Any], list[Counter[str]]]:
    """The compiled function, and the calls in each graph when all passes are done."""
    graphs: list[Counter[str]] = []

    def see(module: Any, *_: Any) -> None:
        graphs.append(calls_of(module))

    torch._dynamo.reset()
    backend: Any = "npugraph_ex"
    options: dict[str, Any] = {"post_grad_custom_post_pass": see}
    if mode != "npugraph_ex":
        import torchair

        config = torchair.CompilerConfig()
        config.mode = mode
        config.post_grad_custom_post_pass = see
        backend, options = torchair.get_npu_backend(compiler_config=config), {}
    elif "npugraph_ex" not in torch._dynamo.list_backends(exclude_tags=()):
        pytest.skip("this torch_npu has no npugraph_ex")
    extra = {"options": options} if options else {}
    result = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True, **extra)
    return result, graphs


MODES = ("max-autotune", "reduce-overhead", "npugraph_ex")


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "marked"])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_in_each_mode(mode: str, dynamic: bool | None) -> None:
    need_operator("npu_add_rms_norm_dynamic_quant")
    need_converter("npu_add_rms_norm_dynamic_quant")
    dtype = F16 if mode == "npugraph_ex" else BF16
    model = layer_of(dtype)
    x, residual = exact(2, 3, K, dtype=dtype), exact(2, 3, K, dtype=dtype, seed=1)
    inputs = [x.npu(), residual.npu()]
    if dynamic is None:
        for one in inputs:
            torch._dynamo.mark_dynamic(one, 1)
    run, graphs = compiled(model, mode, dynamic)
    with reports() as found:
        first, second, total = run(*inputs)
    (report,), (graph,) = found, graphs
    assert report.done("add_rms_norm_dynamic_quant") == 1
    assert graph["npu_add_rms_norm_dynamic_quant"] == 1 and not set(graph) & PARTS
    # the layers' own numbers, of the golden's quantization
    weight = model.norm.weight.detach().cpu()  # type: ignore[union-attr,operator]
    y, _, want_total = norm_of(x, residual, weight)
    values, scale = golden_fused.quantize_rows(y, 127, "reciprocal")
    assert_bits(total, want_total)
    for layer, got in ((model.first, first), (model.second, second)):
        quantized: Any = layer
        want = lq_graph.linear_quant(
            torch.from_numpy(values).to(torch.int8).view(-1, K),
            quantized.linear.weight.cpu(),
            quantized.linear.scale.cpu(),
            pertoken_scale=torch.from_numpy(scale).view(-1),
            output_dtype=dtype,
        )
        assert torch.equal(got.cpu().view(want.shape), want)


@pytest.mark.parametrize("mode", MODES)
def test_a_static_quantization_in_each_mode(mode: str) -> None:
    """torchair converts no npu_add_rms_norm_quant: the GE graph has our converter's node."""
    need_operator("npu_add_rms_norm_quant", "div_mode")
    x, residual = (exact(2, 3, K, dtype=BF16, seed=i) for i in (0, 1))
    w, scale, points = (exact(K, dtype=BF16, seed=i) for i in (2, 3, 4))
    weight, one = torch.ones(16, K, dtype=torch.int8), torch.ones(16)

    def layer(x: Tensor, r: Tensor, w: Tensor, s: Tensor, p: Tensor, *of: Tensor) -> Any:
        y, total = pieces(x, r, w, EPSILON)
        values = lq_graph.static_quant(y.view(-1, K), s, p)
        return lq_graph.linear_quant(values, *of, output_dtype=BF16), values, total

    inputs = (x, residual, w, scale, points, weight, one)
    run, graphs = compiled(layer, mode)
    product, values, total = run(*(t.npu() for t in inputs))
    assert kernels(graphs[0]) == {"npu_add_rms_norm_quant": 1}
    y, _, want_total = norm_of(x, residual, w)
    want = golden_fused.quantize(y, as_array(scale), as_array(points), divides=False)
    assert_bits(values, want.reshape(-1, K))
    assert_bits(total, want_total)
    want_product = lq_graph.linear_quant(values.cpu(), weight, one, output_dtype=BF16)
    assert torch.equal(product.cpu(), want_product)


# ---- torchair's own patterns ----


def pieces(x1: Tensor, x2: Tensor, w: Tensor, *epsilon: float) -> tuple[Tensor, Tensor]:
    total = x1 + x2
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (epsilon or (1e-6,))[0])
    return w * wide.to(total.dtype), total


def vendors(x1: Tensor, x2: Tensor, w: Tensor, *epsilon: float) -> tuple[Tensor, Tensor]:
    y, _, total = torch_npu.npu_add_rms_norm(x1, x2, w, *epsilon)
    return y, total


Norms = Callable[..., tuple[Tensor, Tensor]]
Quantize = Callable[[Tensor], Any]


def dynamic_quant(norm: Norms, quantize: Quantize, *inputs: Any) -> Any:
    y, total = norm(*inputs)
    return (*quantize(y), total)


def without_the_sum(norm: Norms, quantize: Quantize, *inputs: Any) -> Any:
    return tuple(quantize(norm(*inputs)[0]))


def flattened(norm: Norms, quantize: Quantize, *inputs: Any) -> Any:
    y, total = norm(*inputs)
    values, scale = quantize(y.flatten(0, 1))
    return values, scale.view(-1, 1), total


def cast(norm: Norms, _: Quantize, *inputs: Any) -> Any:
    y, total = norm(*inputs)
    return y, y.to(F32), total


def cast_of_a_view(norm: Norms, _: Quantize, *inputs: Any) -> Any:
    y, total = norm(*inputs)
    return y, y.view(-1, y.shape[-1]).to(F32), total


def static_quant(norm: Norms, _: Quantize, *inputs: Any) -> Any:
    y, total = norm(*inputs)
    scale = inputs[2]
    return torch_npu.npu_quantize(y, scale, None, torch.qint8, -1), total


def static_quant_without_the_sum(norm: Norms, _: Quantize, *inputs: Any) -> Any:
    return static_quant(norm, _, *inputs)[:1]


# function of torchair that registers patterns: graphs that it fuses
PATTERNS: dict[str, list[Callable[..., Any]]] = {
    "_register_addrmsnormdynamicquant_pattern": [dynamic_quant, without_the_sum],
    "_register_addrmsnormdynamicquant_pattern2": [flattened],
    "_register_addrmsnormcast_pattern": [cast, cast_of_a_view],
    "_register_addrmsnormquant_patterns": [static_quant, static_quant_without_the_sum],
}
OTHERS = {"_register_batchmatmultranspose_patterns"}  # of float products


def test_every_pattern_of_torchair_is_in_the_table() -> None:
    from torchair.patterns import pattern_util

    known = {*PATTERNS, *OTHERS}
    assert {name for name in vars(pattern_util) if name.startswith("_register_")} <= known


def kernels(graph: Counter[str]) -> Counter[str]:
    """What is a kernel; without our product, which is there to have the fusions run."""
    views = ("view", "reshape", "_unsafe_view", "linear_quant", "sym_size.int")
    return Counter({name: times for name, times in graph.items() if name not in views})


@pytest.mark.parametrize("epsilon", [(), (EPSILON,)], ids=["default", "epsilon"])
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("case", [f for functions in PATTERNS.values() for f in functions])
@pytest.mark.slow
def test_ours_fuses_what_torchair_fuses(
    case: Callable[..., Any], mode: str, epsilon: tuple[float, ...]
) -> None:
    """A norm in pieces with our quantization, and the vendor's operators: the same fused
    operators."""
    need_operator("npu_add_rms_norm_dynamic_quant")
    need_operator("npu_add_rms_norm_cast")
    inputs = [exact(2, 3, K, dtype=BF16, seed=i).npu() for i in (0, 1)]
    w = exact(K, dtype=BF16, seed=2).npu()
    weight, scale = torch.ones(16, K, dtype=torch.int8).npu(), torch.ones(16).npu()
    x = torch.ones(2, K, dtype=torch.int8).npu()

    def ours(*tensors: Tensor) -> Any:
        product = lq_graph.linear_quant(
            x, weight, scale, pertoken_scale=scale[:2], output_dtype=F16
        )
        return (*case(pieces, lq_graph.dynamic_quant, *tensors, *epsilon), product)

    def theirs(*tensors: Tensor) -> Any:
        return case(vendors, torch_npu.npu_dynamic_quant, *tensors, *epsilon)

    found = []
    for function in (ours, theirs):
        run, graphs = compiled(function, mode)
        results = run(*inputs, w)
        found.append((kernels(graphs[0]), results))
    (got, ours_results), (want, theirs_results) = found
    got.pop("slice.Tensor", None)
    if case in PATTERNS["_register_addrmsnormquant_patterns"] and mode == "max-autotune":
        # torchair registers these for the other mode; once it has, it fuses in this one too
        unfused = {"npu_add_rms_norm": 1, "npu_quantize": 1}
        assert got == {"npu_add_rms_norm_quant": 1} and want in (got, unfused)
        return
    assert got == want and any(name.startswith("npu_add_rms_norm_") for name in got)
    for a, b in zip(ours_results, theirs_results, strict=False):
        assert torch.equal(a, b)


# ---- random graphs ----


def random_function(seed: int) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """A few sums, norms and quantizations, each right or a little wrong."""
    choose = random.Random(seed)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        way = choose.randrange(9)
        if way == 0:
            return torch.nn.functional.rms_norm(x, (K,), w, EPSILON)
        if way == 1:
            y: Tensor = torch_npu.npu_rms_norm(x, w, EPSILON)[0]
            return y
        wide = x.float()
        square = wide * wide if choose.random() < 0.5 else wide.pow(2)
        dims = (-1,) if choose.random() < 0.8 else (-2, -1)
        mean = square.mean(dims, keepdim=True)
        epsilon: Any = EPSILON if choose.random() < 0.9 else w[0].float().abs()
        root = torch.rsqrt(mean + epsilon)
        if way == 2:
            return (wide * root * (1 + w.float())).to(x.dtype)
        if way == 3:
            return (wide * root * root).to(x.dtype) * w
        if way == 4:
            return (wide * root).to(x.dtype) * x
        y = w * (wide * root).to(x.dtype)
        return y * mean.to(x.dtype) if way == 5 else y

    def function(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        pool, results = [x, residual], []
        for _ in range(choose.randrange(2, 6)):
            one, other = choose.choice(pool), choose.choice(pool)
            way = choose.randrange(6)
            if way == 0:
                one = torch.add(one, other, alpha=choose.choice((1, 1, 2)))
            elif way == 1:
                one = one + other[:, :1]
            elif way < 4:
                one = norm(one + other, w)
            else:
                one = norm(one, w)
            ending = choose.random()
            if ending < 0.6:
                flat = one.view(-1, K) if choose.random() < 0.5 else one
                results += lq_graph.dynamic_quant(flat)
            if 0.5 < ending < 0.8:
                results.append(one.float())
            if ending > 0.4 or way < 2:
                pool.append(one)
        return (*results, pool[-1])

    return function


SEEDS = [*range(16), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(16, 200))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graphs(seed: int, tally: Callable[..., None]) -> None:
    """Fused and unfused are close, in the order and the shapes of the results."""
    dtype = (F16, BF16)[seed % 2]
    inputs = [exact(2, 3, K, dtype=dtype, seed=i).npu() for i in (0, 1)]
    inputs.append(exact(K, dtype=dtype, seed=2).npu())
    plain = traced(random_function(seed), *inputs)
    module, report = fused(random_function(seed), *inputs, dynamic=seed % 4 == 0)
    for name, whys in outcomes(report).items():
        tally(f"fusions of random graphs, {name}", whys.count(""))
    got, want = module(*inputs), plain(*inputs)
    assert len(got) == len(want)
    scale = 1.0
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype == torch.int8:
            assert (a.int() - b.int()).abs().max() <= 3
            continue
        a, b = a.float(), b.float()
        scale = max(float(b.abs().max()), 1e-3)
        assert float((a - b).abs().max()) / scale < 0.03, as_array((a - b).cpu())
