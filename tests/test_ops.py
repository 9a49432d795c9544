"""The two operators on CPU, meta and under torch.compile: values, shapes, registration."""

from __future__ import annotations

import cases
import golden
import numpy as np
import pytest
import torch
from cases import ALL_CASES, BF16, F16, F32, I8, I32, ROW_CASES, Case
from torch.library import opcheck

import lq_graph

LINEAR_QUANT = torch.ops.lq_graph.linear_quant.default
TRANS_QUANT_PARAM = torch.ops.lq_graph.trans_quant_param.default


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_cpu_equals_golden(case: Case) -> None:
    inputs = cases.make(case)
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_meta_gives_shape_and_dtype_of_cpu(case: Case) -> None:
    inputs = cases.make(case)
    real = lq_graph.linear_quant(**inputs)
    meta = lq_graph.linear_quant(**cases.on("meta", inputs))
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
    assert meta.stride() == real.stride()


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = cases.make(case)
    output_dtype = inputs.pop("output_dtype")
    results = opcheck(LINEAR_QUANT, (), {**inputs, "output_dtype": output_dtype})
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", ROW_CASES[::3], ids=str)
def test_inductor_fullgraph(case: Case, dynamic: bool) -> None:
    torch._dynamo.reset()
    inputs = cases.make(case)
    compiled = torch.compile(lq_graph.linear_quant, fullgraph=True, dynamic=dynamic)
    cases.assert_equal(compiled(**inputs), inputs)


def test_dynamic_m_needs_one_graph() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lq_graph.linear_quant, backend=counter, fullgraph=True, dynamic=True)
    for m in (2, 5, 64):
        inputs = cases.make(Case(m=m, output=BF16, pertoken=True))
        cases.assert_equal(compiled(**inputs), inputs)
    assert counter.frame_count == 1


def test_nine_bit_clip_comes_before_the_offset() -> None:
    # 400 clips to 255, then -200: 55; one clip at the end would give 127
    x1 = torch.full((1, 4), 10, dtype=I8)
    weight = torch.full((1, 4), 10, dtype=I8)
    out = lq_graph.linear_quant(x1, weight, torch.ones(1), torch.tensor([-200.0]))
    assert out.item() == 55


@pytest.mark.parametrize("m", [1, 2, 5, 17, 33])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 31, 63, 65])
@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 65])
def test_accumulator_is_exact_at_odd_sizes(m: int, k: int, n: int) -> None:
    inputs = cases.make(Case(m=m, k=k, n=n, output=I32), seed=m * k * n)
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


def test_accumulator_is_exact_at_the_largest_k() -> None:
    k = 65535
    x1 = torch.full((1, k), -128, dtype=I8)
    out = lq_graph.linear_quant(x1, x1, torch.ones(1), output_dtype=I32)
    assert out.item() == k * 128 * 128


def test_float16_saturates_without_pertoken_and_overflows_with() -> None:
    x1 = torch.full((1, 64), 127, dtype=I8)
    scale = torch.ones(1)
    saturated = lq_graph.linear_quant(x1, x1, scale, output_dtype=F16)
    overflowed = lq_graph.linear_quant(x1, x1, scale, None, scale, output_dtype=F16)
    assert saturated.item() == 65504 and overflowed.item() == float("inf")


def test_packed_scale_ignores_a_separate_offset() -> None:
    inputs = cases.make(Case(offset=True))
    packed = lq_graph.trans_quant_param(inputs["scale"], inputs["offset"])
    twice = lq_graph.linear_quant(inputs["x1"], inputs["weight"], packed, inputs["offset"] * 0.5)
    cases.assert_equal(twice, inputs)


@pytest.mark.parametrize("output", [I8, F16, BF16, I32])
def test_empty_m_gives_empty_output_on_950(output: torch.dtype) -> None:
    lq_graph.set_product("950")
    try:
        out = lq_graph.linear_quant(
            torch.empty(2, 0, 16, dtype=I8), torch.zeros(4, 16, dtype=I8), torch.ones(4),
            output_dtype=output,
        )  # fmt: skip
    finally:
        lq_graph.set_product(None)
    assert (tuple(out.shape), out.dtype) == ((2, 0, 4), output)


