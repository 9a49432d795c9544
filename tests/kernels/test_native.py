"""The compiled CPU kernel: bit-equal to what torch computes, at every edge of its blocks, on any
strides, with any number of threads. That torch's is the golden's, the other tests show."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph import kernels
from lq_graph.kernels import library, native
from support import cases
from support.cases import ROW_CASES, Case
from support.native import by_torch, needs_kernel, values
from support.processes import output_of, python, script

pytestmark = pytest.mark.native
I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32


LOADED = library.loaded()


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name == LOADED.instruction_set else pytest.mark.slow)
        for name in (LOADED.can if LOADED else [])
    ]
)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each that this processor has; those that are not taken by themselves in slow tests only."""
    with library.using(request.param):
        yield


each_instruction_set = pytest.mark.usefixtures("instruction_set")


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What machines without the compiled kernel compute."""
    monkeypatch.setattr(native, "loaded", lambda: None)


def epilogues(n: int, m: int) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, torch.dtype]]:
    """(scale, bias, pertoken_scale, output): every kind of each."""
    generator = torch.Generator().manual_seed(n)
    scale = torch.rand(n, generator=generator) * 1e-3 + 1e-5
    offset = torch.randn(n, generator=generator) * 90
    int_bias = torch.randint(-9000, 9000, (n,), dtype=I32, generator=generator)
    float_bias = torch.randn(n, generator=generator)
    pertoken = torch.rand(m, generator=generator)
    packed = lq_graph.trans_quant_param(scale, offset)
    one = lq_graph.trans_quant_param(scale[:1] * 300)
    yield packed, None, None, I8
    yield packed, int_bias, None, I8
    yield one, int_bias, None, F16  # saturates
    yield one, None, None, BF16
    yield scale, int_bias, None, BF16
    yield scale.bfloat16(), float_bias.bfloat16(), pertoken, BF16
    yield scale[:1], float_bias, pertoken, BF16
    yield scale, float_bias.half(), pertoken, F16
    yield scale * 1e4, None, pertoken, F16  # overflows to infinity
    yield scale, int_bias, None, I32


@pytest.mark.slow
@needs_kernel
@each_instruction_set
@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 13, 31, 32, 33, 48, 63, 256, 257, 289])
@pytest.mark.parametrize("k", [1, 7, 63, 64, 65, 128, 1023, 1024, 1025, 2049, 4160])
def test_edges_of_the_blocks(m: int, k: int) -> None:
    for n in (1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 129):
        x, weight = values(m, k), values(n, k, seed=1)
        for scale, bias, pertoken, output in epilogues(n, m):
            got = native.matmul(x, weight, scale, bias, pertoken, output)
            assert got is not None and got.dtype == output
            want = by_torch(
                x, weight, scale, bias=bias, pertoken_scale=pertoken, output_dtype=output
            )
            assert torch.equal(got, want), (m, k, n, output)


@needs_kernel
@each_instruction_set
@pytest.mark.parametrize("m", [1, 6, 13, 31, 32, 47, 300])
@pytest.mark.parametrize("k", [8, 120, 128, 136, 1024, 1032, 4096, 4104])
def test_edges_of_the_blocks_int4(m: int, k: int) -> None:
    for n in (8, 16, 64, 72):
        x, weight = values(m, k, int4=True), values(n, k, int4=True, seed=1)
        packed = kernels.pack_int4(x), kernels.pack_int4(weight)
        for scale, bias, pertoken, output in epilogues(n, m):
            got = native.matmul(*packed, scale, bias, pertoken, output)
            assert got is not None
            want = by_torch(
                x, weight, scale, bias=bias, pertoken_scale=pertoken, output_dtype=output
            )
            assert torch.equal(got, want), (m, k, n, output)


@needs_kernel
@each_instruction_set
@pytest.mark.parametrize("m", [1, 7, 31, 32, 47, 300])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 96, 128, 200, 1056, 4096, 4136])
def test_edges_of_the_blocks_fractal_nz(m: int, k: int) -> None:
    for n in (2, 15, 16, 17, 33, 130):
        for int4 in (False, True)[: 2 - bool(k % 8)]:
            x, nd = values(m, k, int4=int4), values(n, k, int4=int4, seed=1)
            if int4:
                x, nd = kernels.pack_int4(x), kernels.pack_int4(nd)
            blocks = kernels.nd_to_nz(nd, 8 if int4 else 32)
            weight = kernels.NzWeight(blocks, *nd.shape)
            got = native.matmul(x, blocks, torch.ones(1), None, None, I32, tuple(nd.shape))
            assert got is not None
            want = by_torch(x, nd, torch.ones(1), output_dtype=I32)
            assert torch.equal(got, want), (m, k, n, int4)
            assert torch.equal(by_torch(x, weight, torch.ones(1), output_dtype=I32), want)


@pytest.mark.parametrize(
    ("blocks", "n", "columns"),
    [
        ((2, 1, 16, 32), 16, 65),
        ((2, 1, 16, 32), 17, 64),
        ((2, 1, 16, 32), 16, 32),
        ((2, 1, 32, 16), 16, 64),
        ((2, 16, 32), 16, 64),
    ],
)
def test_blocks_that_do_not_hold_the_weight_are_refused(
    blocks: tuple[int, ...], n: int, columns: int
) -> None:
    """The kernel reads as much as the shape says."""
    with pytest.raises(ValueError, match=f"do not hold a weight \\({n}, {columns}\\)"):
        kernels.NzWeight(torch.zeros(blocks, dtype=I8), n, columns)


@needs_kernel
@each_instruction_set
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("other", [-128, 127])
def test_exact_at_the_largest_k(value: int, other: int) -> None:
    k = 65535
    x, weight = torch.full((7, k), value, dtype=I8), torch.full((5, k), other, dtype=I8)
    out = native.matmul(x, weight, torch.ones(1), None, None, I32)
    assert out is not None and bool((out == k * value * other).all())


@needs_kernel
@each_instruction_set
def test_strides() -> None:
    big = values(64, 300)
    weight = values(40, 300, seed=1)
    for x, w in [
        (big[::2], weight),
        (big[:, 8:136], weight[:, 3:131]),
        (big[3:4].expand(9, 300), weight[:1].expand(40, 300)),
        (big.t().contiguous().t(), weight),
        (big[:, :1], weight[:, :1]),
        (big.view(-1)[7 : 7 + 9 * 300].view(9, 300), weight.view(-1)[300:][3:2703].view(9, 300)),
        (big.view(-1).as_strided((9, 300), (1, 1)), weight.view(-1).as_strided((9, 300), (5, 1))),
        (values(2, 3, 5, 300), weight),
    ]:
        n, m = w.shape[0], x.shape[-2]
        for scale, bias, pertoken in (
            (torch.rand(n) * 1e-3, None, torch.rand(m)),
            (torch.rand(n, 2)[:, 1] * 1e-3, torch.rand(2 * n)[::2], torch.rand(m, 3)[:, 2]),
            (torch.rand(1).expand(n), torch.rand(1).expand(n), torch.rand(1).expand(m)),
            (torch.rand(n + 1)[1:], values(n, 2)[:, 1].int(), None),
        ):
            got = native.matmul(x, w, scale, bias, pertoken, BF16)
            assert got is not None
            want = by_torch(x, w, scale, bias=bias, pertoken_scale=pertoken, output_dtype=BF16)
            assert got.shape == want.shape and torch.equal(got, want)


def test_a_dim_of_one_may_have_any_stride() -> None:
    """Such a tensor is contiguous, and has no view of another dtype."""
    row = values(64, int4=True).as_strided((1, 64), (3, 1))
    packed = lq_graph.pack_int4(row)
    assert torch.equal(packed, lq_graph.pack_int4(row.clone(memory_format=torch.contiguous_format)))
    for strange in (packed.as_strided((1, 8), (5, 1)), packed[:, :1].as_strided((1, 1), (5, 7))):
        assert torch.equal(lq_graph.unpack_int4(strange), row[:, : 8 * strange.shape[1]])
    weight = values(16, 32).as_strided((1, 16, 32), (7, 32, 1))
    blocks = lq_graph.to_fractal_nz(weight)
    strange = blocks.as_strided(blocks.shape, (3, 5, 7, 32, 1))
    assert torch.equal(lq_graph.from_fractal_nz(strange, 16, 32), weight)


@needs_kernel
def test_left_to_torch() -> None:
    """Batched and transposed weights: no answer, and the operator computes all the same."""
    x, scale = values(3, 5, 16), torch.rand(8) * 1e-3
    for weight in (values(3, 8, 16), values(16, 8).t()):
        assert native.matmul(x, weight, scale, None, None, BF16) is None
        out = lq_graph.linear_quant(x, weight, scale, output_dtype=BF16)
        assert torch.equal(out, by_torch(x, weight, scale, output_dtype=BF16))


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_every_row_without_the_kernel(case: Case, without_kernel: None) -> None:
    inputs = cases.make(case)
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@needs_kernel
@each_instruction_set
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 1024, 4096),
        (1, 16448, 70),
        (7, 4160, 200),
        (300, 1024, 16),
        (300, 1024, 17),
        (64, 1024, 1000),
        (257, 4104, 545),
        (600, 136, 1025),
    ],
)
@pytest.mark.parametrize("int4", [False, True])
def test_threads(m: int, k: int, n: int, threads: int, int4: bool) -> None:
    x, weight = values(m, k, int4=int4), values(n, k, int4=int4, seed=1)
    scale = torch.rand(n) * 1e-3
    want = by_torch(x, weight, scale, output_dtype=BF16)
    if int4:
        x, weight = kernels.pack_int4(x), kernels.pack_int4(weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = native.matmul(x, weight, scale, None, None, BF16)
    finally:
        torch.set_num_threads(before)
    assert got is not None and torch.equal(got, want)


@pytest.mark.slow
@needs_kernel
def test_it_takes_torchs_threads_and_starts_none_of_its_own() -> None:
    command = script("kernel_threads.py counts")
    done = python(*command, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert output_of(done).split() == ["0", "0"]


@needs_kernel
def test_memory_stays_flat() -> None:
    x, weight, scale = values(16, 512), values(256, 512), torch.rand(256)
    x4, w4 = (
        kernels.pack_int4(values(16, 512, int4=True)),
        kernels.pack_int4(values(256, 512, int4=True)),
    )

    def run(times: int) -> None:
        for _ in range(times):
            native.matmul(x, weight, scale, None, None, BF16)
            native.matmul(x4, w4, scale, None, None, BF16)

    run(500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # KiB


def test_modes_of_torch() -> None:
    """autocast, inference_mode, and a layer in a forked child."""
    x, weight, scale = values(4, 64), values(8, 64), torch.rand(8)
    want = lq_graph.linear_quant(x, weight, scale, output_dtype=BF16)
    with torch.autocast("cpu", dtype=F16):
        assert torch.equal(lq_graph.linear_quant(x, weight, scale, output_dtype=BF16), want)
    with torch.inference_mode():
        assert torch.equal(lq_graph.linear_quant(x, weight, scale, output_dtype=BF16), want)
