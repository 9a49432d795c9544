"""A model with everything that a checkpoint can hold, and the layers of each format."""

from __future__ import annotations

import torch
from torch import nn

import lq_graph
from lq_graph import A8W8Dynamic, A8W8Static

F16 = torch.float16


class Extra(nn.LayerNorm):
    """A layer with an extra state, an expanded buffer, and a buffer that files do not hold."""

    def __init__(self, size: int) -> None:
        super().__init__(size, dtype=F16)
        self.state = torch.zeros(2)
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("kept", torch.ones(2, device="cpu"), persistent=False)

    def get_extra_state(self) -> torch.Tensor:
        return self.state

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.state = state


class Model(nn.Module):
    """Tied embeddings, a layer under two names, and Extra."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16, dtype=F16)
        self.up = nn.Linear(16, 16, dtype=F16)
        self.again = self.up
        self.norm = Extra(16)
        self.down = nn.Linear(16, 16, bias=False, dtype=F16)
        self.head = nn.Linear(16, 8, bias=False, dtype=F16)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.norm(self.again(self.up(self.embed(x))))))


def model(seed: int, device: str = "cpu") -> Model:
    torch.manual_seed(seed)
    with torch.device(device):
        made = Model()
    made.norm.state = torch.full((2,), float(seed))
    return made


def quantized(seed: int, config: A8W8Dynamic | A8W8Static, names: str = "up down") -> Model:
    made = model(seed)
    batches = None if isinstance(config, A8W8Dynamic) else [torch.arange(8)]
    lq_graph.quantize(made, config, batches, filter_fn=lambda _, name: name in names.split())
    return made


FORMATS: dict[str, tuple[A8W8Dynamic | A8W8Static, A8W8Dynamic | A8W8Static]] = {
    "msmodelslim": (A8W8Dynamic(), A8W8Static()),
    "compressed-tensors": (A8W8Dynamic(), A8W8Dynamic()),
}
