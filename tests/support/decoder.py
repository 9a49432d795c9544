"""A small decoder in the style of the vendor's recipes: W8A8, a paged cache, fused operators.

Here are its sizes and weights, and the same decoder in plain torch on the CPU: every operator by
its definition, computed in float32, with one rounding where the fused operator returns bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VOCABULARY, HIDDEN, INTERMEDIATE = 64, 128, 256
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 2, 1, 128, 2
BLOCK, BLOCKS = 128, 4  # tokens of a block of the cache, and blocks; block 0 is nobody's
TABLE = (2, 3, 1)  # the blocks of the sequence, in its order
PROMPT = 130  # tokens: more than a block
TOKENS = 10  # to generate
EPSILON = 1e-6
SCALE = HEAD_DIM**-0.5


@dataclass
class Linear:
    """weight int8 (k, n), scale float32 (n,)."""

    weight: Tensor
    scale: Tensor


@dataclass
class Layer:
    norm: Tensor  # gamma, bfloat16 (hidden,)
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass
class Weights:
    embedding: Tensor  # bfloat16 (vocabulary, hidden)
    layers: list[Layer]
    norm: Tensor
    head: Tensor  # bfloat16 (hidden, vocabulary)
    cos: Tensor  # bfloat16 (positions, head_dim)
    sin: Tensor


def prompt() -> Tensor:
    return torch.randint(0, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(5))


def slots(positions: Tensor) -> Tensor:
    """The rows of the cache, seen as (blocks * tokens, ...), of some positions."""
    return torch.tensor(TABLE)[positions // BLOCK] * BLOCK + positions % BLOCK


def weights(seed: int = 18) -> Weights:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    def linear(k: int, n: int) -> Linear:
        weight = torch.randint(-127, 128, (k, n), generator=random, dtype=torch.int8)
        return Linear(weight, torch.rand(n, generator=random) * 0.02 / k**0.5 + 1e-4)

    def gamma() -> Tensor:
        return (1 + normal(HIDDEN, scale=0.1)).bfloat16()

    layers = [
        Layer(
            gamma(),
            linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            linear(HEADS * HEAD_DIM, HIDDEN),
            gamma(),
            linear(HIDDEN, 2 * INTERMEDIATE),
            linear(INTERMEDIATE, HIDDEN),
        )
        for _ in range(LAYERS)
    ]
    frequency = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.outer(torch.arange(float(len(TABLE) * BLOCK)), frequency).repeat(1, 2)
    return Weights(
        normal(VOCABULARY, HIDDEN).bfloat16(),
        layers,
        gamma(),
        normal(HIDDEN, VOCABULARY, scale=0.2).bfloat16(),
        angle.cos().bfloat16(),
        angle.sin().bfloat16(),
    )


class OnCpu:
    """The decoder in plain torch."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        shape = (LAYERS, BLOCKS * BLOCK, KV_HEADS, HEAD_DIM)
        self.keys = torch.zeros(shape, dtype=torch.bfloat16)
        self.values = torch.zeros(shape, dtype=torch.bfloat16)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """float32 (vocabulary,) after the last token."""
        x = self.weights.embedding[tokens]
        residual = torch.zeros_like(x)
        for number, layer in enumerate(self.weights.layers):
            h, residual = _normed(x, residual, layer.norm)
            x = _product(*_quantized(h), layer.qkv)
            x = self._attend(number, x, positions)
            x = _product(*_quantized(x.float()), layer.out)
            h, residual = _normed(x, residual, layer.mlp_norm)
            gate, up = _product(*_quantized(h), layer.gate_up, torch.float32).chunk(2, dim=-1)
            x = _product(*_quantized(F.silu(gate) * up), layer.down)
        h, _ = _normed(x, residual, self.weights.norm)
        last = h[-1].bfloat16().float() @ self.weights.head.float()
        return last.bfloat16().float()

    def _attend(self, layer: int, qkv: Tensor, positions: Tensor) -> Tensor:
        q, k, v = qkv.view(len(positions), -1, HEAD_DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        self.keys[layer, slots(positions)] = self._rotated(k, positions)
        self.values[layer, slots(positions)] = v
        seen = slots(torch.arange(int(positions[-1]) + 1))
        keys, values = (
            cache[layer, seen].float().repeat_interleave(HEADS // KV_HEADS, dim=1)
            for cache in (self.keys, self.values)
        )
        scores = torch.einsum("qhd,khd->hqk", self._rotated(q, positions).float(), keys) * SCALE
        later = torch.arange(len(seen)) > positions[:, None]
        scores = scores.masked_fill(later, float("-inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        return mixed.bfloat16().reshape(len(positions), -1)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (t[positions][:, None].float() for t in (self.weights.cos, self.weights.sin))
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).bfloat16()


def _normed(x: Tensor, residual: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of the sum in float32, which is what is quantized, and the sum in bfloat16."""
    total = (x.float() + residual.float()).bfloat16().float()
    rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + EPSILON)
    return total * rstd * gamma.float(), total.bfloat16()


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127), scale


def _product(
    x: Tensor, scale: Tensor, linear: Linear, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    exact = x.double() @ linear.weight.double()
    return (exact.float() * linear.scale * scale).to(dtype)


def generate_on_cpu() -> tuple[list[int], float]:
    """The tokens, and the smallest distance between the best two logits of a step."""
    decoder = OnCpu(weights())
    tokens, positions = prompt(), torch.arange(PROMPT)
    said: list[int] = []
    closest = float("inf")
    for _ in range(TOKENS):
        best = decoder.logits(tokens, positions).topk(2)
        closest = min(closest, float(best.values[0] - best.values[1]))
        said.append(int(best.indices[0]))
        tokens, positions = torch.tensor([said[-1]]), positions[-1:] + 1
    return said, closest
