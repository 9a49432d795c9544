"""Ordinary operators on npu tensors compute on the tensors' own memory: the numbers, bit for bit,
and the memory around the tensors must be as on plain CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cann_host
from support.processes import run

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


# A view of 4 x 6 values inside a larger tensor
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda base: base[:24].view(4, 6),
    "offset": lambda base: base[7:31].view(4, 6),
    "columns": lambda base: base[:48].view(4, 12)[:, 1::2],
    "rows": lambda base: base[:48].view(8, 6)[::2],
    "transposed": lambda base: base[:24].view(6, 4).t(),
    "of three dims": lambda base: base.view(2, 6, 4)[1].t(),
    "expanded row": lambda base: base[3:9].expand(4, 6),
    "expanded column": lambda base: base[5:9].view(4, 1).expand(4, 6),
    "overlapping windows": lambda base: base.as_strided((4, 6), (2, 1), 3),
}
WRITABLE = [name for name in LAYOUTS if "expanded" not in name and "overlapping" not in name]

Call = Callable[[Tensor, Tensor], Any]
READS: dict[str, Call] = {
    "add": torch.add,
    "mixed dtypes": lambda x, y: x * y.half() + (y > 0),
    "broadcast": lambda x, y: x - y[:1, :1],
    "number tensor": lambda x, y: x * torch.tensor(2.5, dtype=torch.float64),
    "where": lambda x, y: torch.where(x > y, x, y),
    "sum": lambda x, y: (x.sum(0), x.sum(), y.mean(-1, keepdim=True)),
    "pairs": lambda x, y: (*x.max(1), *y.sort(0), *x.topk(2, dim=0)),
    "matmul": lambda x, y: (x @ y.t(), torch.mm(x.t(), y)),
    "cat": lambda x, y: (torch.cat([x, y], 1), torch.stack([y, x])),
    "index": lambda x, y: (x[[2, 0]], x[x > 0], y.gather(1, x.argsort(1))),
    "nonzero": lambda x, y: (x > y).nonzero(),
    "softmax": lambda x, y: (x.softmax(0), torch.nn.functional.silu(y)),
    "scan": lambda x, y: (x.cumsum(1), y.cumprod(0)),
    "bits": lambda x, y: (x.int() ^ y.int(), x.int() << 1),
    "complex": lambda x, y: torch.view_as_real(torch.complex(x, y).mul(2j)),
    "foreach": lambda x, y: torch._foreach_mul([x, y], [y, x]),
    "nothing": lambda x, y: x[:0] + y[:0],
    "no dims": lambda x, y: x[0, 0] * y[1, 1],
    "embedding": lambda x, y: torch.nn.functional.embedding((y.abs() % 4).long(), x),
    "pad": lambda x, y: torch.nn.functional.pad(x, (1, 2), value=5.0),
    "scaled": lambda x, y: torch.addmm(y[:, :4], x, y.t(), beta=0.5, alpha=2),
}
WRITES: dict[str, Call] = {
    "add_": lambda x, y: x.add_(y),
    "mul_ number": lambda x, y: x.mul_(1.5),
    "fill_": lambda x, y: x.fill_(2),
    "zero_": lambda x, y: x.zero_(),
    "copy_": lambda x, y: x.copy_(y),
    "copy_ cast": lambda x, y: x.copy_(y.half()),
    "clamp_": lambda x, y: x.clamp_(-1, 1),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, 7),
    "index_copy_": lambda x, y: x.index_copy_(0, torch.tensor([2, 0], device=x.device), y[:2]),
    "index_put_": lambda x, y: x.index_put_((torch.tensor([3, 1], device=x.device),), y[:2]),
    "scatter_": lambda x, y: x.scatter_(1, (y.abs() % 6).long()[:, :1], y),
    "set item": lambda x, y: x.__setitem__((slice(1, 3), slice(0, 2)), y[:2, :2]),
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5),
    "foreach": lambda x, y: torch._foreach_add_([x], [y]),
    "out": lambda x, y: torch.sub(y, 2, out=x),
    "out of two": lambda x, y: torch.sort(
        y, 1, out=(x, torch.empty(0, dtype=torch.long, device=x.device))
    ),
    "tril_": lambda x, y: x.tril_(),
    "addmm_": lambda x, y: x.addmm_(y[:, :4], y[:4]),
    # the operator reads what it writes
    "itself": lambda x, y: x.add_(x),
    "matmul into itself": lambda x, y: torch.mm(
        y[:4, :4].clone(), x[:, :6].clone() if x.device.type == "cpu" else x, out=x
    ),
}


def bits(tensor: Tensor) -> Tensor:
    tensor = tensor.cpu().contiguous()
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor


def assert_same(got: Any, wanted: Any) -> None:
    if isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for one_got, one_wanted in zip(got, wanted, strict=True):
            assert_same(one_got, one_wanted)
    elif isinstance(wanted, Tensor):
        assert got.device.type == "npu"
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(bits(got), bits(wanted))


def on_both(call: Call, layout: str, other: str, dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """The result, and all memory around the arguments, on the npu and on the CPU."""
    told = []
    for device in ("npu", "cpu"):
        bases = [numbers(48, dtype=dtype, seed=seed).to(device) for seed in (1, 2)]
        x, y = LAYOUTS[layout](bases[0]), LAYOUTS[other](bases[1])
        told.append([call(x, y), *bases])
    return told[0], told[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READS)
def test_reads(name: str, layout: str) -> None:
    for other in ("whole", "columns", "transposed"):
        assert_same(*on_both(READS[name], layout, other, torch.float32))


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str, layout: str) -> None:
    for other in ("whole", "rows", "expanded row"):
        assert_same(*on_both(WRITES[name], layout, other, torch.float32))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64], ids=str
)
@pytest.mark.parametrize("name", ["add_", "fill_", "copy_", "masked_fill_", "index_copy_", "out"])
def test_writes_of_each_dtype(name: str, dtype: torch.dtype) -> None:
    for layout in ("offset", "columns"):
        assert_same(*on_both(WRITES[name], layout, "whole", dtype))


OUT_SIZES = [(0,), (24,), (4, 6), (3,), (100,), (2, 3, 4)]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("size", OUT_SIZES, ids=str)
def test_an_out_gets_the_size_of_the_result(size: tuple[int, ...]) -> None:
    x = numbers(4, 6)
    for call in (torch.neg, lambda t, out: torch.add(t, t, out=out)):
        out = torch.empty(size, device="npu")
        assert call(x.npu(), out=out) is out
        assert_same(out, call(x, out=torch.empty(size)))


RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "add zero": lambda x: x + 0,
    "view_copy": lambda x: torch.ops.aten.view_copy(x, [24]),
    "expand_copy": lambda x: torch.ops.aten.expand_copy(x, [4, 6]),
    "clone": torch.clone,
    "nan_to_num": torch.nan_to_num,
    "cat of one": lambda x: torch.cat([x]),
    "dropout that drops nothing": lambda x: torch.native_dropout(x, 0.0, False)[0],
    "sort": lambda x: x.sort(1).values,
    "where": lambda x: torch.where(x == x, x, x),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_memory_of_its_own(name: str) -> None:
    x = numbers(4, 6).npu()
    before = x.cpu()
    result = RESULTS[name](x)
    assert result.is_contiguous()
    result.fill_(9)
    assert torch.equal(x.cpu(), before)
    x.fill_(5)
    assert bool((result.cpu() == 9).all())


def test_lazy_bits_and_gradients() -> None:
    x = torch.complex(numbers(4, 4), numbers(4, 4, seed=1))
    for call in (lambda t: t.conj() @ t, lambda t: t.mm(t.mT.conj())):
        got, wanted = call(x.npu()).resolve_conj(), call(x).resolve_conj()
        assert torch.equal(torch.view_as_real(got.cpu()), torch.view_as_real(wanted))
    grads = []
    for device in ("cpu", "npu"):
        w = numbers(4, 6).to(device).requires_grad_()
        h = (w * w).softmax(-1)
        h = h.clone().index_fill_(1, torch.tensor([2], device=device), 1.0).mul_(w.detach())
        h.sum().backward()
        grads.append(w.grad)
    assert_same(grads[1], grads[0])


def test_views_that_inference_mode_made_are_good_outside_it() -> None:
    x, w = numbers(64, 64).npu(), numbers(64, 64, seed=1).npu()
    with torch.inference_mode():
        y = x @ w
        y.add_(1)
    w.requires_grad_()
    for _ in range(2):
        (x.mul_(2) @ w).sum().backward()
    wanted = (6 * numbers(64, 64)).sum(0).unsqueeze(1).expand(64, 64)
    torch.testing.assert_close(w.grad.cpu(), wanted, rtol=1e-4, atol=1e-3)


def test_memory_that_was_freed_is_not_seen_through_an_old_view() -> None:
    big = torch.full((1 << 23,), 3.0, device="npu")  # an allocation of its own
    assert big.max().item() == 3
    del big
    torch.npu.empty_cache()
    again = torch.full((1 << 23,), 4.0, device="npu")
    assert again.max().item() == 4
    again.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        again.max()


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["now", "late"])
@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_a_decoder_runs_with_every_queue(queue: str, streams: str) -> None:
    said = run("decoder.py", "--streams", streams, TASK_QUEUE_ENABLE=queue)
    assert said.splitlines()[-1] == "equal"
