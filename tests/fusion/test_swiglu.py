"""SwiGLU between quantized layers, fused in graphs, beside a numpy golden of the fused operator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph.modules.fusion_options import FusionOptions, put_fusion
from support import golden_fused
from support.eager import BF16, F16, F32, I8
from support.fused import as_array
from support.fusing import MODES, Fused, run

MODE = pytest.mark.parametrize("mode", MODES)
M, K, H = 6, 64, 64
PRODUCT, SWIGLU = "lq_graph.linear_quant.default", "npu.npu_dequant_swiglu_quant.default"
QUANT, PLAIN = "npu.npu_dynamic_quant.default", "npu.npu_swiglu.default"
silu = torch.nn.functional.silu


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(n: int, k: int = K, seed: int = 1) -> Tensor:
    return torch.randint(-99, 99, (n, k), dtype=I8, generator=torch.Generator().manual_seed(seed))


def scales(n: int, seed: int = 2) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001


def mlp(
    x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None = None, cut: Any = None
) -> tuple[Tensor, Tensor]:
    """The quantized input of the down layer."""
    q, p = lq_graph.dynamic_quant(x.view(-1, K))
    out = lq_graph.linear_quant(q, w, s, None, p, bias, output_dtype=x.dtype)
    gate, up = (cut or by_split)(out)
    shape = (*x.shape[:-1], H)
    y = silu(gate.reshape(shape)) * up.reshape(shape)
    return lq_graph.dynamic_quant(y.view(-1, H))


def by_split(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = torch.split(x, [H, H], -1)
    return gate, up


def by_two_splits(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.split(x, [H, H], -1)[0], torch.split(x, [H, H], -1)[1]


def by_chunk(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, -1)
    return gate, up


def by_slices(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :H], x[:, H:]


def by_narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.narrow(1, 0, H), x.narrow(1, H, H)


def second_half_activated(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, H:], x[:, :H]


CUTS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    one.__name__: one
    for one in (
        by_split,
        by_two_splits,
        by_chunk,
        by_slices,
        by_narrow,
        second_half_activated,
    )
}


def golden(
    x: Tensor, w: Tensor, s: Tensor, bias: Tensor | None = None, *, left: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """As DequantSwigluQuant's document says: float32 until the quantization."""
    rows = as_array(x).reshape(-1, K)
    q, p = golden_fused.quantize_rows(rows, 127, "reciprocal")
    total = q.astype(np.int64) @ w.numpy().astype(np.int64).T
    value = golden_fused.dequantized(total, s.float().numpy(), p, as_array(bias))
    y = golden_fused.swiglu(value, left=left)
    return golden_fused.quantize_rows(y, 127, "step")


