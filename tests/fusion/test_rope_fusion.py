"""Rotary embedding in pieces, fused in graphs, beside a numpy golden of the fused operators."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph.fusion.editor import CAPTURED, GE
from lq_graph.fusion.rope_rules import (
    HALF,
    INTERLEAVE,
    Rotated,
    why_not_apply_rotary,
    why_not_rotary_mul,
)
from lq_graph.rules.tables import PRODUCTS
from support import golden_rope
from support.eager import BF16, F16, F32, I8
from support.fused import as_array, dtype_of
from support.fusing import MODES, Fused, run

MODE = pytest.mark.parametrize("mode", MODES)
APPLY, MUL = "npu.npu_apply_rotary_pos_emb.default", "npu.npu_rotary_mul.default"
PRODUCT = "lq_graph.linear_quant.default"
B, S, HEADS, KV_HEADS, D = 2, 3, 4, 2, 64


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(dtype: torch.dtype = F16, b: int = B, s: int = S, d: int = D) -> list[Tensor]:
    """query and key (B, S, N, D), cos and sin (B, S, D), x1 and weight of a quantized product."""
    angles = normal(b, s, d // 2, seed=3)
    angles = torch.cat((angles, angles), -1)
    x1 = torch.ones(2, 32, dtype=I8)
    return [
        normal(b, s, HEADS, d, dtype=dtype),
        normal(b, s, KV_HEADS, d, dtype=dtype, seed=1),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        x1,
        x1.clone(),
    ]


def product(x1: Tensor, weight: Tensor) -> Tensor:
    """Our operator, by the side: graphs without one are not fused."""
    return lq_graph.linear_quant(x1, weight, torch.ones(1, device=x1.device), output_dtype=BF16)


def halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, turn: Callable[[Tensor], Tensor] = halves
) -> Tensor:
    return (x * cos) + (turn(x) * sin)


def llama(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
    """As transformers writes it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin), product(x1, w)


