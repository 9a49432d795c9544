"""A float model whose layers have names of three parts: layers.1.mlp.down_proj."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Model"]


class Mlp(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, wide, dtype=torch.float16)
        self.down_proj = nn.Linear(wide, hidden, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.relu(self.up_proj(x)))
        return out


class Block(nn.Module):
    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.mlp = Mlp(hidden, wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    """(m, hidden) to (m, hidden), in float16; quantized by lq_graph.quantize."""

    def __init__(self, hidden: int, wide: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(hidden, wide), Block(hidden, wide)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
