"""Compiled graphs on cann_host: the vendor's module through torch.compile and torchair, operators
around it, refusals with CANN's codes, and the life of graphs."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_npu
import torchair
from torch_npu.contrib.module import LinearQuant

import cann_host
import lq_graph
from cann_host import runtime
from cann_host.graph import compiler, executor
from cann_host.options import Options
from support import golden

pytestmark = pytest.mark.skipif(
    not cann_host.is_active(), reason="needs cann_host in place of CANN"
)

I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch.npu.config.allow_internal_format = False


def compiled(model: Callable, *, dynamic: bool = False) -> Callable:
    backend = torchair.get_npu_backend()
    return torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)


def values(*shape: int, int4: bool = False) -> torch.Tensor:
    if int4:
        return torch.from_numpy(golden.pack_int4(np.random.default_rng(0).integers(-8, 8, shape)))
    return torch.randint(-128, 128, shape, dtype=I8)


def vendor_layer(
    k: int, n: int, *, m: int = 1, int4: bool = False, scalar: bool = False, **options
) -> LinearQuant:
    layer = LinearQuant(k, n, **{"bias": False, **options})
    layer.weight.data = values(n, k, int4=int4)
    layer.scale.data = torch.rand(1 if scalar else n) * 0.01
    if options.get("offset"):
        layer.offset.data = torch.randint(-60, 60, layer.scale.shape).float()
    if options.get("pertoken_scale"):
        layer.pertoken_scale.data = torch.rand(m)
    if options.get("bias"):
        layer.bias.data = torch.randint(-5000, 5000, (n,), dtype=I32)
    return layer.npu()


def expected(layer: LinearQuant, x: torch.Tensor) -> np.ndarray:
    def array(name: str) -> np.ndarray | None:
        parameter = getattr(layer, name)
        return None if parameter is None else parameter.detach().cpu().numpy()

    names = ("weight", "scale", "offset", "pertoken_scale", "bias")
    arguments = {name: array(name) for name in names}
    dtype = str(layer.output_dtype or I8).removeprefix("torch.")
    return golden.linear_quant(x.cpu().numpy(), **arguments, output_dtype=dtype)


def assert_golden(out: torch.Tensor, layer: LinearQuant, x: torch.Tensor) -> None:
    assert out.dtype == (layer.output_dtype or I8)
    # float32 holds every value of the other dtypes, except int32's
    array = out.cpu().numpy() if out.dtype == I32 else out.cpu().float().numpy()
    np.testing.assert_array_equal(array, expected(layer, x).astype(array.dtype))


LAYERS = {
    "a8w8-int8": dict(),
    "a8w8-int8-scalar": dict(scalar=True, offset=True),
    "a8w8-int8-offset-bias": dict(offset=True, bias=True),
    "a8w8-float16": dict(output_dtype=F16, bias=True),
    "a8w8-bfloat16": dict(output_dtype=BF16, bias=True),
    "a8w8-bfloat16-pertoken": dict(output_dtype=BF16, pertoken_scale=True),
    "a8w8-float16-pertoken": dict(output_dtype=F16, pertoken_scale=True, bias=True),
    "a8w8-int32": dict(output_dtype=I32, bias=True),
    "a4w4-float16": dict(output_dtype=F16, bias=True, int4=True),
    "a4w4-float16-scalar": dict(output_dtype=F16, int4=True, scalar=True),
}


@pytest.mark.slow
@DYNAMIC
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_vendor_module(options: dict, dynamic: bool) -> None:
    layer = vendor_layer(72, 40, m=5, **options)
    x = values(5, 72, int4=options.get("int4", False)).npu()
    out = compiled(layer, dynamic=dynamic)(x)
    assert torch.equal(out.cpu(), layer(x).cpu())
    assert_golden(out, layer, x)


@DYNAMIC
@pytest.mark.parametrize("batch", [(2,), (2, 1, 3)], ids=str)
def test_vendor_module_with_batch_dims(batch: tuple[int, ...], dynamic: bool) -> None:
    layer = vendor_layer(64, 32, output_dtype=F16)
    x = values(*batch, 4, 64).npu()
    assert_golden(compiled(layer, dynamic=dynamic)(x), layer, x)


@pytest.mark.slow
@DYNAMIC
@pytest.mark.parametrize(("k", "n"), [(64, 32), (72, 40), (17, 33)], ids=str)
@pytest.mark.parametrize(
    "options", [dict(offset=True, bias=True), dict(output_dtype=BF16)], ids=["int8", "bfloat16"]
)
def test_internal_format_weight(options: dict, k: int, n: int, dynamic: bool) -> None:
    torch.npu.config.allow_internal_format = True
    layer = vendor_layer(k, n, **options)
    x = values(3, k).npu()
    want = expected(layer, x)
    torchair.experimental.inference.use_internal_format_weight(layer)
    assert torch_npu.get_npu_format(layer.weight) == 29
    out = compiled(layer, dynamic=dynamic)(x)
    np.testing.assert_array_equal(out.cpu().float().numpy(), want.astype(np.float32))


def test_one_dynamic_graph_serves_every_m() -> None:
    layer = vendor_layer(64, 32, offset=True)
    backend = torchair.get_npu_backend()
    graphs = 0

    def counting(gm, example_inputs):
        nonlocal graphs
        graphs += 1
        return backend(gm, example_inputs)

    run = torch.compile(layer, backend=counting, dynamic=True, fullgraph=True)
    for m in (5, 2, 300, 5, 7):
        x = values(m, 64).npu()
        assert_golden(run(x), layer, x)
    assert graphs == 1


def test_static_graph_runs_again_with_other_inputs() -> None:
    layer = vendor_layer(64, 32)
    run = compiled(layer)
    kept = [(x, run(x)) for x in (values(4, 64).npu() for _ in range(5))]
    for x, out in kept:  # an earlier result is not overwritten by a later run
        assert_golden(out, layer, x)


# name -> (function, inputs on the CPU); the result must equal torch's on the CPU
_H, _W = torch.randn(4, 8).half(), torch.randn(8, 8)
_B = torch.randn(2, 4, 8)
AROUND: dict[str, tuple[Callable, tuple[torch.Tensor, ...]]] = {
    "add": (lambda x, y: x + y, (_H, _H)),
    "add_scalar": (lambda x: x + 2, (_H,)),
    "add_int8": (lambda x: x + 1, (torch.arange(8, dtype=I8),)),
    "sub": (lambda x, y: x - y, (_B, _B[0])),
    "rsub": (lambda x: 1 - x, (_H,)),
    "mul": (lambda x, y: x * y, (_H, _H)),
    "mul_scalar": (lambda x: x * 2, (_H,)),
    "div": (lambda x, y: x / (y.abs() + 1), (_H, _H)),
    "floor_div": (lambda x: x // 2, (torch.arange(-4, 4),)),
    "to_float": (lambda x: x.to(F32), (_H,)),
    "to_int8": (lambda x: (x * 10).to(I8), (_H,)),
    "to_bfloat16": (lambda x: x.to(BF16), (_B,)),
    "reshape": (lambda x: x.reshape(2, -1) + 1, (_H,)),
    "flatten": (lambda x: x.flatten() + 1, (_B,)),
    "transpose": (lambda x: x.transpose(1, 2) * 0.5, (_B,)),
    "permute": (lambda x: x.permute(2, 0, 1).contiguous(), (_B,)),
    "unsqueeze": (lambda x: x.unsqueeze(0) + 1, (_H,)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1) + 1, (_H,)),
    "expand": (lambda x: x.unsqueeze(0).expand(3, 4, 8) + 1, (_H,)),
    "cat": (lambda x, y: torch.cat([x, y], 1), (_H, _H)),
    "stack": (lambda x, y: torch.stack([x, y], 1), (_H, _H)),
    "slice": (lambda x: x[1:3, ::2] + 1, (_H,)),
    "select": (lambda x: x[1] + 1, (_H,)),
    "chunk": (lambda x: x.chunk(2, -1)[1] + 1, (_H,)),
    "embedding": (lambda x, i: F.embedding(i, x), (_W, torch.tensor([[1, 5], [0, 7]]))),
    "relu": (lambda x: F.relu(x), (_H,)),
    "silu_mul": (lambda x, y: F.silu(x) * y, (_B, _B)),
    "sigmoid": (lambda x: torch.sigmoid(x), (_B,)),
    "clamp": (lambda x: x.clamp(-1, 1), (_H,)),
    "round": (lambda x: torch.round(x), (_B,)),
    "sum": (lambda x: x.sum(-1), (_B,)),
    "softmax": (lambda x: x.softmax(-1), (_B,)),
    "where": (lambda x, y: torch.where(x > y, x, y), (_B, _B[0])),
    "zeros": (lambda x: x + torch.zeros(8, dtype=F16, device=x.device), (_H,)),
    "matmul": (lambda x, w: x @ w, (_B, _W)),
    "linear": (lambda x, w, b: F.linear(x, w, b), (_B[0], _W, _W[0])),
    "unbind": (lambda x: x.unbind(1)[2] + 1, (_B,)),
    "rsub_alpha": (lambda x, y: torch.rsub(x, y, alpha=3), (torch.arange(8), torch.arange(8) * 5)),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0), (_H,)),
    "log_softmax": (lambda x: x.log_softmax(-1), (_B,)),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), (_B,)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (8,), w[0], w[1]), (_B, _W)),
    "masked_fill": (lambda x: x.masked_fill(x > 0, -1.0), (_B,)),
    "cumsum": (lambda x: x.cumsum(-1), (torch.arange(8),)),
    "topk": (lambda x: x.topk(2)[0], (_H,)),
    "any_all": (lambda x: ((x > 0).any(0), (x > -9).all()), (_H,)),
    "arange": (lambda x: x + torch.arange(8, device=x.device), (_H,)),
    "tril": (lambda x: x.tril(), (_H,)),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1),
        (torch.ones(1, 2, 6, 6) / 4, torch.ones(3, 2, 3, 3), torch.arange(3.0)),
    ),
    "two_outputs": (lambda x: (x + 1, x * 2, x), (_H,)),
}


@pytest.mark.slow
@DYNAMIC
@pytest.mark.parametrize(("function", "inputs"), AROUND.values(), ids=AROUND)
def test_operators_around(function: Callable, inputs: tuple, dynamic: bool) -> None:
    out = compiled(function, dynamic=dynamic)(*(x.npu() for x in inputs))
    want = function(*inputs)
    if isinstance(want, tuple):
        assert [x.dtype for x in out] == [x.dtype for x in want]
        torch.testing.assert_close([x.cpu() for x in out], list(want))
    else:
        assert out.dtype == want.dtype
        torch.testing.assert_close(out.cpu(), want)


def test_layers_and_operators_in_one_graph() -> None:
    first, second = vendor_layer(64, 48, output_dtype=F16), vendor_layer(48, 16, offset=True)

    def model(x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(first(x)) * 0.25
        return second(hidden.clamp(-128, 127).round().to(I8))

    x = values(6, 64).npu()
    assert torch.equal(compiled(model)(x).cpu(), model(x).cpu())


# What a device refuses, a graph here refuses; test_cann_host_rules.py has the whole table
REFUSED = {
    "float32-scale-to-int8": (
        lambda x, w, s: torch_npu.npu_quant_matmul(x, w, s, output_dtype=I8),
        "scale dtype float32 .*561002, tiling",
    ),
    "float32-scale-to-float16": (
        lambda x, w, s: torch_npu.npu_quant_matmul(x, w, s, output_dtype=F16),
        "scale dtype float32 .*561002, tiling",
    ),
}


@DYNAMIC
@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(function: Callable, message: str, dynamic: bool) -> None:
    inputs = (values(4, 64).npu(), values(64, 32).npu(), torch.ones(32).npu())
    with pytest.raises(RuntimeError, match=message):
        compiled(function, dynamic=dynamic)(*inputs)


A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"


def golden_of(layer: LinearQuant, x: torch.Tensor, offset: torch.Tensor) -> np.ndarray:
    x1, weight, scale = (t.cpu().numpy() for t in (x, layer.weight, layer.scale))
    return golden.linear_quant(x1, weight, scale, offset.cpu().numpy(), output_dtype="int8")


@DYNAMIC
@pytest.mark.parametrize("soc", [A2, A950])
def test_the_vendors_module_with_one_scale_and_an_offset_each(
    soc: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph example of the vendor's page. Before 950 offset[0] serves every column."""
    monkeypatch.setattr(executor, "soc_name", lambda: soc)
    layer, x = vendor_layer(64, 32, offset=True, scalar=True), values(4, 64).npu()
    layer.offset.data = torch.randint(-60, 60, (32,)).float().npu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = compiled(layer, dynamic=dynamic)(x)
    told = [str(one.message) for one in caught if "overwrite other memory" in str(one.message)]
    used = layer.offset if soc == A950 else layer.offset[:1]
    np.testing.assert_array_equal(out.cpu().numpy(), golden_of(layer, x, used))
    assert bool(told) == (soc == A2)
    assert all("Expand scale to offset's length, as lq_graph does" in one for one in told)