def bsnd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
    """Without transposes, the operands the other way round, and chunk."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = [(sin * chunks(x)) + (cos * x) for x in (q, k)]
    return *(x.transpose(1, 2) for x in turned), product(x1, w)


def reshaped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
    """cos and sin get their dims by a reshape."""
    b, s, d = cos.shape
    cos, sin = cos.view(b, 1, s, d), sin.view(b, 1, s, d)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return rotate(q, cos, sin), rotate(k, cos, sin), product(x1, w)


FORMS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "bsnd": bsnd,
    "reshaped": reshaped,
}


def golden(x: Tensor, cos: Tensor, sin: Tensor, operator: str, mode: str = HALF) -> np.ndarray:
    """The fused operator on (B, S, N, D), then with S and N the other way round."""
    x_, cos_, sin_ = as_array(x), as_array(cos)[:, :, None], as_array(sin)[:, :, None]
    if operator == APPLY:
        out = golden_rope.apply_rotary(x_, cos_, sin_, "BSND", mode, dtype_of(x), "A2")
    else:
        out = golden_rope.rotary(x_, cos_, sin_, mode, dtype_of(x))
    return np.swapaxes(out, 1, 2)


def assert_golden(fused: Fused, inputs: list[Tensor], operator: str, mode: str = HALF) -> None:
    cos, sin = inputs[2:4]
    for got, x in zip(fused.results[:2], inputs[:2], strict=True):
        want = golden(x, cos, sin, operator, mode)
        assert got.dtype == x.dtype and tuple(got.shape) == want.shape
        np.testing.assert_array_equal(as_array(got), want)


@MODE
@pytest.mark.parametrize("steps", [1, S], ids=["decode", "prefill"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_query_and_key(dtype: torch.dtype, steps: int, mode: str) -> None:
    inputs = tensors(dtype, s=steps)
    fused = run(llama, mode, *inputs)
    operators = [APPLY] if mode == "GE" else [MUL, MUL]
    assert fused.kernels.count(PRODUCT) == 1
    assert [name for name in fused.kernels if "npu" in name] == operators
    assert not any(name.startswith(("aten.mul", "aten.cat", "aten.neg")) for name in fused.kernels)
    assert fused.report.done("rope") == len(operators)
    assert_golden(fused, inputs, operators[0])


@MODE
@pytest.mark.parametrize("form", FORMS)
def test_ways_to_write_it(form: str, mode: str) -> None:
    inputs = tensors()
    fused = run(FORMS[form], mode, *inputs)
    operators = [APPLY] if mode == "GE" else [MUL, MUL]
    assert [name for name in fused.kernels if "npu" in name] == operators
    assert_golden(fused, inputs, operators[0])


class Heads(torch.nn.Module):
    """N and D are known from parameters."""

    def __init__(self) -> None:
        super().__init__()
        query, key, x1 = normal(HEADS, D), normal(KV_HEADS, D), torch.ones(2, 32, dtype=I8)
        self.query, self.key, self.x1 = (
            torch.nn.Parameter(one, requires_grad=False) for one in (query.half(), key.half(), x1)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = (x[..., None, None] * weight for weight in (self.query, self.key))
        angles = torch.cat((cos, cos), -1).view(*cos.shape[:2], D), sin.view(*sin.shape[:2], D)
        return llama(q, k, *angles, self.x1, self.x1)


@MODE
@pytest.mark.slow
def test_sizes_that_run_time_knows(mode: str) -> None:
    """B and S are symbols."""
    _, _, cos, sin, *_ = tensors()
    inputs = normal(B, S, dtype=F16), cos[..., : D // 2].contiguous(), sin
    plain = Heads()(*inputs)
    fused = run(Heads().npu(), mode, *inputs, dynamic=True)
    operators = [APPLY] if mode == "GE" else [MUL, MUL]
    assert [name for name in fused.kernels if "npu" in name] == operators
    for got, want in zip(fused.results[:2], plain[:2], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=4e-3)


def test_one_in_a_captured_graph_of_torchairs() -> None:
    inputs = tensors()
    fused = run(llama, "reduce-overhead", *inputs)
    assert [name for name in fused.kernels if "npu" in name] == [MUL, MUL]
    assert_golden(fused, inputs, MUL)


@pytest.mark.parametrize("mode", MODES)
def test_pairs_of_neighbours(mode: str) -> None:
    """GPT-J's, of one batch: npu_rotary_mul in captured graphs; RotaryMul of GE rotates halves."""

    def gptj(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rotate(q, cos, sin, pairs), rotate(k, cos, sin, pairs), product(x1, w)

    inputs = tensors(b=1)
    fused = run(gptj, mode, *inputs)
    if mode == "GE":
        assert APPLY not in fused.kernels and MUL not in fused.kernels
        assert "RotaryMul, which rotates halves only" in fused.reasons("rope")[-1]
        for got, want in zip(fused.results[:2], gptj(*inputs)[:2], strict=True):
            assert torch.equal(got, want)
    else:
        assert fused.kernels.count(MUL) == 2
        assert_golden(fused, inputs, MUL, INTERLEAVE)


@MODE
def test_part_of_a_head(mode: str) -> None:
    """GPT-NeoX's: half of each head rotates."""

    def neox(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        out = []
        for x in (q.transpose(1, 2), k.transpose(1, 2)):
            out.append(torch.cat((rotate(x[..., :32], cos, sin), x[..., 32:]), -1))
        return *out, product(x1, w)

    q, k, _, _, *others = tensors()
    _, _, cos, sin, *_ = tensors(d=32)
    fused = run(neox, mode, q, k, cos, sin, *others)
    assert fused.kernels.count(MUL) == (0 if mode == "GE" else 2)
    for got, x in zip(fused.results[:2], (q, k), strict=True):
        stepwise = mode == "GE"  # left in pieces
        turned = golden_rope.rotary(
            as_array(x)[..., :32],
            as_array(cos)[:, :, None],
            as_array(sin)[:, :, None],
            HALF,
            "float16",
            stepwise=stepwise,
        )
        want = np.concatenate((turned, as_array(x)[..., 32:]), -1).swapaxes(1, 2)
        np.testing.assert_array_equal(as_array(got), want)


@pytest.mark.parametrize("steps", [1, S])
def test_angles_for_all_batches(steps: int) -> None:
    """npu_apply_rotary_pos_emb takes none: they are repeated, once for all layers."""

    def graph(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        layers = [llama(q, k, cos, sin, x1, w)[:2] for q, k in ((q, k), (q / 2, k / 2))]
        return *layers[0], *layers[1], product(x1, w)

    q, k, cos, sin, *others = tensors(s=steps)
    cos, sin = cos[:1], sin[:1]
    fused = run(graph, "GE", q, k, cos, sin, *others)
    assert fused.kernels.count(APPLY) == 2 and MUL not in fused.kernels
    assert fused.names.count("aten.expand.default") == 2
    angles = cos.expand(B, -1, -1), sin.expand(B, -1, -1)
    halved = Fused(fused.results[2:], fused.names, fused.report)
    assert_golden(fused, [q, k, *angles], APPLY)
    assert_golden(halved, [q / 2, k / 2, *angles], APPLY)


def test_rotated_twice() -> None:
    def twice(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q = rotate(rotate(q.transpose(1, 2), cos, sin), cos, sin)
        return q, rotate(k.transpose(1, 2), cos, sin), product(x1, w)

    inputs = tensors()
    fused = run(twice, "GE", *inputs)
    assert fused.report.done("rope") >= 2
    for got, want in zip(fused.results, twice(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=4e-3)


# ---- query and key of one product ----


class Merged(torch.nn.Module):
    """One product for query, key and value, as `lq_graph.merge` makes it: a split for each."""

    def __init__(self, order: str, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = {"q": HEADS * D, "k": KV_HEADS * D, "v": KV_HEADS * D}
        self.order, self.sizes, self.dtype = order, [sizes[name] for name in order], dtype
        generator = torch.Generator().manual_seed(7)
        weight = torch.randint(-99, 99, (sum(self.sizes), 32), dtype=I8, generator=generator)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Parameter(torch.full((sum(self.sizes),), 0.002), requires_grad=False)

    def heads(self, x: Tensor) -> list[Tensor]:
        out = lq_graph.linear_quant(x.flatten(0, 1), self.weight, self.scale, output_dtype=BF16)
        found = []
        for name in "qkv":
            part = torch.split(out, self.sizes, -1)[self.order.index(name)]
            found.append(part.reshape(*x.shape[:2], -1, D))
        return found

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k, v = self.heads(x)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


@pytest.mark.parametrize(
    ("order", "mode", "batch", "steps", "operators"),
    [
        ("qkv", "npugraph_ex", 1, 1, [MUL]),
        ("vqk", "npugraph_ex", 1, 1, [MUL]),
        ("qvk", "npugraph_ex", 1, 1, [MUL, MUL]),
        ("kqv", "npugraph_ex", 1, 1, [MUL, MUL]),
        ("qkv", "npugraph_ex", B, 1, [MUL, MUL]),  # as one, the parts would have gaps
        ("qkv", "npugraph_ex", 1, S, [MUL, MUL]),
        ("qkv", "npugraph_ex", B, S, [MUL, MUL]),
        ("qkv", "GE", 1, 1, [APPLY]),
        ("qkv", "GE", B, S, [APPLY]),
    ],
)
def test_neighbours_in_one_product(
    order: str, mode: str, batch: int, steps: int, operators: list[str]
) -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randint(-99, 99, (batch, steps, 32), dtype=I8, generator=generator)
    _, _, cos, sin, *_ = tensors(BF16, b=batch, s=steps)
    model = Merged(order, BF16)
    q, k, v = model.heads(x)
    fused = run(model.npu(), mode, x, cos, sin)
    assert [name for name in fused.kernels if "npu" in name] == operators
    assert_golden(fused, [q.detach(), k.detach(), cos, sin], operators[0])
    assert torch.equal(fused.results[2], v)
    assert sum("split" in name for name in fused.names) == 1


# ---- near misses ----


def turned_back(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    return q * cos + torch.cat((q[..., half:], -q[..., :half]), -1) * sin


def unequal_parts(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos + torch.cat((-q[..., 16:], q[..., :16]), -1) * sin


def another_tensor(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q.neg() * cos + halves(q) * sin


def with_alpha(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(q * cos, halves(q) * sin, alpha=2)


def float32_angles(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos.float() + halves(q) * sin.float()


def other_sizes(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return q * cos + halves(q) * sin[:, :, :1]


def three_dims(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(q[0], cos[0], sin[0])


def one_angle(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(q, cos[..., :1], sin[..., :1])


NEAR: dict[Callable[..., Tensor], str] = {
    turned_back: "",
    unequal_parts: "",
    another_tensor: "",
    with_alpha: "",
    float32_angles: "x is float16, cos is float32, sin is float32",
    other_sizes: "cos and sin have other shapes",
    three_dims: "x has shape [4, 3, 64]; it must have 4 dims, more than cos",
    one_angle: "cos has 1 angles; D is 64",
}


@pytest.mark.parametrize("case", NEAR, ids=lambda case: case.__name__)
def test_near_misses_are_left(case: Callable[..., Tensor]) -> None:
    def graph(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        return case(q.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)), product(x1, w)

    inputs = tensors()
    fused = run(graph, "GE", *inputs)
    assert fused.report.done("rope") == 0
    assert fused.reasons("rope") == ([NEAR[case]] if NEAR[case] else [])
    assert torch.equal(fused.results[0], graph(*inputs)[0])


def test_query_read_before_key_is_there() -> None:
    """key is computed from the rotated query: they cannot be one."""

    def chained(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
        q = rotate(q, cos, sin)
        k = rotate(k + q[:, :, :KV_HEADS], cos, sin)
        return q, k, product(x1, w)

    inputs = tensors()
    fused = run(chained, "GE", *inputs)
    assert fused.reasons("rope")[0] == (
        "query and key are two kernels: the one is read before the other is there"
    )
    assert APPLY not in fused.kernels and fused.report.done("rope") == 2
    for got, want in zip(fused.results, chained(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=8e-3)


# ---- the rules ----

P310, P_A2, P_A3, P_950 = (
    next(p for p in PRODUCTS if p.key == k) for k in ("310P", "A2", "A3", "950")
)


def of(sizes: Any, cos: Any, heads: int = 2, dtype: torch.dtype = F16, mode: str = HALF) -> Rotated:
    return Rotated(sizes, cos, heads, dtype, mode)


PLAIN = of((2, 3, 8, 128), (2, 3, 1, 128))
KEY = of((2, 3, 2, 128), (2, 3, 1, 128))
APPLY_RULES: list[tuple[Rotated, Rotated, str, Any, str]] = [
    (PLAIN, KEY, GE, P_A2, ""),
    (PLAIN, KEY, GE, P_A3, ""),
    (PLAIN, KEY, GE, P_950, ""),
    (PLAIN, KEY, GE, P310, ""),
    (PLAIN, KEY, CAPTURED, P_A2, "writes into what it reads"),
    (PLAIN, KEY, "", P_A2, "writes into what it reads"),
    (PLAIN, of((2, 3, 2, 64), (2, 3, 1, 64)), GE, P_A2, "B, S and D must be the same"),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), of((2, 3, 2, 96), (2, 3, 1, 96)), GE, P_A2, "D is 96"),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), of((2, 3, 2, 96), (2, 3, 1, 96)), GE, P_950, ""),
    (of((2, 3, 8, 128), (1, 3, 1, 128)), KEY, GE, P_A2, "B must be the same"),
    (of((2, 3, 8, 128), (1, 3, 1, 128)), KEY, GE, P_950, ""),
    (of((2, 3, 8, 128), (2, 1, 1, 128)), KEY, GE, P_A2, "S must be the same"),
    (of((2, 8, 3, 128), (2, 1, 3, 128), 1), KEY, GE, P_A2, "takes BSND"),
    (of((2, 3, 8, 128), (2, 3, 8, 128)), KEY, GE, P_A2, "the same for all heads"),
    (of((2, 3, 8, 128), (2, 3, 1, 128), mode=INTERLEAVE), KEY, GE, P_A2, "rotates halves"),
    (of((2, 3, 250, 128), (2, 3, 1, 128)), of((2, 3, 6, 128), PLAIN.cos), GE, P_A2, "256 heads"),
    (of((2, 3, 160, 128), (2, 3, 1, 128)), KEY, GE, P_A2, "208,384 bytes of a vector core"),
    (of((2, 3, 8, 128), (2, 3, 1, 128), dtype=BF16), KEY, GE, P310, "rotates no bfloat16"),
]


@pytest.mark.parametrize(("query", "key", "graph", "chip", "why"), APPLY_RULES)
def test_what_apply_rotary_takes(
    query: Rotated, key: Rotated, graph: str, chip: Any, why: str
) -> None:
    got = why_not_apply_rotary(query, key, graph, chip)
    assert (why in got) if why else not got


MUL_RULES: list[tuple[Rotated, str, Any, str]] = [
    (PLAIN, GE, P_A2, ""),
    (PLAIN, CAPTURED, P_A2, ""),
    (PLAIN, "", P_A2, ""),
    (PLAIN, CAPTURED, P310, "no aclnn operator"),
    (PLAIN, GE, P310, ""),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), GE, P_A2, "D is 96; RotaryMul takes multiples of 64"),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), "", P_A2, "D is 96; RotaryMul takes multiples of 64"),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), CAPTURED, P_A2, ""),
    (of((2, 3, 8, 96), (2, 3, 1, 96)), GE, P_950, ""),
    (of((2, 3, 8, 896), (2, 3, 1, 896)), CAPTURED, P_A2, "below 896"),
    (of((2, 3, 8, 2048), (2, 3, 1, 2048)), GE, P_950, "it can be 1024"),
    (of((2, 3, 8, 33), (2, 3, 1, 33)), GE, P_A2, "it must be even"),
    (of((40, 3, 32, 128), (1, 3, 1, 128)), GE, P_A2, "one of cos can be for 1024"),
    (of((40, 3, 1000, 128), (40, 3, 1, 128)), CAPTURED, P_A2, "below 1000"),
    (of((2, 3, 8, 64), (2, 3, 1, 64), mode=INTERLEAVE), GE, P_A2, "rotates halves only"),
    (of((2, 3, 8, 64), (2, 3, 1, 64), mode=INTERLEAVE), GE, P_950, ""),
    (of((2, 3, 8, 64), (2, 3, 1, 64), mode=INTERLEAVE), CAPTURED, P_A2, "the same for all B"),
    (of((2, 3, 8, 64), (1, 3, 1, 64), mode=INTERLEAVE), CAPTURED, P_A2, ""),
    (of((2, 8, 3, 64), (1, 1, 3, 64), 1), CAPTURED, P_A2, "few steps"),
    (of((2, 8, 3, 64), (2, 1, 3, 64), 1), CAPTURED, P_A2, ""),
    (of((2, 3, 8, 64), (1, 1, 1, 64)), CAPTURED, P_A2, "computes nothing"),
    (of((2, 3, 8, 64), (3, 3, 1, 64)), GE, P_A2, "each size of cos must be that of x, or 1"),
]


@pytest.mark.parametrize(("one", "graph", "chip", "why"), MUL_RULES)
def test_what_rotary_mul_takes(one: Rotated, graph: str, chip: Any, why: str) -> None:
    got = why_not_rotary_mul(one, graph, chip)
    assert (why in got) if why else not got


# ---- random graphs ----


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_are_near_the_unfused(seed: int) -> None:
    """Layers with patterns and near-patterns, in a random order."""
    choose = random.Random(seed)
    kinds = [choose.choice(["both", "one", "near", "pairs", "late"]) for _ in range(3)]
    steps, batch = choose.choice([1, 3]), choose.choice([1, 2])

    def graph(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, x1: Tensor, w: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        for kind in kinds:
            turn = pairs if kind == "pairs" else halves
            if kind == "near":
                q, k = turned_back(q, cos, sin), rotate(k, cos, sin)
            elif kind == "late":
                q = rotate(q, cos, sin)
                k = rotate(k + q[:, :KV_HEADS], cos, sin)
            else:
                q = rotate(q, cos, sin, turn)
                k = k if kind == "one" else rotate(k, cos, sin, turn)
            q = q / 2
        return q, k, product(x1, w)

    inputs = tensors(b=batch, s=steps)
    fused = run(graph, choose.choice(MODES), *inputs)
    for got, want in zip(fused.results, graph(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=4e-3, atol=2e-2)
