"""Models in which several linear layers read one tensor, quantized."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lq_graph import A8W8Static, quantize

K = 64
SIZES = {"q": 40, "k": 24, "v": 8}  # n; not multiples of 16


class Attention(nn.Module):
    """q, k and v read one tensor; out reads another."""

    def __init__(self, bias: bool = False, sizes: dict[str, int] = SIZES) -> None:
        super().__init__()
        for name, n in sizes.items():
            setattr(self, name, nn.Linear(K, n, bias=bias))
        self.out = nn.Linear(sum(sizes.values()), K, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.q(x), self.k(x), self.v(x)], -1))


class Gated(nn.Module):
    """gate and up read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, 32, bias=False), nn.Linear(K, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.gate(x)) * self.up(x)


def inputs(m: int = 5, dtype: torch.dtype = torch.float16) -> Tensor:
    """(2, m, K)."""
    x = torch.randn(2, m, K, generator=torch.Generator().manual_seed(m)) + 0.3
    return x.to(dtype)


def quantized(
    model: nn.Module, config: Any, dtype: torch.dtype = torch.float16, seed: int = 0
) -> Any:
    """A model with random weights, quantized."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).eval()
    calibration = [inputs(dtype=dtype)] if isinstance(config, A8W8Static) else None
    quantize(model, config, calibration)
    return model


def pair(config: Any, dtype: torch.dtype = torch.float16, **options: Any) -> tuple[Any, Any]:
    """Two equal quantized models, one of them to merge."""
    plain = quantized(Attention(**options), config, dtype)
    return plain, copy.deepcopy(plain)
