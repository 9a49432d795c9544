"""A fused kernel is nearer to the true values than the pieces that it replaces.

The truth is numpy in float64. Where the result is quantized, what counts is how many of its
integers are not those of the true values: pieces that are rounded in between miss some, and the
fused kernel hardly any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph.modules.fusion_options import FusionOptions, fusion
from support.fusing import MODES, run

F16, BF16, F32, I8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
M, K, H, EPSILON = 64, 256, 128, 1e-6
silu = torch.nn.functional.silu


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ints(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-99, 99, shape, dtype=I8, generator=torch.Generator().manual_seed(seed))


def product(x1: Tensor, weight: Tensor) -> Tensor:
    """Our operator, by the side: graphs without one are not fused."""
    return lq_graph.linear_quant(x1, weight, torch.ones(1, device=x1.device), output_dtype=BF16)


# ---- what is fused: as models write it, its inputs, and the truth ----


def norm(x1: Tensor, x2: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
    total = x1 + x2
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
    q, _ = lq_graph.dynamic_quant(w * wide.to(total.dtype))
    return q, total, product(a, b)


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    rows = (normal(M, K, dtype=dtype, seed=seed) for seed in (0, 1))
    return [*rows, (normal(K, seed=2) * 0.2 + 1).to(dtype), ints(4, K), ints(8, K)]


def true_norm(x1: np.ndarray, x2: np.ndarray, w: np.ndarray, *_: np.ndarray) -> np.ndarray:
    total = x1 + x2
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * w


def gated(x: Tensor, p: Tensor, w: Tensor, s: Tensor, like: Tensor) -> Any:
    out = lq_graph.linear_quant(x, w, s, None, p, None, output_dtype=like.dtype)
    gate, up = torch.split(out, [H, H], -1)
    return lq_graph.dynamic_quant(silu(gate) * up)


def gated_inputs(dtype: torch.dtype) -> list[Tensor]:
    step = normal(M, seed=3).abs() * 1e-2 + 1e-3
    scale = normal(2 * H, seed=4).abs() * 1e-2 + 1e-3
    return [ints(M, K), step, ints(2 * H, K, seed=2), scale, torch.empty(0, dtype=dtype)]


def true_gated(
    x: np.ndarray, p: np.ndarray, w: np.ndarray, s: np.ndarray, *_: np.ndarray
) -> np.ndarray:
    value = (x @ w.T) * p[:, None] * s
    gate, up = value[:, :H], value[:, H:]
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


class Case(NamedTuple):
    function: Callable[..., Any]
    inputs: Callable[[torch.dtype], list[Tensor]]
    truth: Callable[..., np.ndarray]


CASES = {
    "add_rms_norm_dynamic_quant": Case(norm, norm_inputs, true_norm),
    "swiglu": Case(gated, gated_inputs, true_gated),
}


def missed(integers: Tensor, truth: np.ndarray) -> float:
    """The share of integers that are not those of the true values."""
    step = np.abs(truth).max(-1, keepdims=True) / 127
    return float((integers.numpy() != np.rint(truth / step)).mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_integers(name: str, dtype: torch.dtype, mode: str) -> None:
    case = CASES[name]
    inputs = case.inputs(dtype)
    truth = case.truth(*(x.double().numpy() for x in inputs))
    shares = []
    for options in (FusionOptions(exact=True), FusionOptions()):
        with fusion(options):
            found = run(case.function, mode, *inputs)
        assert found.report.done(name) == (not options.exact)
        shares.append(missed(found.results[0], truth))
    pieces, fused = shares
    assert fused < 0.002 < pieces, shares


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rotary_embedding(mode: str, dtype: torch.dtype) -> None:
    """In float16, npu_apply_rotary_pos_emb rounds as the pieces do."""
    b, s, heads, d = 2, 16, 4, 64
    angles = normal(b, s, d // 2, seed=3).repeat(1, 1, 2)
    inputs = [
        normal(b, s, heads, d, dtype=dtype), normal(b, s, heads, d, dtype=dtype, seed=1),
        angles.cos().to(dtype), angles.sin().to(dtype), ints(4, K), ints(8, K),
    ]  # fmt: skip

    def turned(x: Tensor) -> Tensor:
        return torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, a: Tensor, b: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        each = [(x * cos) + (turned(x) * sin) for x in (q.transpose(1, 2), k.transpose(1, 2))]
        return *each, product(a, b)

    truth = rotated(*(x.double() for x in inputs[:4]), *inputs[4:])[:2]
    errors = []
    for options in (FusionOptions(exact=True), FusionOptions()):
        with fusion(options):
            found = run(rotated, mode, *inputs)
        assert bool(found.report.done("rope")) == (not options.exact)
        pairs = zip(found.results[:2], truth, strict=True)
        errors.append(sum(float((got.double() - want).abs().mean()) for got, want in pairs))
    pieces, fused = errors
    if mode == "GE" and dtype == F16:
        assert fused == pieces
    else:
        assert fused < 0.9 * pieces