@DYNAMIC
@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_lq_graph_makes_a_word_for_each_offset(
    soc: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "soc_name", lambda: soc)
    scale, offset = torch.rand(1), torch.randint(-60, 60, (32,)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        words = compiled(lq_graph.trans_quant_param, dynamic=dynamic)(scale.npu(), offset.npu())
    want = golden.trans_quant_param(scale.numpy(), offset.numpy())
    np.testing.assert_array_equal(words.cpu().numpy(), want)


def test_overruns_are_refused_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.current(), "options", Options.of(overruns="refuse"))
    layer = vendor_layer(64, 32, offset=True, scalar=True)
    layer.offset.data = torch.randint(-60, 60, (32,)).float().npu()
    with pytest.raises(RuntimeError, match="refused by cann_host's option overruns") as refusal:
        compiled(layer)(values(4, 64).npu())
    assert "CANN error" not in str(refusal.value)


def test_unknown_operators_are_named_with_the_torch_calls_they_came_from() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.tan(torch.sinh(x).relu()) + torch.sinh(x + 1)

    with pytest.raises(RuntimeError, match="not implemented by cann_host") as caught:
        compiled(run)(torch.ones(3).npu())
    text = str(caught.value)
    assert "op type Sinh, node Sinh and 1 more, from aten.sinh.default" in text
    assert "op type Tan, node Tan, from aten.tan.default" in text
    assert "It knows Abs, Add, AddRmsNorm" in text and "op type Relu" not in text


