"""Float models for quantize, and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lq_graph import (
    A4W4Dynamic,
    A8W8Dynamic,
    A8W8Static,
    QuantizedLinear,
    quantize,
)

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32

CONFIGS = [A8W8Dynamic(), A8W8Static(), A8W8Static(symmetric=True), A4W4Dynamic()]


class Net(nn.Module):
    """Two layers with an activation between that no Sequential shows."""

    def __init__(self, k: int = 64, hidden: int = 32, n: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(k, hidden, bias=bias)
        self.down = nn.Linear(hidden, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def make(dtype: torch.dtype = F16, **sizes: Any) -> Net:
    torch.manual_seed(0)
    return Net(**sizes).to(dtype).eval()


def data(count: int = 4, m: int = 8, k: int = 64, dtype: torch.dtype = F16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(m, k, generator=generator) + 0.3).to(dtype) for _ in range(count)]


def run(model: nn.Module, config: Any, batches: list[Any] | None = None, **options: Any) -> Any:
    calibration = (batches or data()) if isinstance(config, A8W8Static) else None
    return quantize(model, config, calibration, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not isinstance(module, QuantizedLinear)
