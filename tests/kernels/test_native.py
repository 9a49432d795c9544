"""The compiled CPU kernel: bit-equal to what torch computes, at every edge of its blocks, on any
strides, with any number of threads. That torch's is the golden's, the other tests show."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
import lq_graph
from cann_host import _native
from lq_graph import LinearQuantValueError
from lq_graph.kernels import native, numerics
from support import cases, golden
from support.cases import ROW_CASES, Case
from support.processes import output_of, python, script

pytestmark = pytest.mark.native

I8, I32, F16, BF16, F32 = torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32
needs_kernel = pytest.mark.skipif(
    not native.is_available(), reason="no AVX-512 VNNI, or no compiler at installation"
)


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What machines without the compiled kernel compute."""
    monkeypatch.setattr(native, "_kernel", lambda: None)


def values(*shape: int, int4: bool = False, seed: int = 0) -> Tensor:
    low, high = (-8, 8) if int4 else (-128, 128)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=I8, generator=generator)


def by_torch(
    x: Tensor, weight: Tensor | numerics.NzWeight, *args: Tensor | None, **options: torch.dtype
) -> Tensor:
    kernel, native.matmul = native.matmul, lambda *_: None  # type: ignore[assignment]
    try:
        return numerics.quant_matmul(x, weight, *args, **options)
    finally:
        native.matmul = kernel


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


@needs_kernel
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
@pytest.mark.parametrize("m", [1, 6, 13, 31, 32, 47, 300])
@pytest.mark.parametrize("k", [8, 120, 128, 136, 1024, 1032, 4096, 4104])
def test_edges_of_the_blocks_int4(m: int, k: int) -> None:
    for n in (8, 16, 64, 72):
        x, weight = values(m, k, int4=True), values(n, k, int4=True, seed=1)
        packed = numerics.pack_int4(x), numerics.pack_int4(weight)
        for scale, bias, pertoken, output in epilogues(n, m):
            got = native.matmul(*packed, scale, bias, pertoken, output)
            assert got is not None
            want = by_torch(
                x, weight, scale, bias=bias, pertoken_scale=pertoken, output_dtype=output
            )
            assert torch.equal(got, want), (m, k, n, output)


@needs_kernel
@pytest.mark.parametrize("m", [1, 7, 31, 32, 47, 300])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 96, 128, 200, 1056, 4096, 4136])
def test_edges_of_the_blocks_fractal_nz(m: int, k: int) -> None:
    for n in (2, 15, 16, 17, 33, 130):
        for int4 in (False, True)[: 2 - bool(k % 8)]:
            x, nd = values(m, k, int4=int4), values(n, k, int4=int4, seed=1)
            if int4:
                x, nd = numerics.pack_int4(x), numerics.pack_int4(nd)
            blocks = numerics.nd_to_nz(nd, 8 if int4 else 32)
            weight = numerics.NzWeight(blocks, *nd.shape)
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
        numerics.NzWeight(torch.zeros(blocks, dtype=I8), n, columns)


@needs_kernel
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("other", [-128, 127])
def test_exact_at_the_largest_k(value: int, other: int) -> None:
    k = 65535
    x, weight = torch.full((7, k), value, dtype=I8), torch.full((5, k), other, dtype=I8)
    out = native.matmul(x, weight, torch.ones(1), None, None, I32)
    assert out is not None and bool((out == k * value * other).all())


@pytest.mark.slow
@needs_kernel
def test_no_byte_beyond_the_buffers(tmp_path: Path) -> None:
    """native_bounds.cpp, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    program, here = tmp_path / "bounds", Path(__file__).parent
    flags = ["-std=c++17", "-O1", "-fopenmp", "-w", "-fno-sanitize-recover=all"]
    source = [
        "-I",
        str(Path(lq_graph.__file__).parent / "kernels" / "csrc"),
        str(here / "native_bounds.cpp"),
    ]
    sanitizers = "-fsanitize=address,undefined"
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    compiler = os.environ.get("CXX", "g++")
    try:
        subprocess.run([compiler, sanitizers, str(probe), "-o", str(program)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no compiler with sanitizers")
    subprocess.run([compiler, sanitizers, *flags, *source, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 5000


@needs_kernel
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
        x, weight = numerics.pack_int4(x), numerics.pack_int4(weight)
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
        numerics.pack_int4(values(16, 512, int4=True)),
        numerics.pack_int4(values(256, 512, int4=True)),
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


@pytest.fixture
def asked_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The kernel is looked for anew, and once more afterwards."""
    native._kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._kernel.cache_clear()