def test_an_unknown_operator_with_a_list_of_outputs_is_named_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(executor.OPS, "Unpack")
    with pytest.raises(RuntimeError, match=r"op type Unpack, node Unpack, from aten\.unbind\.int"):
        compiled(lambda x: [part + 1 for part in x.unbind(0)])(torch.ones(2, 3).npu())


def test_failure_leaves_other_graphs_working() -> None:
    layer = vendor_layer(64, 32)
    x = values(4, 64).npu()
    before = compiled(layer)
    assert_golden(before(x), layer, x)
    for function in (torch.sinh, torch.tan):
        with pytest.raises(RuntimeError, match="not implemented by cann_host"):
            compiled(function)(torch.ones(3).npu())
    assert_golden(before(x), layer, x)
    after = compiled(vendor_layer(64, 16))
    assert after(x).shape == (4, 16)


def test_many_graphs_on_many_threads() -> None:
    layers = [vendor_layer(64, n, offset=True) for n in (16, 24, 32)]
    runs = [compiled(layer) for layer in layers]
    inputs = [values(4, 64).npu() for _ in range(8)]
    for run in runs:
        run(inputs[0])
    wants = [[layer(x).cpu() for x in inputs] for layer in layers]
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                outs = [runs[index](x).cpu() for x in inputs]
                equal = map(torch.equal, outs, wants[index])
                wrong.extend(False for same in equal if not same)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plans_go_with_their_graphs() -> None:
    gc.collect()
    before = runtime.current().graphs.live_graphs
    run = compiled(lambda x: x * 3 - 1)
    run(torch.ones(3).npu())
    assert runtime.current().graphs.live_graphs == before + 1
    del run
    torch._dynamo.reset()
    gc.collect()
    assert runtime.current().graphs.live_graphs == before