def assert_close(got: tuple[Tensor, Tensor], want: tuple[np.ndarray, np.ndarray]) -> None:
    """The integers differ where a value is on the edge of two: by one, and rarely."""
    difference = np.abs(got[0].numpy().astype(int) - want[0].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    assert len(np.unique(want[0])) > 20
    np.testing.assert_allclose(got[1].numpy().ravel(), want[1].ravel(), rtol=1e-5)


@MODE
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_int32_product_and_one_kernel(dtype: torch.dtype, dynamic: bool, mode: str) -> None:
    x, w, s = normal(2, 3, K, dtype=dtype), weight(2 * H), scales(2 * H)
    fused = run(mlp, mode, x, w, s, dynamic=dynamic)
    assert fused.kernels == [QUANT, PRODUCT, SWIGLU]
    assert fused.report.done("swiglu") == 1 and not fused.reasons("swiglu")
    assert_close(fused.results, golden(x, w, s))


@pytest.mark.parametrize("cut", CUTS)
def test_every_way_to_take_the_halves(cut: str) -> None:
    x, w, s = normal(M, K, dtype=F16), weight(2 * H), scales(2 * H)
    fused = run(lambda *args: mlp(*args, cut=CUTS[cut]), "GE", x, w, s)
    assert fused.kernels == [QUANT, PRODUCT, SWIGLU]
    assert_close(fused.results, golden(x, w, s, left=cut != "second_half_activated"))


@MODE
def test_int32_bias_and_bfloat16_scale(mode: str) -> None:
    x, w, s = normal(M, K, dtype=BF16), weight(2 * H), scales(2 * H).to(BF16)
    bias = torch.randint(-5000, 5000, (2 * H,), generator=torch.Generator().manual_seed(3)).int()
    fused = run(mlp, mode, x, w, s, bias)
    assert fused.kernels == [QUANT, PRODUCT, "aten._to_copy.default", SWIGLU]
    assert_close(fused.results, golden(x, w, s, bias))


# ---- near misses ----


def parts(x: Tensor, w: Tensor, s: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    q, p = lq_graph.dynamic_quant(x)
    out = lq_graph.linear_quant(q, w, s, None, p, output_dtype=x.dtype, **options)
    return out[:, :H], out[:, H:]


def two_products(x: Tensor, w: Tensor, s: Tensor) -> Any:
    q, p = lq_graph.dynamic_quant(x)
    gate, up = (
        lq_graph.linear_quant(q, w[i : i + H], s[i : i + H], None, p, output_dtype=x.dtype)
        for i in (0, H)
    )
    return lq_graph.dynamic_quant(silu(gate) * up)


def silu_is_read(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    active = silu(gate)
    return *lq_graph.dynamic_quant(active * up), active


def result_is_read(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    y = silu(gate) * up
    return *lq_graph.dynamic_quant(y), y


def gate_is_read(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return *lq_graph.dynamic_quant(silu(gate) * up), gate + 1


def product_is_read(x: Tensor, w: Tensor, s: Tensor) -> Any:
    q, p = lq_graph.dynamic_quant(x)
    out = lq_graph.linear_quant(q, w, s, None, p, output_dtype=x.dtype)
    return *lq_graph.dynamic_quant(silu(out[:, :H]) * out[:, H:]), out.neg()


def other_parts(x: Tensor, w: Tensor, s: Tensor) -> Any:
    q, p = lq_graph.dynamic_quant(x)
    out = lq_graph.linear_quant(q, w, s, None, p, output_dtype=x.dtype)
    return lq_graph.dynamic_quant(silu(out[:, : H // 2]) * out[:, H : H + H // 2])


def int4_result(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return lq_graph.dynamic_quant(silu(gate) * up, dtype=torch.int32)


def static_result(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return lq_graph.static_quant(silu(gate) * up, s[:1].to(x.dtype) * 4000)


def float_bias(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s, bias=s.to(x.dtype))
    return lq_graph.dynamic_quant(silu(gate) * up)


def one_scale(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s[:1])
    return lq_graph.dynamic_quant(silu(gate) * up)


def packed_scale(x: Tensor, w: Tensor, s: Tensor) -> Any:
    q, _ = lq_graph.dynamic_quant(x)
    packed = lq_graph.trans_quant_param(s / 100)  # float16 holds the sums
    out = lq_graph.linear_quant(q, w, packed, output_dtype=F16)
    return lq_graph.dynamic_quant(silu(out[:, :H]) * out[:, H:])


def gelu(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return lq_graph.dynamic_quant(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def broadcast(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return silu(gate)[None] * up[:, None]


def second_half(x: Tensor, w: Tensor, s: Tensor) -> Any:
    gate, up = parts(x, w, s)
    return gate * silu(up)


OWN = "; its quantization is a kernel of its own"
# what is left, the reason, and whether silu(gate) * up is one kernel
NEAR: dict[Callable[..., Any], tuple[str, bool]] = {
    two_products: ("gate and up are two products: lq_graph.merge makes them one", False),
    silu_is_read: ("silu(gate) has another reader", False),
    result_is_read: ("silu(gate) * up has another reader" + OWN, True),
    gate_is_read: ("gate or up has another reader" + OWN, True),
    product_is_read: ("the product has another reader" + OWN, True),
    other_parts: ("gate and up are not the halves of one tensor", False),
    int4_result: ("it is quantized to int4; DequantSwigluQuant has int8" + OWN, True),
    static_result: ("static_quant has 1 / scale in the dtype of x", True),
    float_bias: ("the product has a float16 bias; an int32 product takes int32" + OWN, True),
    one_scale: ("the product has one scale for all channels", True),
    packed_scale: ("the product's scale is packed; weight_scale is float32" + OWN, True),
    gelu: ("its activation is gelu; the operators have silu", False),
    broadcast: ("gate and up have other shapes", False),
    second_half: ("its second half is activated; SwiGlu activates the first", False),
}


@pytest.mark.parametrize("case", NEAR, ids=lambda case: case.__name__)
def test_near_misses_are_left_with_the_reason(case: Callable[..., Any]) -> None:
    why, one_kernel = NEAR[case]
    x, w, s = normal(M, K, dtype=F16), weight(2 * H), scales(2 * H)
    fused = run(case, "GE", x, w, s)
    (reason,) = fused.reasons("swiglu")
    assert reason.startswith(why)
    assert SWIGLU not in fused.kernels
    assert (PLAIN in fused.kernels) == one_kernel == (fused.report.done("swiglu") == 1)
    assert_near(fused, case(x, w, s))


def assert_near(fused: Fused, plain: Any, rows: float = 0.01) -> None:
    """Beside the unfused numbers: integers are one apart, floats a rounding or two."""
    plain = plain if isinstance(plain, tuple) else (plain,)
    results = fused.results if isinstance(fused.results, tuple) else (fused.results,)
    for got, want in zip(results, plain, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        if got.dtype == I8:
            assert (got.int() - want.int()).abs().max() <= 1
        elif got.dtype != torch.int32:  # int4 values in pairs of four
            scale = want.float().abs().max()
            assert (got.float() - want.float()).abs().max() <= rows * scale


# ---- without a quantization ----


@MODE
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_plain_swiglu_is_one_kernel(dtype: torch.dtype, mode: str) -> None:
    x = normal(2, M, 2 * H, dtype=dtype)
    w, s = weight(8), scales(8)

    def plain(x: Tensor, w: Tensor, s: Tensor) -> Any:
        q, p = lq_graph.dynamic_quant(x[0, :, :K].contiguous())  # our operator, by the side
        gate, up = x.chunk(2, -1)
        return up * silu(gate), lq_graph.linear_quant(q, w, s, None, p, output_dtype=x.dtype)

    fused = run(plain, mode, x, w, s)
    assert PLAIN in fused.kernels and "aten.silu.default" not in fused.kernels
    want = golden_fused.swiglu(as_array(x))
    close = {F16: 1e-3, BF16: 8e-3}[dtype]  # one rounding
    np.testing.assert_allclose(as_array(fused.results[0]), want, rtol=close, atol=1e-7)


def test_exact_leaves_the_pieces() -> None:
    x, w, s = normal(M, K, dtype=F16), weight(2 * H), scales(2 * H)
    put_fusion(FusionOptions(exact=True))
    try:
        fused = run(mlp, "GE", x, w, s)
    finally:
        put_fusion(None)
    assert SWIGLU not in fused.kernels and PLAIN not in fused.kernels
    for got, want in zip(fused.results, mlp(x, w, s), strict=True):
        assert torch.equal(got, want)


# ---- random graphs ----


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_are_near_the_unfused(seed: int) -> None:
    """Blocks whose halves, order and readers are random: the numbers stay near."""
    choose = random.Random(seed)
    blocks = [
        (choose.choice(list(CUTS.values())), choose.random() < 0.5, choose.random() < 0.3)
        for _ in range(3)
    ]

    def graph(x: Tensor, w: Tensor, s: Tensor) -> Any:
        kept = []
        for cut, swapped, is_read in blocks:
            q, p = lq_graph.dynamic_quant(x)
            gate, up = cut(lq_graph.linear_quant(q, w, s, None, p, output_dtype=x.dtype))
            y = up * silu(gate) if swapped else silu(gate) * up
            q, p = lq_graph.dynamic_quant(y)
            x = x + lq_graph.linear_quant(q, w[:K], s[:K], None, p, output_dtype=x.dtype)
            kept += [y] if is_read else []
        return x, *kept

    x, w, s = normal(M, K, dtype=F16), weight(2 * H), scales(2 * H) / 4
    fused = run(graph, choose.choice(MODES), x, w, s)
    assert fused.report.done("swiglu") == len(blocks) or any(b[2] for b in blocks)
    assert_near(fused, graph(x, w, s), rows=0.03)
