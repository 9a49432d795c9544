"""What the checks of several processes share: sizes, layers, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lq_graph
from lq_graph import A4W4Dynamic, A8W8Dynamic, A8W8Static
from lq_graph.parallel import ColwiseLinearQuant, RowwiseLinearQuant
from support.cases import BF16, F16, Case

Check = Iterator[tuple[str, str]]
TENSORS = ("x1", "weight", "scale", "offset", "pertoken_scale", "bias")
M, K, N = 8, 64, 32  # split into 2 and 4 parts, int4 included


def sized(case: Case) -> Case:
    """A row of the table in a size that 4 devices can share."""
    return Case(**{**vars(case), "m": M, "k": K, "n": N})


def call(inputs: dict[str, Any]) -> Tensor:
    given = [inputs[name] for name in TENSORS]
    out: Tensor = lq_graph.ops._linear_quant(*given, output_dtype=inputs["output_dtype"])
    return out


def compared(got: Tensor, want: Tensor, *, exact: bool = True) -> str:
    got, want = got.cpu(), want.cpu()
    if got.dtype != want.dtype or got.shape != want.shape:
        return f"{got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
    if exact:
        return "" if torch.equal(got, want) else f"{int((got != want).sum())} differ"
    step = {F16: 2.0**-10, BF16: 2.0**-7}[want.dtype]
    scale = want.float().abs().amax().item()
    worst = (got.float() - want.float()).abs().max().item()
    # each part and each sum is rounded once, in steps of the largest value at most
    limit = 2 * dist.get_world_size() * step * scale
    return "" if worst <= limit else f"off by {worst}, more than {limit}"


def refusal(action: Callable[[], Any], text: str) -> str:
    try:
        action()
    except Exception as error:
        return "" if text in str(error) else f"another text: {error}"
    return "not refused"


class Block(nn.Module):
    """Two quantized layers as they stand in a model."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(K, 2 * N, dtype=dtype)
        self.down = nn.Linear(2 * N, K, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


def block(device: str) -> Block:
    return Block(BF16).eval().to(device)


def quantized_block(config: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Block, Tensor]:
    model = Block(dtype).eval()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=g).to(dtype)
    calibration = None if "dynamic" in config else [x]
    lq_graph.quantize(model, CONFIGS[config], calibration=calibration)
    return model.to(device), x.to(device)


def plan(exact: bool) -> dict[str, Any]:
    return {"up": ColwiseLinearQuant(), "down": RowwiseLinearQuant(exact=exact)}


CONFIGS: dict[str, Any] = {
    "a8w8_dynamic": A8W8Dynamic(),
    "a8w8_static": A8W8Static(),
    "a4w4_dynamic": A4W4Dynamic(),
}