def test_default_device_does_not_leak_into_the_executor() -> None:
    layer = vendor_layer(64, 32, offset=True)
    x = values(4, 64).npu()
    run = compiled(layer)
    with torch.device("npu"):
        out = run(x)
    assert_golden(out, layer, x)


# ---- The executor by itself ----


def test_int4_goes_nowhere_unnoticed() -> None:
    packed = torch.zeros(2, 1, dtype=I32)
    (int4,) = executor.run_op(executor.find_op("Bitcast"), {"x": packed}, {"type": 29})
    assert isinstance(int4, executor.Int4)
    assert int4.shape == (2, 1, 8)
    with pytest.raises(executor.GraphError, match="Relu does not take int4"):
        executor.run_op(executor.find_op("Relu"), {"x": int4}, {})


def test_unknown_attribute_is_refused() -> None:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    graph = model.graph.add()
    node = graph.op.add(name="r", type="Relu")
    node.attr["slope"].f = 0.5
    graph.op.add(name="out", type="NetOutput", input=["r:0"]).input_desc.add()
    with pytest.raises(executor.GraphError, match=r"node r \(Relu\): attribute slope"):
        compiler.compile_graph(model.SerializeToString())


def test_missing_producer_is_refused() -> None:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    graph = model.graph.add()
    node = graph.op.add(name="r", type="Relu", input=["nowhere:0"])
    node.input_desc.add(name="x")
    graph.op.add(name="out", type="NetOutput", input=["r:0"]).input_desc.add()
    with pytest.raises(executor.GraphError, match="inputs of r are never computed"):
        compiler.compile_graph(model.SerializeToString())
