"""Static layers in graphs: the operator before a layer quantizes for it. Numbers beside the numpy
golden, and kernels beside those of dynamic layers.

The values of the norm's inputs are multiples of 1/8 and k is a power of two, so no sum of squares
rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchair
from torch import Tensor, nn

import cann_host
import lq_graph
from lq_graph import converters
from lq_graph.modules.fusion_options import FusionOptions, put_fusion
from support import golden_fused
from support.eager import BF16, F16, F32, I8
from support.fused import K, as_array, assert_bits, exact, norm_of
from support.fusing import MODES, run
from support.has import need_converter, need_operator
from support.static_models import H, Mlp, Projections, inputs_of, layers_of, model_of, prepared

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.filterwarnings("ignore"),
]
EACH_MODE = pytest.mark.parametrize("mode", MODES)
EACH_DTYPE = pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
HELD = ("_scale_reciprocal", "_offset", "_scale", "_zero_point", "_reciprocals", "_zero_points")
NORM_QUANT, PRODUCT = "npu.npu_add_rms_norm_quant.default", "lq_graph.linear_quant.default"
SWIGLU, QUANT = "npu.npu_dequant_swiglu_quant.default", "lq_graph.static_quant.default"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    need_operator("npu_add_rms_norm_quant", "div_mode")
    need_operator("npu_dequant_swiglu_quant")
    need_converter("npu_dequant_swiglu_quant")
    torch.npu.config.allow_internal_format = True
    yield
    put_fusion(None)


# ---- the golden ----


def quantized(y: np.ndarray, layer: Any) -> np.ndarray:
    """int8, by 1 / scale in the dtype of x."""
    dtype = str(layer.input_dtype).removeprefix("torch.")
    scale = golden_fused.rounded(np.float32(1) / as_array(layer.input_scale), dtype)
    return golden_fused.quantize(y, scale, as_array(layer.input_offset), divides=False)


def total_of(x: np.ndarray, layer: Any) -> np.ndarray:
    """The int32 product with its bias."""
    linear = layer.linear
    total = x.astype(np.int64) @ linear.weight.numpy().astype(np.int64).T
    return total if linear.bias is None else total + linear.bias.numpy()


def output_of(x: np.ndarray, layer: Any) -> np.ndarray:
    """The float output of an int8 input."""
    value = total_of(x, layer).astype(np.float32) * as_array(layer.linear.scale)
    return golden_fused.rounded(value, str(layer.input_dtype).removeprefix("torch."))


def hidden_of(x: Tensor, model: Any) -> np.ndarray:
    """int8: the input of the last layer, as DequantSwigluQuant computes it."""
    rows = quantized(as_array(x).reshape(-1, K), model.gate)
    halves = [
        golden_fused.dequantized(total_of(rows, layer), as_array(layer.linear.scale))
        for layer in (model.gate, model.up)
    ]
    y = golden_fused.swiglu(np.concatenate(halves, -1))
    return quantized(y, model.down)


# ---- numbers and kernels ----


@EACH_MODE
@EACH_DTYPE
@pytest.mark.parametrize(("symmetric", "bias"), [(False, False), (True, True)])
def test_the_norm_quantizes(symmetric: bool, bias: bool, dtype: torch.dtype, mode: str) -> None:
    plain, model = model_of(Projections, dtype, symmetric=symmetric, bias=bias)
    x, residual = inputs_of(dtype)
    fused = run(model, mode, x, residual)
    assert fused.kernels == [NORM_QUANT, PRODUCT, "aten.cat.default"]
    assert not fused.reasons("add_rms_norm_quant")
    # float16: the roundings of AddRmsNorm. bfloat16: none before the quantization
    want, _, total = norm_of(x, residual, plain.weight, "tnp" if dtype == F16 else "")
    rows = quantized(want.reshape(-1, K), plain.q)
    got = fused.results[0].flatten(0, 1)
    assert_bits(got, np.hstack([output_of(rows, layer) for layer in layers_of(plain)]))
    assert_bits(fused.results[1], total)
    assert len(np.unique(rows)) > 50


@EACH_MODE
@pytest.mark.parametrize(("symmetric", "dtype"), [(False, F16), (True, BF16)])
def test_the_swiglu_quantizes(symmetric: bool, dtype: torch.dtype, mode: str) -> None:
    plain, model = model_of(Mlp, dtype, symmetric=symmetric)
    x, _ = inputs_of(dtype)
    fused = run(model, mode, x)
    assert fused.kernels == [QUANT, PRODUCT, SWIGLU, PRODUCT]
    assert fused.report.done("swiglu") == 1 and not fused.reasons("swiglu")
    # silu's last bit differs from numpy's: integers may be one apart at the edge of two
    rows, weight = hidden_of(x, plain), plain.down.linear.weight.numpy().astype(np.int64)
    most = np.abs(weight).max() * as_array(plain.down.linear.scale)
    got = as_array(fused.results).reshape(-1, K)
    difference = np.abs(got - output_of(rows, plain.down)) / most
    assert difference.max() <= 2.01 and (difference > 0.5).mean() < 0.02
    assert len(np.unique(rows)) > 50


@EACH_DTYPE
def test_one_quantization_of_a_swiglu(dtype: torch.dtype) -> None:
    """The integers themselves, and a product whose scale is packed."""
    plain, model = model_of(Mlp, dtype)
    model.down.linear = nn.Identity()  # returns what it is given
    model.down.linear.in_features, model.down.linear.weight_dtype = H, I8
    x, _ = inputs_of(dtype)
    fused = run(model, "GE", x)
    assert model.gate.linear.merged.scale.dtype == (torch.int64 if dtype == F16 else F32)
    assert fused.kernels == [QUANT, PRODUCT, SWIGLU]
    want = hidden_of(x, plain)
    difference = np.abs(fused.results.numpy().reshape(want.shape).astype(int) - want)
    assert fused.results.dtype == I8 and difference.max() <= 1 and (difference > 0).mean() < 0.01


@EACH_MODE
def test_two_scales_are_two_results(mode: str) -> None:
    """q and v have one scale, k another: they are not merged, and the norm quantizes twice."""
    plain, _ = model_of(Projections, F16)
    plain.k.input_scale, plain.k.input_offset = plain.k.input_scale * 2, plain.k.input_offset + 3
    x, residual = inputs_of(F16)
    model = prepared(plain, False, (x, residual))
    fused = run(model, mode, x, residual)
    assert fused.kernels == [NORM_QUANT, PRODUCT, PRODUCT, PRODUCT, "aten.cat.default"]
    want = norm_of(x, residual, plain.weight, "tnp")[0].reshape(-1, K)
    outputs = [output_of(quantized(want, layer), layer) for layer in layers_of(plain)]
    assert_bits(fused.results[0].flatten(0, 1), np.hstack(outputs))


def test_three_scales_are_left_with_the_reason() -> None:
    plain, _ = model_of(Projections, F16)
    for factor, layer in enumerate(layers_of(plain), 1):
        layer.input_scale = layer.input_scale * factor
    x, residual = inputs_of(F16)
    fused = run(prepared(plain, True, (x, residual)), "GE", x, residual)
    assert fused.names.count(QUANT) == 3
    (why,) = fused.reasons("add_rms_norm_quant")
    assert why == "3 quantizations with scales of their own"


@EACH_MODE
@pytest.mark.parametrize("kind", [Projections, Mlp])
def test_exact_changes_no_bit(kind: Any, mode: str) -> None:
    plain, model = model_of(kind, F16, bias=True)
    inputs = inputs_of(F16)[: 1 if kind is Mlp else 2]
    put_fusion(FusionOptions(exact=True))
    fused = run(model, mode, *inputs)
    assert fused.names.count(QUANT) == (2 if kind is Mlp else 1)
    got, want = fused.results, plain(*inputs)
    for one, other in zip(*([r] if kind is Mlp else r for r in (got, want)), strict=True):
        assert torch.equal(one, other)


# ---- what the layers hold ----


@EACH_DTYPE
def test_forms_of_a_quantizer(dtype: torch.dtype) -> None:
    plain, _ = model_of(Projections, dtype)
    name = str(dtype).removeprefix("torch.")

    def check(layer: Any) -> None:
        reciprocal = golden_fused.rounded(np.float32(1) / as_array(layer.input_scale), name)
        assert_bits(layer._scale_reciprocal, reciprocal)
        assert_bits(layer._scale, np.float32(1) / reciprocal)
        assert_bits(layer._zero_point, as_array(layer.input_offset))
        assert_bits(layer._reciprocals, np.repeat(reciprocal, K))
        points = np.repeat(as_array(layer.input_offset), K)
        np.testing.assert_array_equal(layer._zero_points.float().numpy(), points)
        kinds = layer._reciprocals.dtype, layer._zero_points.dtype
        assert kinds == ((F32, torch.int32) if dtype == F16 else (BF16, BF16))
        assert layer._scale.dtype == layer._zero_point.dtype == F32

    check(plain.q)
    names = set(plain.state_dict())
    for change in (
        lambda layer: layer.half(),
        lambda layer: layer.npu().cpu(),
        lambda layer: setattr(layer, "input_offset", layer.input_offset - 5),
        lambda layer: layer.input_scale.mul_(3) and layer(torch.zeros(1, K, dtype=dtype)),
        lambda layer: layer.load_state_dict({"input_scale": torch.ones(1) / 64}, strict=False),
        copy.deepcopy,
    ):
        change(plain.q)
        check(plain.q)
    assert set(plain.state_dict()) == names and not any("._" in one for one in names)


def test_layers_with_equal_scales_hold_one_tensor() -> None:
    plain, _ = model_of(Projections, F16)

    def held() -> list[int]:
        return [len({id(getattr(each, name)) for each in layers_of(plain)}) for name in HELD]

    assert held() == [1] * 6
    plain.npu()
    assert held() == [1] * 6
    plain.k.input_scale = plain.k.input_scale * 2
    assert held() == [2, 1, 2, 1, 2, 1]
    plain.k.load_state_dict({"input_scale": plain.q.input_scale.cpu()}, strict=False)
    assert held() == [1] * 6


def test_the_unpacked_scale_follows_the_packed() -> None:
    plain, model = model_of(Mlp, F16)
    merged = model.gate.linear.merged

    def check() -> None:
        words = merged.scale.cpu().numpy().view(np.uint32)[::2]  # the low halves
        assert_bits(merged._unpacked_scale.cpu(), words.view(np.float32))

    check()
    memory = merged._unpacked_scale.data_ptr()
    state = plain.state_dict()
    state["up.linear.scale"] = state["up.linear.scale"] * 1.7
    model.load_state_dict(state)
    check()
    assert merged._unpacked_scale.data_ptr() == memory  # that a captured graph reads
    merged.scale = nn.Parameter(lq_graph.trans_quant_param(torch.rand(2 * H).npu()), False)
    check()
    model.cpu()
    check()
    merged.scale = nn.Parameter(torch.ones(2 * H), False)
    assert merged._unpacked_scale is None and not any("_unpacked" in n for n in model.state_dict())


@EACH_MODE
def test_a_compiled_graph_reads_a_loaded_scale(mode: str) -> None:
    plain, model = model_of(Mlp, F16)
    x, _ = inputs_of(F16)
    torch._dynamo.reset()
    backend: Any = torchair.get_npu_backend() if mode == "GE" else mode
    step = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with torch.no_grad():
        before = step(x.npu()).cpu()
        state = plain.state_dict()
        for name in ("gate.linear.scale", "up.linear.scale", "down.input_scale"):
            state[name] = state[name] * 1.5
        plain.load_state_dict(state)
        model.load_state_dict(state)
        after, want = step(x.npu()).cpu(), plain(x)
    scale = float(want.abs().max())
    assert (after - want).abs().max() < 0.02 * scale < (after - before).abs().max()


def test_an_exported_program_has_no_forms() -> None:
    plain, _ = model_of(Projections, F16)
    program = torch.export.export(plain, inputs_of(F16))
    calls = [node for node in program.graph.nodes if "quant" in str(node.target)]
    assert len(calls) == 6 and not any(
        key in node.kwargs for node in calls for key in ("scale", "float_scale", "reciprocals")
    )


# ---- near misses ----


def test_a_scale_that_the_graph_would_pack_is_left() -> None:
    """It has more bits than the packed one, so the fused numbers would be other ones."""
    plain, _ = model_of(Mlp, F16)
    for layer in (plain.gate, plain.up):
        layer.linear.scale.data.mul_(1.0001)
    x, _ = inputs_of(F16)
    model = copy.deepcopy(plain).npu()
    lq_graph.merge(model, x.npu())
    fused = run(model, "GE", x)
    (why,) = fused.reasons("swiglu")
    assert why.startswith("the product's scale is packed in the graph")
    near = plain(x).float()
    assert (fused.results.float() - near).abs().max() < 0.02 * near.abs().max()


def test_forms_that_do_not_fit() -> None:
    x, w = exact(4, K, dtype=F16), torch.ones(2 * H, K, dtype=I8)
    r, one = torch.full((1,), 16.0), torch.ones(2 * H)

    def layer(x: Tensor, w: Tensor, one: Tensor, r: Tensor, scale: Tensor) -> Any:
        q, p = lq_graph.dynamic_quant(x)
        gate, up = lq_graph.linear_quant(q, w, one, None, p, output_dtype=F16).chunk(2, -1)
        y = nn.functional.silu(gate) * up
        points = torch.zeros_like(scale)
        static_quant = torch.ops.lq_graph.static_quant.default
        return static_quant(y, r.to(F16), scale=scale, zero_point=points)

    for scale in (r.reciprocal().half(), r.reciprocal().expand(H).contiguous()):
        fused = run(layer, "GE", x, w, one, r, scale)
        (why,) = fused.reasons("swiglu")
        assert why.startswith(
            "its quantization's scale and zero_point are not float32 of one value"
        )
        assert SWIGLU not in fused.kernels


# ---- a model ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "mode"), [(F16, "GE"), (F16, "npugraph_ex"), (BF16, "npugraph_ex")]
)
def test_a_llama_has_no_more_kernels_than_with_dynamic_layers(
    dtype: torch.dtype, mode: str
) -> None:
    transformers = pytest.importorskip("transformers")
    from lq_graph.integrations.transformers import StaticCache

    sizes = dict(
        hidden_size=64,
        intermediate_size=H,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=128,
    )
    tokens = torch.randint(3, 128, (1, 5), generator=torch.Generator().manual_seed(1))

    def counted(scheme: Any, *calibration: Any) -> int:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, attn_implementation="lq_graph")
        model = transformers.LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
        lq_graph.quantize(model, scheme, *calibration)
        model = model.npu()
        lq_graph.merge(model, tokens.npu())
        lq_graph.use_internal_format_weight(model)
        cache = StaticCache(config, 64)

        def step(token: Tensor) -> Tensor:
            logits: Tensor = model(token, past_key_values=cache, use_cache=True).logits
            return logits

        with torch.no_grad():
            step(tokens.npu())
            want = step(tokens[:, :1].npu())
            cache.reset()
            step(tokens.npu())
            names, got = kernels_of(step, mode, tokens[:, :1])
        near = nn.functional.cosine_similarity(got.float().flatten(), want.float().flatten(), 0)
        assert near > 0.999
        return len(names)

    assert counted(lq_graph.A8W8Static(), [tokens]) <= counted(lq_graph.A8W8Dynamic())


def kernels_of(step: Any, mode: str, token: Tensor) -> tuple[list[str], Tensor]:
    """The kernels of a compiled step, and its result."""
    if mode != "GE":
        fused = run(step, mode, token)
        return fused.kernels, fused.results.npu()
    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    compiled = torch.compile(
        step,
        backend=torchair.get_npu_backend(compiler_config=config),
        dynamic=False,
        fullgraph=True,
    )
    with converters.graph.capture(config) as graphs:
        result = compiled(token.npu())
    (graph,) = graphs
    return [node.op for node in graph.launches], result
