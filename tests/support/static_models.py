"""Models with static layers, calibrated on the CPU and prepared on the NPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import lq_graph
from support.eager import F32
from support.fused import EPSILON, K, exact

__all__ = ["H", "Mlp", "Projections", "inputs_of", "layers_of", "model_of", "prepared"]

H = 96


class Projections(nn.Module):
    """A sum, its norm as transformers writes it, and three layers that read the norm."""

    def __init__(self, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(exact(K, dtype=dtype, seed=2))
        self.q, self.k, self.v = (nn.Linear(K, n, bias=bias, dtype=dtype) for n in (64, 32, 32))

    def forward(self, x: Tensor, residual: Tensor) -> Any:
        total = x + residual
        wide = total.to(F32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)
        y = self.weight * wide.to(x.dtype)
        return torch.cat([self.q(y), self.k(y), self.v(y)], -1), total


class Mlp(nn.Module):
    """As transformers writes it."""

    def __init__(self, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(K, H, bias=bias, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(H, K, bias=bias, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result


def layers_of(model: Any) -> list[Any]:
    return [model.q, model.k, model.v]


def inputs_of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return exact(2, 3, K, dtype=dtype), exact(2, 3, K, dtype=dtype, seed=1)


def model_of(kind: Any, dtype: torch.dtype, merge: bool = True, **options: Any) -> tuple[Any, Any]:
    """A calibrated static model on the CPU, and prepared on the NPU."""
    torch.manual_seed(0)
    plain = kind(dtype, bias=options.pop("bias", False)).eval().requires_grad_(False)
    inputs = inputs_of(dtype)[: 1 if kind is Mlp else 2]
    lq_graph.quantize(plain, lq_graph.A8W8Static(**options), [inputs])
    return plain, prepared(plain, merge, inputs)


def prepared(plain: Any, merge: bool, inputs: tuple[Tensor, ...]) -> Any:
    model = copy.deepcopy(plain).npu()
    if merge:
        lq_graph.merge(model, *(x.npu() for x in inputs))
    lq_graph.use_internal_format_weight(model)
    return model
