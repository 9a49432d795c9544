"""Graphs of torchair around fused operators: the patterns that fuse a norm, and prefetches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.graph import executor
from support import golden, golden_fused
from support.eager import BF16, F16, F32, refused
from support.fused import EPSILON, K, assert_bits, either_way, exact, norm_of, positive
from support.has import need_converter, need_operator

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")


# ---- torchair's patterns ----


def run_dynamic(x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
    y, _, x = torch_npu.npu_add_rms_norm(x1, x2, gamma, EPSILON)
    values, scale = torch_npu.npu_dynamic_quant(y)
    return values, scale, x


def run_cast(x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
    y, _, x = torch_npu.npu_add_rms_norm(x1, x2, gamma, EPSILON)
    return y, x, y.to(F32)


def run_static(x1: Tensor, x2: Tensor, gamma: Tensor, scale: Tensor) -> Any:
    y, _, x = torch_npu.npu_add_rms_norm(x1, x2, gamma, EPSILON)
    return torch_npu.npu_quantize(y, scale, None, torch.qint8, -1), x


def compiled(function: Callable[..., Any], mode: str, fuses: bool, *args: Tensor) -> Any:
    import torchair

    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    config.mode = mode
    config.experimental_config.pattern_fusion_pass = fuses
    backend = torchair.get_npu_backend(compiler_config=config)
    return torch.compile(function, backend=backend, dynamic=False, fullgraph=True)(*args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
@pytest.mark.parametrize("fuses", [False, True])
def test_torchair_fuses_a_norm_with_what_follows(fuses: bool, mode: str) -> None:
    """With a dynamic quantization the fused operator rounds less than the two that it replaces, so
    the bits differ, as on a device; with a cast they are the same."""
    import torchair

    need_operator("npu_add_rms_norm_dynamic_quant")
    need_converter("npu_add_rms_norm_dynamic_quant")
    need_operator("npu_add_rms_norm_cast")
    need_converter("npu_add_rms_norm_cast")
    if not hasattr(torchair.CompilerConfig().experimental_config, "pattern_fusion_pass"):
        pytest.skip("torchair has no pattern_fusion_pass")
    x1, x2 = exact(2, 5, K, dtype=BF16), exact(2, 5, K, dtype=BF16, seed=1)
    gamma = exact(K, dtype=BF16, seed=2)
    args = tuple(t.npu() for t in (x1, x2, gamma))
    values, scale, x = compiled(run_dynamic, mode, fuses, *args)
    norm, _, total = norm_of(x1, x2, gamma, "" if fuses else "tn")
    if fuses:
        want = golden_fused.quantize_rows(norm, 127, "reciprocal")
    else:
        want = golden.dynamic_quant(golden.bfloat16(norm), 127)
    assert_bits(values, want[0])
    assert_bits(scale, want[1])
    assert_bits(x, total)
    alone = run_dynamic(*args)
    assert torch.equal(values, alone[0]) != fuses
    assert (values.int() - alone[0].int()).abs().max() <= 1
    for got, expected in zip(compiled(run_cast, mode, fuses, *args), run_cast(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fuses", [False, True])
def test_a_captured_graph_fuses_a_norm_with_a_quantization(fuses: bool) -> None:
    """float16 rounds alike in both: aclnnAddRmsNormQuantV2 gives the bits of aclnnQuantize."""
    need_operator("npu_add_rms_norm_quant")
    x1, x2 = exact(2, 5, K, dtype=F16), exact(2, 5, K, dtype=F16, seed=1)
    args = tuple(t.npu() for t in (x1, x2, exact(K, dtype=F16, seed=2), positive(K)))
    got = compiled(run_static, "reduce-overhead", fuses, *args)
    assert all(torch.equal(a, b) for a, b in zip(got, run_static(*args), strict=True))


# ---- Quantize ----


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
@pytest.mark.parametrize(("axis", "size"), [(-1, K), (0, 4), (1, 1)])
def test_npu_quantize_by_a_division_in_a_graph(axis: int, size: int, dtype: torch.dtype) -> None:
    x, scale = exact(4, K, dtype=F32) * 9, positive(size)
    points = torch.arange(size, dtype=torch.int32)

    def run(x: Tensor, scale: Tensor, points: Tensor) -> Tensor:
        return torch_npu.npu_quantize(x, scale, points, dtype, axis)

    args = [t.npu() for t in (x, scale, points)]
    graph = either_way(run, "static")(*args)
    assert torch.equal(graph, run(*args))
    shape = [1, 1]
    shape[axis] = size
    value = x.numpy() / scale.numpy().reshape(shape) + points.numpy().reshape(shape).astype("f")
    low, high = {torch.qint8: (-128, 127), torch.quint8: (0, 255)}.get(dtype, (-(2**31), 2**31 - 1))
    assert_bits(graph, np.clip(np.rint(value), low, high).astype(np.int64))


# ---- prefetches ----


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    doubled = x * 2
    torch_npu.npu_prefetch(weight, doubled, 4096, 128)
    return doubled @ weight


def prefetches() -> int:
    return int(cann_host.info()["prefetches"])


def matrices() -> tuple[Tensor, Tensor]:
    need_operator("npu_prefetch", "offset")
    need_converter("npu_prefetch")
    return exact(4, K, dtype=F32).npu(), exact(K, K, dtype=F32, seed=1).npu()


def test_prefetch() -> None:
    x, weight = matrices()
    before = prefetches()
    result = multiply(x, weight)
    assert prefetches() == before + 1
    assert_bits(result, (x.cpu() * 2 @ weight.cpu()).numpy())


def test_a_captured_graph_prefetches_in_each_replay() -> None:
    x, weight = matrices()
    want, before = multiply(x, weight), prefetches()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        result = multiply(x, weight)
    assert prefetches() == before
    for count in (1, 2):
        graph.replay()
        torch.npu.synchronize()
        assert prefetches() == before + count
    assert torch.equal(result, want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_keeps_a_prefetch_that_nothing_reads(frozen: bool) -> None:
    import torchair

    torch._dynamo.reset()
    config = torchair.CompilerConfig()
    config.experimental_config.frozen_parameter = frozen
    x, weight = matrices()
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    backend = torchair.get_npu_backend(compiler_config=config)
    run = torch.compile(lambda x: multiply(x, parameter), backend=backend, dynamic=False)
    want, before = multiply(x, weight), prefetches()
    assert torch.equal(run(x), want) and prefetches() == before + 1
    assert torch.equal(run(x), want) and prefetches() == before + 2


@pytest.mark.parametrize(
    ("max_size", "offset", "message"),
    [
        (0, 0, "max_size should be greater than zero"),
        (8, -1, "offset should not be smaller than zero"),
        (8, 4 * K * K, "offset out of range of tensor size"),
    ],
)
def test_prefetch_refuses(max_size: int, offset: int, message: str) -> None:
    x, weight = matrices()
    with refused(message):
        torch_npu.npu_prefetch(weight, x, max_size, offset)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"max_size": 0}, "max_size is 0"),
        ({"max_size": 8, "offset": 16}, "offset 16.*src, which has 16 bytes"),
        ({"max_size": 8, "type": 7}, "type 7 is not implemented"),
    ],
)
def test_cmo_refuses(attrs: dict[str, Any], message: str) -> None:
    with pytest.raises(executor.GraphError, match=message):
        executor.run_op(executor.find_op("Cmo"), {"src": torch.ones(4)}, attrs)
