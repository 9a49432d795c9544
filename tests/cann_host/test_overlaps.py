"""Writes to elements that share memory, with each other or with what is read. PyTorch on the CPU is
the reference: torch_npu makes the same checks in the operators that have any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cann_host

pytestmark = [
    pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only"),
    pytest.mark.filterwarnings("ignore:Use of .* on expanded tensors is deprecated"),
]
torch_npu = pytest.importorskip("torch_npu")

Call = Callable[[Tensor], Any]
RANGE = list(map(float, range(6)))


def on(device: str, call: Call) -> list[float]:
    """Six numbers after a call that writes to a part of them."""
    x = torch.tensor(RANGE, device=device)
    call(x)
    return x.cpu().tolist()


def places(x: Tensor, *rows: int) -> Tensor:
    return torch.tensor(rows, device=x.device)


def windows(x: Tensor) -> Tensor:
    return x.as_strided((4, 2), (1, 1))


def expanded(x: Tensor) -> Tensor:
    return x[1:2].expand(4)


LIKE_THE_CPU: dict[str, Call] = {
    "the same": lambda x: x.add_(x),
    "the same view": lambda x: x.view(2, 3).mul_(x.view(2, 3)),
    "another part": lambda x: torch.add(x[:3], x[3:], out=x[:3]),
    "between": lambda x: x[::2].add_(x[1::2]),
    "a list of parts": lambda x: torch._foreach_add_([x[:3], x[3:]], 1),
    "fill an expanded": lambda x: expanded(x).fill_(3),
    "zero an expanded": lambda x: expanded(x).zero_(),
    "fill windows": lambda x: windows(x).fill_(7),
    "zero windows": lambda x: windows(x).zero_(),
    "masked_fill_ of an expanded": lambda x: expanded(x).masked_fill_(expanded(x) > 0, 2),
}
REFUSED: dict[str, Call] = {
    "shifted": lambda x: x[1:].add_(x[:-1]),
    "shifted copy": lambda x: x[1:].copy_(x[:-1]),
    "shifted out": lambda x: torch.exp(x[:-1], out=x[1:]),
    "shifted scan": lambda x: torch.cumsum(x[:-1], 0, out=x[1:]),
    "transposed": lambda x: x[:4].view(2, 2).sub_(x[:4].view(2, 2).t()),
    "add to an expanded": lambda x: expanded(x).add_(1),
    "expanded out": lambda x: torch.neg(x[2:], out=expanded(x)),
    "copy to an expanded": lambda x: expanded(x).copy_(x[2:].clone()),
    "scatter_ to an expanded": lambda x: expanded(x).scatter_(0, places(x, 1), x[:1]),
}
# The CPU computes in an order that PyTorch does not document
REFUSED_ON_NPU: dict[str, Call] = {
    "one tensor twice in a list": lambda x: torch._foreach_add_([x, x], 1),
    "a list of parts that overlap": lambda x: torch._foreach_add_([x[:4], x[2:]], 1),
    "matmul": lambda x: torch.mm(x[:4].view(2, 2), x[:4].view(2, 2), out=x[2:].view(2, 2)),
    "windows times other numbers": lambda x: windows(x).mul_(torch.arange(8.0).view(4, 2).npu()),
    "copy to windows": lambda x: windows(x).copy_(torch.arange(8.0).view(4, 2)),
}
# ... and the device on copies of tensors with gaps
GAPS: dict[str, tuple[Call, list[float]]] = {
    "add to windows": (lambda x: windows(x).add_(1), [1, 2, 3, 4, 5, 5]),
    "copy equal numbers to windows": (lambda x: windows(x).copy_(torch.ones(4, 2)), [1] * 5 + [5]),
    "into every second": (lambda x: x[::2].add_(x[:3]), [0, 1, 3, 3, 6, 5]),
}


@pytest.mark.parametrize("call", LIKE_THE_CPU.values(), ids=LIKE_THE_CPU)
def test_it_computes_as_the_cpu_does(call: Call) -> None:
    wanted = on("cpu", call)
    assert wanted != RANGE
    assert on("npu", call) == wanted


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_it_is_refused_as_on_the_cpu(call: Call) -> None:
    for device in ("cpu", "npu"):
        with pytest.raises(RuntimeError, match=r"refers? to a single memory location"):
            on(device, call)


@pytest.mark.parametrize("call", REFUSED_ON_NPU.values(), ids=REFUSED_ON_NPU)
def test_it_is_refused_where_the_order_would_matter(call: Call) -> None:
    x = torch.tensor(RANGE, device="npu")
    with pytest.raises(RuntimeError, match=r"single memory location|share memory"):
        call(x)
    assert x.cpu().tolist() == RANGE


@pytest.mark.parametrize(("call", "wanted"), GAPS.values(), ids=GAPS)
def test_elements_with_gaps(call: Call, wanted: list[float]) -> None:
    assert on("npu", call) == wanted


@pytest.mark.parametrize("name", ["shifted", "a list of parts that overlap"])
def test_a_captured_call_is_refused_too(name: str) -> None:
    x, graph = torch.tensor(RANGE, device="npu"), torch.npu.NPUGraph()
    call = {**REFUSED, **REFUSED_ON_NPU}[name]
    with (
        pytest.raises(RuntimeError, match="refer to a single memory location"),
        torch.npu.graph(graph),
    ):
        call(x)
    assert x.cpu().tolist() == RANGE


# ---- aclnn ----


def test_an_expanded_cache_is_refused() -> None:
    cache = torch.zeros(1, 4, 32, device="npu").expand(2, 4, 32)
    rows = torch.ones(2, 1, 32, device="npu")
    with pytest.raises(RuntimeError, match=r"elements of data.*share memory"):
        torch_npu.scatter_update_(cache, torch.tensor([1, 1], device="npu"), rows, axis=-2)
    assert not cache.cpu().any()


def rotated(query: Tensor, cos: Tensor) -> Tensor:
    """The query after npu_apply_rotary_pos_emb, which writes into it."""
    query = query.npu()
    given = (torch.ones(2, 1, 1, 128).half().npu(), cos.npu(), torch.zeros_like(cos).npu())
    torch_npu.npu_apply_rotary_pos_emb(query, *given)
    return query.cpu()


def test_an_expanded_result_takes_equal_rows_only() -> None:
    row = torch.arange(128.0).half().view(1, 1, 1, 128)
    equal = torch.full((2, 1, 1, 128), 2.0).half()
    other = torch.cat([equal[:1], 3 * equal[:1]])
    query = row.npu().expand(2, 1, 1, 128)
    assert torch.equal(rotated(query, equal), 2 * row.expand(2, 1, 1, 128))
    with pytest.raises(RuntimeError, match=r"aclnnApplyRotaryPosEmb.*different values"):
        rotated(query, other)
    assert torch.equal(query.cpu()[:1], 2 * row)