@pytest.mark.parametrize("value", ["0", "off", "false", "no", "OFF", " False "])
def test_it_can_be_switched_off(value: str, asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", value)
    assert not native.is_available()


@needs_kernel
@pytest.mark.parametrize("value", ["", "1", "on", "true", "Yes"])
def test_it_can_be_asked_for(value: str, asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", value)
    assert native.is_available()


def test_another_value_is_told(asked_again: pytest.MonkeyPatch) -> None:
    asked_again.setenv("LQ_GRAPH_NATIVE", "perhaps")
    text = "LQ_GRAPH_NATIVE is 'perhaps'; allowed are 0, off, false, no .* not used now"
    with pytest.warns(RuntimeWarning, match=text):
        assert not native.is_available()


def library(path: Path, source: str) -> Path:
    """A library of this C++ source, as an older or another checkout would have built it."""
    path.parent.mkdir(parents=True)
    command = [os.environ.get("CXX", "g++"), "-x", "c++", "-shared", "-fPIC", "-", "-o", str(path)]
    try:
        subprocess.run(command, input=source, text=True, check=True)
    except OSError:
        pytest.skip("no compiler")
    return path


# a kernel that would write where its struct ends, were it called
_OLD = (
    """extern "C" { int lq_matmul_supported() { return 1; } int lq_matmul(void*) { return 0; } }"""
)
_OTHER = _OLD + """ extern "C" const char* lq_matmul_sources() { return "other"; }"""


@pytest.mark.parametrize("source", [_OLD, _OTHER], ids=["older", "other"])
def test_a_library_of_other_sources_is_left_alone(
    source: str, tmp_path: Path, asked_again: pytest.MonkeyPatch
) -> None:
    """Torch computes the same, so it is a warning, once."""
    library(tmp_path / "lib" / native._LIBRARY, source)
    here = str(Path(lq_graph.__file__).parent)
    asked_again.setattr(lq_graph, "__path__", [str(tmp_path), here])
    x, weight, scale = values(4, 64), values(8, 64), torch.rand(8)
    text = "built from other sources than the Python beside it: run pip install -e . again"
    with pytest.warns(RuntimeWarning, match=text):
        out = lq_graph.linear_quant(x, weight, scale, output_dtype=BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert not native.is_available()
    assert torch.equal(out, by_torch(x, weight, scale, output_dtype=BF16))


@needs_kernel
def test_a_struct_of_another_size_is_not_read() -> None:
    kernel = native._kernel()
    assert kernel is not None and kernel(bytes(native._CALL.size + 8), native._CALL.size + 8) == 3


_OLD_STAND_IN = """extern "C" int cann_host_entries() { return 0; }"""


@pytest.mark.parametrize("says", ["", "other"])
def test_the_stand_in_takes_no_library_of_other_sources(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbol = f'extern "C" const char* cann_host_sources() {{ return "{says}"; }}'
    path = library(tmp_path / "lib" / _native.NAMES[0], _OLD_STAND_IN + (says and symbol))
    monkeypatch.setattr(_native, "library_directory", lambda: path.parent)
    text = "were built from other sources than the Python beside them: run pip install -e . again"
    with pytest.raises(cann_host.CannHostError, match=text):
        cann_host._open()


def test_the_libraries_here_are_of_these_sources() -> None:
    directory = _native.library_directory()
    if directory is None or _native.sources() is None:
        pytest.skip("not built here")
    assert _native.built_from(directory) == _native.sources()


# ---- what is not finite, empty, or not there ----

_SPECIAL = [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F802000, 0xFFFFFFFF, 0x00000001, 0x807FFFFF,
            0x7F7FFFFF, 0x80000000, 0x3F800000]  # fmt: skip


def answer(call: Callable[[], np.ndarray]) -> np.ndarray | str:
    """A result, or what is said instead of one."""
    try:
        return call()
    except ValueError as error:
        return "holds NaN or infinity" if "holds NaN or infinity" in str(error) else str(error)


@pytest.mark.parametrize("output", [I8, F16, BF16, I32])
@pytest.mark.parametrize("m", [3, 40])
def test_every_pattern_of_a_packed_scale(m: int, output: torch.dtype) -> None:
    """Any 64 bits: the kernel, torch and the golden give one result, or all refuse."""
    random = np.random.default_rng(m)
    words = random.integers(0, 2**64, 2000, dtype=np.uint64)
    words[::4] &= np.uint64(0xFFFF_FFFF_FF7F_FFFF)  # fewer exponents of all ones
    special = np.array([low | high << 37 for low in _SPECIAL for high in (0, 0x1FF, 0x100, 0x2AB)])
    words = np.concatenate([words, special.astype(np.uint64)]).view(np.int64)
    x, weight = values(m, 17), values(8, 17, seed=1)
    refused = 0
    for start in range(0, len(words), 8 if m == 3 else 40):
        some = torch.from_numpy(words[start : start + 8])
        some = some if len(some) == 8 else some[:1]
        name = str(output).removeprefix("torch.")
        want = answer(
            lambda s=some, n=name: golden.linear_quant(
                x.numpy(), weight.numpy(), s.numpy(), output_dtype=n, packed=True
            )
        )
        for compute in (numerics.quant_matmul, by_torch):
            got = answer(
                lambda s=some, c=compute: cases.as_numpy(c(x, weight, s, output_dtype=output))
            )
            np.testing.assert_array_equal(got, want)
        refused += isinstance(want, str)
    assert (refused > 0) == (output != I32)  # which reads no scale


@pytest.mark.parametrize("pertoken", [False, True])
@pytest.mark.parametrize("output", [F16, BF16])
def test_every_pattern_of_a_float_scale(output: torch.dtype, pertoken: bool) -> None:
    """Float rows follow IEEE: infinity and NaN go through."""
    if output == F16 and not pertoken:
        pytest.skip("the row packs its scale")
    random = np.random.default_rng(0)
    bits = np.concatenate([random.integers(0, 2**32, 390), _SPECIAL]).astype(np.uint32)
    x, weight = values(5, 17), values(8, 17, seed=1)
    for start in range(0, len(bits), 8):
        scale = torch.from_numpy(bits[start : start + 8].view(np.float32))
        row = torch.rand(5) if pertoken else None
        with np.errstate(all="ignore"):
            want = golden.linear_quant(
                x.numpy(), weight.numpy(), scale.numpy(), None,
                None if row is None else row.numpy(),
                output_dtype=str(output).removeprefix("torch."),
            )  # fmt: skip
        for compute in (numerics.quant_matmul, by_torch):
            got = compute(x, weight, scale, pertoken_scale=row, output_dtype=output)
            np.testing.assert_array_equal(cases.as_numpy(got), want)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("int4", [False, True])
def test_sizes_of_zero(int4: bool, kernel: bool) -> None:
    compute = numerics.quant_matmul if kernel else by_torch
    for m, k, n in itertools.product((0, 1, 40), (0, 8, 64), (0, 1, 64)):
        x, weight = torch.ones(m, k, dtype=I8), torch.ones(n, k, dtype=I8)
        if int4:
            x, weight = numerics.pack_int4(x), numerics.pack_int4(weight)
            assert numerics.unpack_int4(x).shape == (m, k)
        for output in (I32, BF16):
            out = compute(x, weight, torch.ones(1), output_dtype=output)
            assert out.shape == (m, n) and bool((out == k).all())
        blocks = numerics.nd_to_nz(weight, 32 // weight.element_size())
        assert torch.equal(numerics.nz_to_nd(blocks, *weight.shape), weight)
        out = compute(x, numerics.NzWeight(blocks, *weight.shape), torch.ones(1), output_dtype=I32)
        assert out.shape == (m, n) and bool((out == k).all())
    for shape in ((0, 5, 16), (2, 0, 16), (2, 5, 0)):
        out = compute(torch.ones(shape, dtype=I8), torch.ones(3, shape[-1], dtype=I8),
                      torch.ones(1), output_dtype=I32)  # fmt: skip
        assert out.shape == (*shape[:-1], 3)


def shortened(tensor: Tensor, count: int) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(count)
    return tensor


@pytest.mark.parametrize("left", [0, 1, 7])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", ["x1", "weight", "scale", "bias", "pertoken_scale"])
def test_a_shortened_storage_is_not_read(name: str, kernel: bool, left: int) -> None:
    """FSDP frees parameters so; a kernel would read beyond their end."""
    compute = numerics.quant_matmul if kernel else by_torch
    given = {
        "x1": values(4, 64), "weight": values(8, 64), "scale": torch.rand(8),
        "bias": torch.rand(8), "pertoken_scale": torch.rand(4),
    }  # fmt: skip
    given[name] = shortened(given[name], left)
    text = rf"linear_quant: {name} has shape .* its storage holds {left}. What to do: make it whole"
    with pytest.raises(LinearQuantValueError, match=text):
        compute(
            given["x1"], given["weight"], given["scale"], bias=given["bias"],
            pertoken_scale=given["pertoken_scale"], output_dtype=BF16,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [True, False])
def test_a_view_beyond_a_shortened_storage_is_not_read(kernel: bool) -> None:
    """As many bytes as the view has are left, but not where it is; and rows that lie apart."""
    compute = numerics.quant_matmul if kernel else by_torch
    for big, view in (
        (values(16, 64), lambda t: t[8:]),
        (values(8, 128), lambda t: t[:, :64]),
    ):
        weight = view(big)
        big.untyped_storage().resize_(8 * 64)
        with pytest.raises(LinearQuantValueError, match="weight has shape"):
            compute(values(4, 64), weight, torch.rand(8), output_dtype=BF16)
    # what has less memory than it has values is whole all the same
    weight = values(1, 64).expand(8, 64)
    compute(values(4, 64), weight, torch.rand(1).expand(8), output_dtype=BF16)


@pytest.mark.parametrize(
    "call",
    [
        lambda: lq_graph.trans_quant_param(shortened(torch.rand(8), 4)),
        lambda: lq_graph.dynamic_quant(shortened(torch.rand(4, 64).half(), 4)),
        lambda: lq_graph.static_quant(shortened(torch.rand(4, 64), 4), torch.ones(1)),
        lambda: lq_graph.pack_int4(shortened(values(4, 64, int4=True), 4)),
        lambda: lq_graph.unpack_int4(shortened(values(4, 64).view(I32), 4)),
        lambda: lq_graph.to_fractal_nz(shortened(values(4, 64), 4)),
        lambda: lq_graph.from_fractal_nz(shortened(values(2, 1, 16, 32), 4), 4, 64),
    ],
)
def test_nor_by_the_other_functions(call: Callable[[], object]) -> None:
    with pytest.raises(LinearQuantValueError, match=r"its storage holds 4\. What to do"):
        call()


# ---- threads and processes ----


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ("4", {"OMP_STACKSIZE": "16k"}),
        ("1000", {"OMP_THREAD_LIMIT": "300"}),
        ("4 more", {}),
    ],
    ids=["small stacks", "more threads than there may be", "fork, and from 12 threads"],
)
def test_in_a_process_of_its_own(arguments: str, environment: dict[str, str]) -> None:
    command = script(f"kernel_threads.py exact {arguments}")
    done = python(*command, TORCH_DEVICE_BACKEND_AUTOLOAD="0", limit=120, **environment)
    assert output_of(done) == "done\n"


def test_the_call_has_the_layout_the_kernel_reads() -> None:
    """struct LqMatmul: seven pointers, seven 64-bit numbers, four 32-bit ones."""
    source = (Path(lq_graph.__file__).parent / "kernels" / "csrc" / "qgemm.cpp").read_text()
    body = source.split("struct LqMatmul {")[1].split("};")[0]
    fields = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
    sizes = ""
    for field in filter(None, fields):
        kind = "q" if "*" in field or field.startswith("int64_t") else "i"
        sizes += kind * (field.count(",") + 1)
    assert sizes == "q" * 14 + "i" * 4 and native._CALL.size == 14 * 8 + 4 * 4
