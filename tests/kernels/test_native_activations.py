"""Activations quantized by the compiled CPU kernel: bit-equal to what torch computes, with each
instruction set, at every edge of its blocks, on any strides, with any number of threads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import lq_graph
from lq_graph import kernels
from lq_graph.kernels import Arithmetic, calls, library, native
from support import golden, golden_fused
from support.activations import as_numpy, make
from support.native import BF16, F16, F32, I8, I32, needs_kernel, without_kernel

pytestmark = [pytest.mark.native, needs_kernel]

F64 = torch.float64
WIDTHS = (1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4096, 4097)
# bits, and whether they are packed
VALUES = [(8, False), (4, False), (4, True)]

each_dtype = pytest.mark.parametrize("dtype", [F16, BF16, F32])
each_arithmetic = pytest.mark.parametrize("arithmetic", list(Arithmetic))


def each_instruction_set() -> Iterator[str]:
    """The names; while one is used, so is the instruction set."""
    for name in library.instruction_sets():
        with library.using(name):
            yield name


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal in dtype, shape and value, and contiguous, as the fake kernels say; NaN is equal to
    NaN."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert got.is_contiguous() and want.is_contiguous()
    if not torch.equal(got, want):  # of numbers and NaN, only floats
        assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0))
        assert torch.equal(got.isnan(), want.isnan())


def assert_dynamic(x: Tensor, arithmetic: Arithmetic, bits: int = 8, packed: bool = False) -> None:
    with without_kernel():
        want = kernels.dynamic_quant(x, bits, arithmetic, packed=packed)
    for _ in each_instruction_set():
        got = native.dynamic_quant(x, bits, arithmetic.number, packed)
        assert got is not None
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)


def assert_static(
    x: Tensor, reciprocal: Tensor, offset: Tensor | None, bits: int = 8, packed: bool = False
) -> None:
    with without_kernel():
        want = kernels.static_quant(x, reciprocal, offset, bits=bits, packed=packed)
    for _ in each_instruction_set():
        got = native.static_quant(x, reciprocal, offset, -1, bits, packed)
        assert got is not None
        assert_same(got, want)


def normal(m: int, k: int) -> Tensor:
    return make((m, k), F32)


def halves(m: int, k: int) -> Tensor:
    """Halves of the step, if the peak is 127 or 7: each is rounded one way or the other."""
    x = torch.arange(m * k, dtype=F32).remainder(28) / 2 - 7
    x = x.reshape(m, k) * torch.tensor([1.0, 18.0])[torch.arange(m) % 2, None]
    x[:, 0] = torch.tensor([7.0, 127.0])[torch.arange(m) % 2]
    return x


def of_all_sizes(m: int, k: int) -> Tensor:
    """Each row of another size, from subnormal to infinite, with a zero."""
    generator = torch.Generator().manual_seed(k)
    exponents = torch.randint(-46, 39, (m, 1), generator=generator)
    x = torch.randn(m, k, generator=generator) * 10.0**exponents
    x[:, k // 2] = 0
    return x


SPECIAL = [
    0.0, -0.0, 1.0, -0.5, 65504.0, -65504.0, 65519.0, 6e-8, 1e-7, 1e-12, 1.1e-12, 9e-13, 1e-30,
    1.1e-30, 1e30, 3.4e38, -3.4e38, 1e-36, 3.7e-37, 1e-38, 1e-40, 1e-45, 0.01, 0.011, 127.0, 2.5e-3,
]  # fmt: skip
NO_NUMBERS = [float("inf"), float("-inf"), float("nan")]


def special(m: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(m * k)
    return torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (m, k), generator=generator)]


def no_numbers(m: int, k: int) -> Tensor:
    """One infinity or NaN in each row but the first, at every place of a block."""
    x = special(m, k).clamp(-100, 100)
    for row in range(1, m):
        x[row, row * 7 % k] = NO_NUMBERS[row % 3]
    return x


ROWS: list[Callable[[int, int], Tensor]] = [normal, halves, of_all_sizes, special, no_numbers]


@each_dtype
@each_arithmetic
@pytest.mark.parametrize("rows", ROWS)
def test_dynamic(
    rows: Callable[[int, int], Tensor], arithmetic: Arithmetic, dtype: torch.dtype
) -> None:
    for k in WIDTHS:
        for m in (1, 3, 17) if rows is normal else (17,):
            x = rows(m, k).to(dtype)
            for bits, packed in VALUES:
                if not packed or k % 8 == 0:
                    assert_dynamic(x, arithmetic, bits, packed)


@each_arithmetic
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_every_peak_of_16_bits(dtype: torch.dtype, arithmetic: Arithmetic) -> None:
    """A row for each pattern: the pattern, its half, its negative, zero and the least number."""
    peak = torch.arange(1 << 16, dtype=I32).to(torch.int16).view(dtype).unsqueeze(-1)
    least = torch.ones_like(peak, dtype=torch.int16).view(dtype)
    x = torch.cat([peak, peak * 0.5, -peak, peak * 0.25, peak * 0, least, peak, -peak * 0.75], 1)
    for bits, packed in VALUES:
        assert_dynamic(x, arithmetic, bits, packed)


@each_arithmetic
@pytest.mark.parametrize("top", [127, 7])
def test_dynamic_is_the_goldens(top: int, arithmetic: Arithmetic) -> None:
    if arithmetic is Arithmetic.HALF and top == 7:
        pytest.skip("310P has int8 only")
    x = make((200, 264), F16)
    quantize = golden_fused.quantize_rows if arithmetic is Arithmetic.STEP else golden.dynamic_quant
    values, scale = quantize(as_numpy(x), top, arithmetic.value)
    for _ in each_instruction_set():
        got = native.dynamic_quant(x, 8 if top == 127 else 4, arithmetic.number, False)
        assert got is not None
        np.testing.assert_array_equal(got[0], values)
        np.testing.assert_array_equal(got[1], scale)


@each_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["one", "each"])
def test_static(
    each: bool, offset: bool, rows: Callable[[int, int], Tensor], dtype: torch.dtype
) -> None:
    for k in WIDTHS:
        x = rows(3, k).to(dtype)
        reciprocal = torch.rand(k if each else 1).add(0.5).mul(20).to(dtype)
        points = torch.randint(-40, 40, reciprocal.shape).to(dtype) if offset else None
        for bits, packed in VALUES:
            if not packed or k % 8 == 0:
                assert_static(x, reciprocal, points, bits, packed)


def test_static_is_the_goldens() -> None:
    x, reciprocal = make((70, 264), F32), torch.rand(264) * 30
    want = golden.static_quant(x.numpy(), reciprocal.numpy(), 3.0)
    for _ in each_instruction_set():
        got = native.static_quant(x, reciprocal, torch.full((264,), 3.0), -1, 8, False)
        assert got is not None
        np.testing.assert_array_equal(got, want)


# ---- memory ----

BIG = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
STRIDES = {
    "every second row": lambda x: x[::2],
    "columns": lambda x: x[:, 3:131],
    "one row again and again": lambda x: x[3:4].expand(9, 300),
    "transposed": lambda x: x.t(),
    "one column": lambda x: x[:, :1],
    "an odd address": lambda x: x.reshape(-1)[7:2707].view(9, 300),
    "rows that overlap": lambda x: x.reshape(-1).as_strided((9, 300), (1, 1)),
    "three dims": lambda x: x.view(4, 16, 300)[:, ::3, 8:40],
    "one dim": lambda x: x[5],
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
@each_dtype
def test_strides(dtype: torch.dtype, view: Callable[[Tensor], Tensor]) -> None:
    x = view(BIG.to(dtype))
    assert_dynamic(x, Arithmetic.MULTIPLY)
    k = x.shape[-1]
    wide = torch.rand(k, 2).to(dtype) * 50
    for reciprocal, offset in (
        (wide[:, 1], wide[:, 0]),
        (wide[:1, 0].expand(k), wide[:, 1]),
        (wide[0, 0], None),
    ):
        assert_static(x, reciprocal, offset)


PROT_NONE = 0  # of mprotect; Python's mmap does not name it


def guarded(count: int) -> Tensor:
    """Bytes that end where an unreadable page begins."""
    page = mmap.PAGESIZE
    size = -(-count // page) * page
    memory = mmap.mmap(-1, size + page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + size), page, PROT_NONE) == 0
    return whole[size - count : size]


@each_dtype
@pytest.mark.parametrize("arithmetic", [Arithmetic.MULTIPLY, Arithmetic.HALF])
def test_no_byte_beyond_the_buffers(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """Reading or writing behind them ends the process."""
    found = library.loaded()
    assert found is not None
    number = calls.FLOATS[dtype]
    for k in WIDTHS:
        m, width = 2, dtype.itemsize
        x, factor = guarded(m * k * width).view(dtype), guarded(k * width).view(dtype)
        x.copy_(normal(m, k).view(-1))
        factor.fill_(3)
        scale = guarded(4 * m)
        for bits, packed in VALUES:
            if packed and k % 8:
                continue
            out = guarded(m * k // (2 if packed else 1))
            form = 0 if bits == 8 else 1 if packed else 2
            for arithmetic_number in (arithmetic.number, calls.STATIC):
                call = calls.QUANTIZE.pack(
                    x.data_ptr(), factor.data_ptr(), factor.data_ptr(), out.data_ptr(),
                    scale.data_ptr(), m, k, k * width, 1, number, arithmetic_number, form, 1,
                )  # fmt: skip
                for _ in each_instruction_set():
                    assert found.quantize(call, len(call)) == 0


def test_a_shortened_storage_is_not_read() -> None:
    x, one = torch.ones(4, 64, dtype=F16), torch.ones(1, dtype=F16)
    columns = x[:, :32]
    x.untyped_storage().resize_(40)
    for rows in (x, columns):
        with pytest.raises(kernels.ShortStorageError, match="x has shape"):
            kernels.dynamic_quant(rows, 8, Arithmetic.MULTIPLY)
        with pytest.raises(kernels.ShortStorageError, match="x has shape"):
            kernels.static_quant(rows, one)
    one.untyped_storage().resize_(0)
    with pytest.raises(kernels.ShortStorageError, match="scale_reciprocal has shape"):
        kernels.static_quant(torch.ones(4, 64, dtype=F16), one)


# ---- which calls ----


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(1, 70000), (2, 40000), (17, 4096), (300, 1000), (5, 60, 256)])
def test_threads(shape: tuple[int, ...], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_dynamic(make(shape, F16), Arithmetic.MULTIPLY)
        assert_dynamic(make(shape, BF16), Arithmetic.DIVIDE, 4, packed=True)
    finally:
        torch.set_num_threads(before)


class Marked(Tensor):
    pass


LEFT = {
    "float64": torch.ones(2, 8, dtype=F64),
    "on meta": torch.ones(2, 8, device="meta"),
    "no rows": torch.ones(0, 8),
    "a subclass": torch.ones(2, 8).as_subclass(Marked),
}


@pytest.mark.parametrize("x", LEFT.values(), ids=LEFT)
def test_left_to_torch(x: Tensor) -> None:
    one = torch.ones(1, dtype=x.dtype, device=x.device)
    assert native.dynamic_quant(x, 8, 0, False) is None
    assert native.static_quant(x, one, None, -1, 8, False) is None
    values, scale = kernels.dynamic_quant(x, 8, Arithmetic.MULTIPLY)
    for got in (values, kernels.static_quant(x, one)):
        assert got.dtype == I8 and got.shape == x.shape
    assert scale.shape == x.shape[:-1]


def test_static_scales_left_to_torch() -> None:
    x, rows = make((3, 8), F16), torch.tensor([1.0, 2.0, 4.0])
    assert native.static_quant(x, rows.half(), None, 0, 8, False) is None  # along another axis
    assert native.static_quant(x, rows[:1], None, -1, 8, False) is None  # another dtype
    want = (x.float() * rows[:, None]).round().clamp(-128, 127).to(I8)
    assert_same(kernels.static_quant(x, rows.half(), axis=0), want)


@pytest.mark.parametrize("kernel", [True, False])
def test_packed_needs_whole_groups(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:
        monkeypatch.setattr(native, "loaded", lambda: None)
    for call in (
        lambda x: kernels.dynamic_quant(x, 4, Arithmetic.MULTIPLY, packed=True),
        lambda x: kernels.static_quant(x, x[0, :1], bits=4, packed=True),
    ):
        with pytest.raises(kernels.PartialGroupError, match="12"):
            call(torch.ones(2, 12))


@pytest.mark.parametrize("product", ["310P", "A2", "950"])
def test_the_operators_use_it(product: str) -> None:
    x = make((3, 5, 64), F16)
    lq_graph.set_product(product)
    try:
        for output in (I8, I32)[: 1 if product == "310P" else 2]:
            got = lq_graph.dynamic_quant(x, dtype=output)
            with without_kernel():
                want = lq_graph.dynamic_quant(x, dtype=output)
            for one, other in zip(got, want, strict=True):
                assert_same(one, other)
    finally:
        lq_graph.set_product(None)
