"""A weight that the CPU kernel needs in another layout is converted once, and never used after its
bytes were written, by whatever way."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
M, K, N = 3, 64, 48
ND, FRACTAL_NZ = 2, 29


def int8(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def matmul(x: Tensor, weight: Tensor) -> np.ndarray:
    scale = torch.full((N,), 2.0**-10).npu()
    out = torch_npu.npu_quant_matmul(x.npu(), weight, scale, output_dtype=torch.float16)
    return out.cpu().numpy()


def golden(x: Tensor, weight: Tensor) -> np.ndarray:
    sums = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64)
    return (sums.astype(np.float32) * np.float32(2.0**-10)).astype(np.float16)


def by_captured_graph(weight: Tensor, new: Tensor) -> None:
    source = new.clone()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch.bitwise_or(source, 0, out=weight)
    graph.replay()
    torch.npu.synchronize()


def by_memcpy(weight: Tensor, new: Tensor) -> None:
    library = ctypes.CDLL("libascendcl.so")
    size = ctypes.c_size_t(weight.nbytes)
    to, source = ctypes.c_void_p(weight.data_ptr()), ctypes.c_void_p(new.data_ptr())
    assert library.aclrtMemcpy(to, size, source, size, 3) == 0


# Each writes `new` into the weight. Both are on the npu, in ND, (k, n).
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda w, new: w.copy_(new),
    "copy_ from the host": lambda w, new: w.copy_(new.cpu()),
    "copy_ of a part": lambda w, new: [
        w[i : i + 16].copy_(new[i : i + 16]) for i in range(0, K, 16)
    ],
    "cast": lambda w, new: w.copy_(new.int()),
    "fill and add": lambda w, new: w.fill_(0).add_(new),
    "zero_ and or": lambda w, new: w.zero_().bitwise_or_(new),
    "out": lambda w, new: torch.bitwise_or(new, 0, out=w),
    "set item": lambda w, new: w.__setitem__(slice(None), new),
    "through another view": lambda w, new: w.t().copy_(new.t()),
    "index_copy_": lambda w, new: w.index_copy_(0, torch.arange(K).npu(), new),
    "foreach": lambda w, new: torch._foreach_copy_([w], [new]),
    "set_": lambda w, new: w.set_(new.clone()),
    "data": lambda w, new: setattr(w, "data", new.clone()),
    "memcpy": by_memcpy,
    "captured graph": by_captured_graph,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_weight_that_was_written_is_converted_again(name: str) -> None:
    x, old, new = int8(M, K, seed=0), int8(K, N, seed=1), int8(K, N, seed=2)
    weight = old.npu()
    for _ in range(2):
        np.testing.assert_array_equal(matmul(x, weight), golden(x, old))
    WRITES[name](weight, new.npu())
    for _ in range(2):
        np.testing.assert_array_equal(matmul(x, weight), golden(x, new))


def test_fractal_nz_is_converted_once_for_each_version() -> None:
    from cann_host import weights

    torch.npu.config.allow_internal_format = True
    try:
        x, old, new = int8(M, K, seed=0), int8(K, N, seed=1), int8(K, N, seed=2)
        weight = torch_npu.npu_format_cast(old.npu(), FRACTAL_NZ)
        matmul(x, weight)
        held = [kept.value for kept in weights._kept.values()]
        for _ in range(3):
            np.testing.assert_array_equal(matmul(x, weight), golden(x, old))
        again = [kept.value for kept in weights._kept.values()]
        assert len(held) == len(again) > 0
        assert all(a is b for a, b in zip(held, again, strict=True))
        weight.copy_(torch_npu.npu_format_cast(new.npu(), FRACTAL_NZ))
        np.testing.assert_array_equal(matmul(x, weight), golden(x, new))
        weight.add_(1)
        wanted = torch_npu.npu_format_cast(weight, ND).cpu()
        np.testing.assert_array_equal(matmul(x, weight), golden(x, wanted))
    finally:
        torch.npu.config.allow_internal_format = False


ONES = torch.ones(K, N, dtype=torch.int8)
IN_PLACE: dict[str, Callable[[Tensor, torch.device], object]] = {
    "add_": lambda w, _: w.add_(1),
    "copy_": lambda w, on: w.copy_(ONES.to(on)),
    "copy_ from the host": lambda w, _: w.copy_(ONES),
    "fill_": lambda w, _: w.fill_(1),
    "foreach": lambda w, _: torch._foreach_add_([w], 1),
    "index_put_": lambda w, on: w.index_put_((torch.tensor([2]).to(on),), ONES[0].to(on)),
    "out=": lambda w, on: torch.add(ONES.to(on), 1, out=w),
    "zero_": lambda w, _: w.zero_(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_writes_to_fractal_nz(name: str) -> None:
    torch.npu.config.allow_internal_format = True
    try:
        wanted, x = int8(K, N, seed=1), int8(M, K, seed=0)
        weight = torch_npu.npu_format_cast(wanted.npu(), FRACTAL_NZ)
        address = weight.data_ptr()
        matmul(x, weight)  # keeps its conversion
        IN_PLACE[name](weight, torch.device("npu"))
        IN_PLACE[name](wanted, torch.device("cpu"))
        assert torch.equal(weight.cpu(), wanted)
        assert (torch_npu.get_npu_format(weight), weight.data_ptr()) == (FRACTAL_NZ, address)
        np.testing.assert_array_equal(matmul(x, weight), golden(x, wanted))
    finally:
        torch.npu.config.allow_internal_format = False


def test_a_write_to_a_transposed_view_of_fractal_nz_is_refused() -> None:
    torch.npu.config.allow_internal_format = True
    try:
        square = int8(K, K, seed=1)
        weight = torch_npu.npu_format_cast(square.npu(), FRACTAL_NZ)
        with pytest.raises(RuntimeError, match=r"cann_host: aten\.add_\.Tensor .* internal format"):
            weight.t().add_(torch.arange(K, dtype=torch.int8).npu())
        assert torch.equal(weight.cpu(), square)
    finally:
        torch.npu.config.allow_internal_format = False


def test_freed_memory_that_another_weight_gets() -> None:
    x = int8(M, K, seed=0)
    for seed in range(1, 6):
        weight = int8(K, N, seed=seed)
        there = weight.npu()
        np.testing.assert_array_equal(matmul(x, there), golden(x, weight))
        del there
        if seed % 2:
            torch.npu.empty_cache()


def test_what_is_kept_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from cann_host import weights

    x, weight = int8(M, K, seed=0), int8(K, N, seed=3)
    weights._kept.clear()
    monkeypatch.setattr(weights, "MOST_BYTES", K * N - 1)
    there = weight.npu()
    for _ in range(2):
        np.testing.assert_array_equal(matmul(x, there), golden(x, weight))
    assert not weights._kept
