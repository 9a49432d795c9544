"""dynamic_quant and static_quant: against a plain numpy golden, on CPU and NPU, under fake tensors,
in graphs, and beside the vendor's own operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch_npu
from torch import Tensor

import lq_graph
from cann_host import chips
from lq_graph import LinearQuantTypeError, LinearQuantValueError, kernels
from lq_graph.kernels import Arithmetic, native
from lq_graph.rules import tables
from lq_graph.rules.activations import dynamic_arithmetic
from lq_graph.rules.tables import A2, A3, Product
from support import cases, golden
from support.activations import as_numpy, check_dynamic, check_static, make
from support.lowering import compiled

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
I8, I32 = torch.int8, torch.int32

SHAPES = [(1, 8), (5, 64), (3, 7, 40), (2, 1, 3, 256), (4, 1000)]


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("out", [None, I8, I32])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dynamic_quant(
    shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype | None, device: str
) -> None:
    x = make(shape, dtype)
    check_dynamic(lq_graph.dynamic_quant(x.to(device), dtype=out), x, out == I32)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("out", [I8, I32])
def test_many_rows(out: torch.dtype, dtype: torch.dtype) -> None:
    """Enough values that a factor one unit in the last place off would show."""
    x = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    check_dynamic(lq_graph.dynamic_quant(x, dtype=out), x, out == I32)


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("offset", [None, -128.0, 3.0])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("shape", [(8,), *SHAPES], ids=str)
def test_static_quant(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    per_channel: bool,
    offset: float | None,
    device: str,
) -> None:
    x = make(shape, dtype)
    size = shape[-1] if per_channel else 1
    reciprocal = torch.linspace(3.0, 90.0, size).to(dtype)
    zero = None if offset is None else torch.full((size,), offset, dtype=dtype)
    got = lq_graph.static_quant(
        x.to(device), reciprocal.to(device), None if zero is None else zero.to(device)
    )
    check_static(got, x, reciprocal, offset or 0.0)


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_rounding_is_half_to_even_and_clamped(device: str) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 300.0, -128.5, -300.0])
    got = lq_graph.static_quant(x.to(device), torch.ones(1, device=device))
    assert got.tolist() == [0, 2, 2, 0, -2, -2, 126, 127, 127, -128, -128]


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_infinity_show_in_the_scale(bad: float, device: str) -> None:
    x = torch.ones(2, 8, dtype=F16)
    x[0, 3] = bad
    quantized, scale = lq_graph.dynamic_quant(x.to(device))
    assert quantized[0].eq(0).all() and not scale[0].isfinite()
    assert quantized[1].eq(127).all() and scale[1].isfinite()


def test_subnormal_bfloat16_rows_do_not_overflow() -> None:
    x = torch.tensor([[1e-39, -1e-39, 0.0, 5e-40]]).to(BF16)
    quantized, _ = lq_graph.dynamic_quant(x)
    assert quantized.tolist() == [[127, -128, 0, 127]]


def test_views() -> None:
    x = make((6, 64), F16)
    for view in (x.t().contiguous().t(), x[::2], x[:, 8:24], x[:1].expand(4, 64)):
        for out in (I8, I32):
            for device in ("cpu", "npu"):
                check_dynamic(lq_graph.dynamic_quant(view.to(device), dtype=out), view, out == I32)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("out", [I8, I32])
def test_opcheck_dynamic(out: torch.dtype, dtype: torch.dtype) -> None:
    op = torch.ops.lq_graph.dynamic_quant.default
    torch.library.opcheck(op, (make((3, 7, 40), dtype),), {"dtype": out})


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize("offset", [False, True])
def test_opcheck_static(offset: bool, dtype: torch.dtype) -> None:
    one = torch.ones(1, dtype=dtype)
    args = (make((3, 7, 40), dtype), one * 20, one * 5 if offset else None)
    torch.library.opcheck(torch.ops.lq_graph.static_quant.default, args)


# ---- beside the vendor ----


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("out", [I8, I32])
def test_meta_shapes_are_the_vendors(out: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.empty(3, 7, 40, dtype=dtype, device="meta")
    ours = lq_graph.dynamic_quant(x, dtype=out)
    vendors = torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2 if out == I32 else I8)
    for a, b in zip(ours, vendors, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("out", [I8, I32])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(5, 64), (3, 7, 40)], ids=str)
def test_dynamic_quant_in_a_graph(
    shape: tuple[int, ...], dtype: torch.dtype, out: torch.dtype, dynamic: bool
) -> None:
    x = make(shape, dtype)
    got, graph = compiled(lambda x: lq_graph.dynamic_quant(x, dtype=out), x.npu(), dynamic=dynamic)
    check_dynamic(got, x, out == I32)
    node = next(node for node in graph.compute if node.op == "DynamicQuant")
    assert [edge.dtype for edge in node.outputs] == ["int4" if out == I32 else "int8", "float32"]
    if out == I8:
        assert graph.ops() == ["DynamicQuant"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_static_quant_in_a_graph(dtype: torch.dtype, dynamic: bool) -> None:
    x, reciprocal = make((3, 7, 40), dtype), torch.tensor([20.0], dtype=dtype)
    offset = torch.tensor([-7.0], dtype=dtype)
    got, graph = compiled(
        lq_graph.static_quant, x.npu(), reciprocal.npu(), offset.npu(), dynamic=dynamic
    )
    assert torch.equal(got.cpu(), lq_graph.static_quant(x, reciprocal, offset))
    assert graph.ops() == ["AscendQuantV2"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_int4_stays_int4_between_the_two_operators(dynamic: bool) -> None:
    layer = lq_graph.LinearQuant(
        64, 32, bias=False, pertoken_scale=True, output_dtype=F16, dtype=I32
    )
    layer.weight.data = lq_graph.pack_int4(
        torch.randint(-8, 8, (32, 64), dtype=I8, generator=torch.Generator().manual_seed(0))
    )

    def run(x: Tensor) -> Tensor:
        return layer(*lq_graph.dynamic_quant(x, dtype=I32))

    x = make((5, 64), F16)
    want = run(x)
    layer.npu()
    got, graph = compiled(run, x.npu(), dynamic=dynamic)
    assert torch.equal(got.cpu(), want)
    # nothing but the weight's own Bitcast and Reshape between them
    ops = ["DynamicQuant", "Bitcast", "Reshape", "QuantBatchMatmulV3"]
    assert sorted(graph.ops()) == sorted(ops)


# ---- refusals ----


@pytest.mark.parametrize("device", ["cpu", "npu", "meta"])
@pytest.mark.parametrize(
    ("product", "call", "error", "text"),
    [
        (
            "A2",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 8, device=d)),
            LinearQuantTypeError,
            r"dynamic_quant: x is float32; Atlas A2 allows float16 or bfloat16. What to do: pass "
            r"x.to\(torch.bfloat16\) \(changes the numbers: x is rounded to bfloat16\)",
        ),
        (
            "310P",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 8, device=d, dtype=BF16)),
            LinearQuantTypeError,
            r"x is bfloat16; Atlas inference \(310P\) allows float16",
        ),
        (
            "310P",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 8, device=d, dtype=F16), dtype=I32),
            LinearQuantTypeError,
            r"dtype is int32; Atlas inference \(310P\) allows int8",
        ),
        (
            "A2",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 8, device=d, dtype=F16), dtype=F16),
            LinearQuantTypeError,
            r"dtype is float16; Atlas A2 allows int8 or int32 \(int4\)",
        ),
        (
            "A2",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 12, device=d, dtype=F16), dtype=I32),
            LinearQuantValueError,
            r"x has k = 12; allowed is a multiple of 8 for int4",
        ),
        (
            "A2",
            lambda d: lq_graph.dynamic_quant(torch.ones(8, device=d, dtype=F16)),
            LinearQuantValueError,
            r"x has 1 dims, shape \(8,\); allowed is 2 to 8",
        ),
        (
            "A2",
            lambda d: lq_graph.dynamic_quant(torch.ones(2, 0, device=d, dtype=F16)),
            LinearQuantValueError,
            "k is 0",
        ),
        (
            "A2",
            lambda d: lq_graph.static_quant(
                torch.ones(2, 8, device=d, dtype=F16), torch.ones(1, device=d)
            ),
            LinearQuantTypeError,
            "scale_reciprocal is float32 and x float16; allowed is one dtype for both",
        ),
        (
            "A2",
            lambda d: lq_graph.static_quant(
                torch.ones(2, 8, device=d), torch.ones(3, device=d)
            ),
            LinearQuantValueError,
            r"scale_reciprocal has shape \(3,\); allowed is \(1,\) or \(k,\) = \(8,\)",
        ),
        (
            "A2",
            lambda d: lq_graph.static_quant(
                torch.ones(2, 8, device=d), torch.ones(8, device=d), torch.ones(1, device=d)
            ),
            LinearQuantValueError,
            "offset has 1 values and scale_reciprocal 8; allowed is as many values as ",
        ),
        (
            "310P",
            lambda d: lq_graph.static_quant(
                torch.ones(2, 8, device=d, dtype=BF16), torch.ones(1, device=d, dtype=BF16)
            ),
            LinearQuantTypeError,
            r"static_quant: x is bfloat16; Atlas inference \(310P\) allows float16 or float32",
        ),
    ],
)  # fmt: skip
def test_refusals(
    product: str, call: Callable[[str], Any], error: type[Exception], text: str, device: str
) -> None:
    lq_graph.set_product(product)
    try:
        with pytest.raises(error, match=text) as caught:
            call(device)
    finally:
        lq_graph.set_product(None)
    assert "(aclnn would report 161002)" in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_half_a_step(shape: tuple[int, ...]) -> None:
    x = make(shape, F16)
    for bits in (8, 4):
        values, scale = kernels.dynamic_quant(x, bits, Arithmetic.MULTIPLY)
        error = (values.float() * scale.unsqueeze(-1) - x.float()).abs()
        assert (error <= scale.unsqueeze(-1) * 0.5001).all()


# ---- each chip's own arithmetic ----

# which kernel A2 and A3 choose, by k: dynamic_quant_tiling.cpp (hicann/ops-nn)
LONG = [
    (15040, "multiply"),
    (15041, "reciprocal"),
    (15048, "multiply"),
    (16320, "multiply"),
    (16321, "reciprocal"),
    (16328, "reciprocal"),
    (17776, "reciprocal"),
    (17792, "reciprocal"),
    (32768, "reciprocal"),
]
LONG_SMOOTH = [
    (10288, "multiply"),
    (10289, "reciprocal"),
    (10296, "multiply"),
    (12800, "multiply"),
    (12808, "reciprocal"),
    (16384, "reciprocal"),
]


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize(("k", "arithmetic"), LONG)
def test_long_rows(k: int, arithmetic: str, device: str) -> None:
    x = torch.randn(40, k, generator=torch.Generator().manual_seed(k)).to(BF16)
    check_dynamic(lq_graph.dynamic_quant(x.to(device)), x, False, arithmetic)
    both = [golden.dynamic_quant(as_numpy(x), 127, one)[1] for one in ("multiply", "reciprocal")]
    assert (both[0] != both[1]).any()  # else it would not show


@pytest.mark.parametrize(("smooth", "table"), [(False, LONG), (True, LONG_SMOOTH)])
@pytest.mark.parametrize("product", [A2, A3])
def test_the_kernel_that_is_chosen(
    product: Product, smooth: bool, table: list[tuple[int, str]]
) -> None:
    for k, arithmetic in table:
        assert kernels.for_rows(product.dynamic_quant, k, smooth=smooth).value == arithmetic, k
        assert smooth or dynamic_arithmetic(product, k).value == arithmetic
    for k in (1, 8, 100, 120, 127, 129, 4096, 5120, 10240):
        for groups, wanted in ((False, Arithmetic.MULTIPLY), (True, Arithmetic.RECIPROCAL)):
            found = kernels.for_rows(product.dynamic_quant, k, smooth=smooth, groups=groups)
            assert found is wanted, k


@pytest.mark.parametrize(
    "soc", ["Ascend310P3", "Ascend910B2", "Ascend910_9391", "Ascend950PR_9579"]
)
def test_the_stand_in_computes_as_the_product_does(soc: str) -> None:
    """Two tables, as for the rules: what is compared here with one another, is elsewhere with the
    golden."""
    product = tables.product_of_soc(soc)
    assert product is not None
    scale = torch.tensor([1.0000001])
    read = chips.scale_as_read(soc, scale, None, None, BF16)
    assert torch.equal(read, kernels.s19(scale)) == product.cuts_scale
    for k in (64, 20_000):
        assert chips.dynamic_arithmetic(soc, k) is dynamic_arithmetic(product, k)


CHIPS = [
    ("310P", "half", I8, F16),
    *(
        (product, arithmetic, out, dtype)
        for product, arithmetic in (("A2", "multiply"), ("A3", "multiply"), ("950", "divide"))
        for out in (I8, I32)
        for dtype in (F16, BF16)
    ),
]


@pytest.mark.parametrize(("product", "arithmetic", "out", "dtype"), CHIPS)
@pytest.mark.parametrize("spread", [3.0, 1e-4, 400.0])
def test_products(
    product: str, arithmetic: str, out: torch.dtype, dtype: torch.dtype, spread: float
) -> None:
    """Rows of zeros, of one value, of tiny and of large values, enough of them to differ."""
    x = make((3000, 64), dtype, spread)
    lq_graph.set_product(product)
    try:
        got = lq_graph.dynamic_quant(x, dtype=out)
    finally:
        lq_graph.set_product(None)
    check_dynamic(got, x, out == I32, arithmetic)
    if product in ("310P", "950") and out == I8 and spread == 3.0:
        values, _ = golden.dynamic_quant(as_numpy(x), 127)
        assert (as_numpy(got[0]) != values).any()


def test_310p_takes_multiples_of_32() -> None:
    lq_graph.set_product("310P")
    try:
        with pytest.raises(
            LinearQuantValueError, match=r"k = 40; .* allows a multiple of 32\. What"
        ):
            lq_graph.dynamic_quant(torch.ones(2, 40, dtype=F16))
    finally:
        lq_graph.set_product(None)


@pytest.mark.parametrize("arithmetic", list(Arithmetic))
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_nan_and_infinity_show_in_every_scale(bad: float, arithmetic: Arithmetic) -> None:
    x = torch.ones(2, 64, dtype=F16)
    x[0, 3] = bad
    values, scale = kernels.dynamic_quant(x, 8, arithmetic)
    want, want_scale = golden.dynamic_quant(x.numpy(), 127, arithmetic.value)
    np.testing.assert_array_equal(values.numpy(), want)
    np.testing.assert_array_equal(scale.numpy(), want_scale)
    assert not values[0].any() and not scale[0].isfinite() and scale[1].isfinite()


WITH_OFFSET = [(one, bits) for one in Arithmetic for bits in (8, 4)]
WITH_OFFSET.remove((Arithmetic.HALF, 4))  # 310P has int8 only


@pytest.mark.parametrize(("arithmetic", "bits"), WITH_OFFSET)
@pytest.mark.parametrize("move", [0.0, 2.0, -300.0])
def test_with_an_offset(arithmetic: Arithmetic, bits: int, move: float) -> None:
    """Asymmetric, as DynamicQuantV2 computes it."""
    x = (make((2000, 64), F32) + move).to(F16)
    top = 127 if bits == 8 else 7
    got = kernels.dynamic_quant_with_offset(x, bits, arithmetic)
    want = golden.dynamic_quant_with_offset(x.numpy(), top, arithmetic.value)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    values, scale, offset = (t.double() for t in got)
    finite = scale > 1e-6  # not a row of one value
    error = ((values - offset[:, None]) * scale[:, None] - x.double()).abs()[finite]
    loose = 40 if arithmetic is Arithmetic.HALF else 1
    assert (error <= loose * scale[finite, None]).all()


# ---- Ascend 950 cuts a float32 scale of one value ----

CUT = [
    # scale values, pertoken, bias, whether it is cut
    (1, False, None, True),
    (1, False, I32, True),
    (1, False, BF16, False),
    (1, False, F32, False),
    (1, True, None, False),
    (1, True, I32, False),
    (24, False, None, False),
    (24, False, I32, False),
]


@pytest.fixture
def any_product() -> Iterator[None]:
    """A test that sets the product."""
    yield
    lq_graph.set_product(None)


@pytest.mark.parametrize("product", ["A2", "A3", "950"])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("size", "pertoken", "bias", "cut"), CUT)
def test_a_scale_that_is_cut(
    size: int, pertoken: bool, bias: torch.dtype | None, cut: bool, product: str, kernel: bool,
    monkeypatch: pytest.MonkeyPatch, any_product: None,
) -> None:  # fmt: skip
    if not kernel:
        monkeypatch.setattr(native, "loaded", lambda: None)
    case = cases.Case(
        scale=F32, output=BF16, m=15, pertoken=pertoken, bias=bias, scalar_scale=size == 1
    )
    inputs = cases.make(case, seed=1)
    lq_graph.set_product(product)
    out = lq_graph.linear_quant(**inputs)
    cases.assert_equal(out, inputs)
    whole = {**inputs, "scale": kernels.s19(inputs["scale"])}
    with_cut = lq_graph.linear_quant(**whole)
    assert torch.equal(out, with_cut) == (cut and product == "950")


def test_a_bfloat16_scale_has_nothing_to_cut(any_product: None) -> None:
    inputs = cases.make(cases.Case(scale=BF16, output=BF16, scalar_scale=True))
    want = lq_graph.linear_quant(**inputs)
    lq_graph.set_product("950")
    assert torch.equal(lq_graph.linear_quant(**inputs), want)