def test_non_contiguous_inputs() -> None:
    inputs = cases.make(Case(m=8, k=16, n=16))
    inputs["x1"] = inputs["x1"].t().contiguous().t()
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize(
    ("scale_shape", "offset_shape", "shape"),
    [
        ((1,), None, (1,)),
        ((7,), None, (7,)),
        ((1, 7), None, (1, 7)),
        ((7,), (7,), (7,)),
        ((1,), (7,), (7,)),
        ((7,), (1,), (7,)),
        ((1, 7), (1, 7), (1, 7)),
    ],
)
def test_trans_quant_param(scale_shape, offset_shape, shape, round_mode: int) -> None:
    g = torch.Generator().manual_seed(1)
    scale = torch.randn(scale_shape, generator=g)
    offset = None if offset_shape is None else torch.randn(offset_shape, generator=g) * 200
    out = lq_graph.trans_quant_param(scale, offset, round_mode)
    want = golden.trans_quant_param(
        scale.numpy(), None if offset is None else offset.numpy(), round_mode
    )
    assert out.dtype == torch.int64 and tuple(out.shape) == shape
    np.testing.assert_array_equal(out.numpy(), want)
    assert set(opcheck(TRANS_QUANT_PARAM, (scale, offset, round_mode)).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("scale", "offset", "word"),
    [
        # by hand: float32 1.0 is 0x3F800000, valid bit 46
        (1.0, None, 0x3F800000 | 1 << 46),
        (1.0, 1.0, 0x3F800000 | 1 << 46 | 1 << 37),
        (1.0, -1.0, 0x3F800000 | 1 << 46 | 0x1FF << 37),
        (1.0, 0.5, 0x3F800000 | 1 << 46),  # half to even
        (1.0, 1e9, 0x3F800000 | 1 << 46 | 255 << 37),
        (1.0, -1e9, 0x3F800000 | 1 << 46 | 256 << 37),
        (-1.0, None, 0xBF800000 | 1 << 46),
        (1.00048828125, None, 0x3F800000 | 1 << 46),  # 2**-11 above 1 is truncated
    ],
)
def test_trans_quant_param_words(scale: float, offset: float | None, word: int) -> None:
    o = None if offset is None else torch.tensor([offset])
    assert lq_graph.trans_quant_param(torch.tensor([scale]), o).item() == word


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_trans_quant_param_refuses_what_cannot_be_packed(bad: float) -> None:
    with pytest.raises(lq_graph.LinearQuantValueError, match="scale holds NaN or infinity"):
        lq_graph.trans_quant_param(torch.tensor([1.0, bad]))


def test_round_mode_differs_where_it_should() -> None:
    above_half = torch.tensor([1 + 2.0**-11 + 2.0**-20], dtype=F32)
    truncated, rounded = (lq_graph.trans_quant_param(above_half, None, r).item() for r in (0, 1))
    assert rounded - truncated == 1 << 13


def test_runs_under_inference_mode_and_autocast() -> None:
    inputs = cases.make(Case(output=F16))
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        cases.assert_equal(lq_graph.linear_quant(**inputs), inputs)


def test_torch_export_keeps_the_op_and_the_value() -> None:
    inputs = cases.make(Case(offset=True, bias=I32))
    layer = lq_graph.LinearQuant(40, 24, offset=True)
    for name in ("weight", "scale", "offset", "bias"):
        getattr(layer, name).data = inputs[name]
    m = torch.export.Dim("m", min=2, max=64)
    program = torch.export.export(layer, (inputs["x1"],), dynamic_shapes=({0: m},))
    assert LINEAR_QUANT in [node.target for node in program.graph.nodes]
    longer = cases.make(Case(m=9))["x1"]
    assert torch.equal(program.module()(longer), layer(longer))
    cases.assert_equal(program.module()(inputs["x1"]), inputs)
