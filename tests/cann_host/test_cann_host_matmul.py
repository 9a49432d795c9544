"""The quantized matmul of torch_npu, TransQuantParam and format casts, in eager mode."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import cann_host
from cann_host import runtime
from cann_host.options import Options
from lq_graph.backends.npu import cast_format
from support import golden
from support.eager import (
    BF16,
    F16,
    F32,
    I8,
    I32,
    Inputs,
    as_numpy,
    assert_same,
    pretend,
    refused,
    values,
)

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
ND, FRACTAL_NZ = 2, 29


@pytest.fixture
def internal_formats() -> Any:
    """Let tensors have FRACTAL_NZ, as the vendor's examples do."""
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False  # its default on this product; not readable


A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"


# The A2 table: x dtype, scale dtype ("packed": by npu_trans_quant_param first), offset, bias
# dtypes, pertoken, output dtype.
ROWS: list[tuple[torch.dtype, Any, bool, list[torch.dtype | None], bool, torch.dtype]] = [
    (I8, "packed", False, [None, I32], False, F16),
    (I8, F32, False, [None, I32], False, F16),
    (I8, "packed", True, [None, I32], False, I8),
    (I8, F32, True, [None, I32], False, I8),
    (I8, F32, False, [None, I32], False, I8),
    (I8, F32, False, [None, I32, BF16, F32], False, BF16),
    (I8, BF16, False, [None, I32, BF16, F32], False, BF16),
    (I8, F32, False, [None, I32, BF16, F32], True, BF16),
    (I8, BF16, False, [None, I32, BF16, F32], True, BF16),
    (I8, F32, False, [None, I32, F16, F32], True, F16),
    (I32, "packed", False, [None, I32], False, F16),
    (I32, F32, False, [None, I32], False, F16),
    (I8, F32, False, [None, I32], False, I32),
    (I8, BF16, False, [None, I32], False, I32),
]

CASES = [
    pytest.param(x, scale, offset, bias, pertoken, out, id=f"{i}-{bias}")
    for i, (x, scale, offset, biases, pertoken, out) in enumerate(ROWS)
    for bias in biases
]


@pytest.mark.parametrize(("x", "scale", "offset", "bias", "pertoken", "out"), CASES)
def test_quant_matmul(
    x: torch.dtype,
    scale: Any,
    offset: bool,
    bias: torch.dtype | None,
    pertoken: bool,
    out: torch.dtype,
) -> None:
    inputs = Inputs(x, scale, offset, bias, pertoken)
    assert_same(inputs.on_npu(out), inputs.by_golden(out))


@pytest.mark.parametrize(
    "shape",
    [
        {"m": 1, "k": 32, "n": 16},
        {"m": 33, "k": 100, "n": 7},
        {"m": 3, "k": 64, "n": 64, "batch": (2,)},
        {"m": 3, "k": 40, "n": 24, "batch": (2, 3)},
        {"scale_length": 1},
    ],
    ids=str,
)
def test_quant_matmul_shapes(shape: dict[str, Any]) -> None:
    inputs = Inputs(bias=I32, **shape)
    assert_same(inputs.on_npu(I8), inputs.by_golden(I8))


@pytest.mark.usefixtures("internal_formats")
@pytest.mark.parametrize("shape", [(48, 64), (16, 32), (50, 70), (128, 512)], ids=str)
def test_quant_matmul_with_fractal_nz_weight(shape: tuple[int, int]) -> None:
    inputs = Inputs(offset=True, bias=I32, n=shape[0], k=shape[1])
    assert_same(inputs.on_npu(I8, FRACTAL_NZ), inputs.by_golden(I8))


def test_quant_matmul_with_an_untransposed_weight() -> None:
    inputs = Inputs(bias=I32)
    result = torch_npu.npu_quant_matmul(
        inputs.x1.npu(),
        inputs.weight.t().contiguous().npu(),
        inputs.scale.npu(),
        bias=inputs.bias.npu(),
        output_dtype=I8,
    )
    assert_same(result, inputs.by_golden(I8))


@pytest.mark.parametrize("round_mode", [0, 1])
@pytest.mark.parametrize(
    ("scale", "offset"),
    [((1,), None), ((7,), None), ((7,), (7,)), ((1,), (7,)), ((7,), (1,)), ((1, 7), None)],
    ids=str,
)
def test_trans_quant_param(
    scale: tuple[int, ...], offset: tuple[int, ...] | None, round_mode: int
) -> None:
    s = values(*scale).abs() / 100
    o = None if offset is None else values(*offset, seed=1) * 10
    got = torch_npu.npu_trans_quant_param(
        s.npu(), None if o is None else o.npu(), round_mode=round_mode
    )
    assert got.dtype == torch.int64
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o), round_mode))


@pytest.mark.parametrize("soc", [A2, A950, P310])
@pytest.mark.parametrize("offset", [(7,), (1, 7)], ids=str)
def test_one_scale_and_an_offset_each_are_as_many_words(
    offset: tuple[int, ...], soc: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch_npu makes the result, long enough; what a graph declares is another thing."""
    pretend(monkeypatch, soc)
    s, o = values(1).abs() / 100, values(*offset, seed=1) * 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch_npu.npu_trans_quant_param(s.npu(), o.npu())
    assert got.shape == offset
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o)))


@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_words_past_an_eager_result(soc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch_npu returns (1, 1) for a scale of that shape, for an offset of any length."""
    pretend(monkeypatch, soc)
    s, o = values(1, 1).abs() / 100, values(7, seed=1) * 10
    with pytest.warns(
        RuntimeWarning, match=r"the kernel writes 7 words: 6 overwrite .*cann_host's"
    ):
        got = torch_npu.npu_trans_quant_param(s.npu(), o.npu())
    assert_same(got, golden.trans_quant_param(as_numpy(s), as_numpy(o[:1]).reshape(1, 1)))
    monkeypatch.setattr(runtime.current(), "options", Options.of(overruns="refuse"))
    with refused("(?s)7 words.*refused by cann_host's option overruns"):
        torch_npu.npu_trans_quant_param(s.npu(), o.npu())


@pytest.mark.usefixtures("internal_formats")
def test_a_wide_scale_beside_a_fractal_nz_weight() -> None:
    """aclnnQuantMatmulWeightNz takes (1, n) and reads n values; aclnnQuantMatmulV5 does not."""
    inputs = Inputs(scale=F32, pertoken=True)
    weight = torch_npu.npu_format_cast(inputs.weight.npu(), FRACTAL_NZ)
    options = {"pertoken_scale": inputs.pertoken.npu(), "output_dtype": F16}
    wide = inputs.scale.reshape(1, -1).npu()
    got = torch_npu.npu_quant_matmul(inputs.x1.npu(), weight.T, wide, **options)
    assert_same(got, inputs.by_golden(F16))
    with refused(r"(?s)aclnnQuantMatmulV5.*scale has shape \(1, 48\)"):
        torch_npu.npu_quant_matmul(inputs.x1.npu(), inputs.weight.npu().T, wide, **options)


@pytest.mark.usefixtures("internal_formats")
def test_int4_in_fractal_nz_goes_by_weight_nz_only() -> None:
    inputs = Inputs(x=I32, k=128)
    weight = cast_format(inputs.weight.npu(), FRACTAL_NZ)  # of 64 int4, not of eight int32
    call = torch_npu.npu_quant_matmul
    x, scale = inputs.x1.npu(), inputs.scale.npu()
    assert_same(call(x, weight.T, scale, output_dtype=F16), inputs.by_golden(F16))
    with refused("(?s)aclnnQuantMatmulV5.*161002.*int4 x2 is FRACTAL_NZ"):
        call(x, weight.T, torch_npu.npu_trans_quant_param(scale), output_dtype=F16)


@pytest.mark.parametrize("transposed", [False, True])
def test_an_nd_weight_on_310p(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """aclnn brings it to FRACTAL_NZ itself."""
    pretend(monkeypatch, P310)
    inputs = Inputs(bias=I32)
    weight = inputs.weight.npu()
    weight = weight.T if transposed else weight.T.contiguous()
    got = torch_npu.npu_quant_matmul(
        inputs.x1.npu(), weight, inputs.scale.npu(), bias=inputs.bias.npu(), output_dtype=I8
    )
    assert_same(got, inputs.by_golden(I8))


@pytest.mark.usefixtures("internal_formats")
def test_pertoken_on_310p(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, P310)
    inputs = Inputs(scale=F32, pertoken=True, bias=I32)
    assert_same(inputs.on_npu(F16, FRACTAL_NZ), inputs.by_golden(F16))
    with refused("(?s)161002.*bias dtype float32"):
        Inputs(scale=F32, pertoken=True, bias=F32).on_npu(F16, FRACTAL_NZ)


@pytest.mark.usefixtures("internal_formats")
@pytest.mark.parametrize(("dtype", "c0"), [(I8, 32), (F16, 16), (BF16, 16), (I32, 16), (F32, 16)])
@pytest.mark.parametrize("shape", [(16, 32), (50, 70), (3, 20, 33)], ids=str)
def test_format_cast(dtype: torch.dtype, c0: int, shape: tuple[int, ...]) -> None:
    x = values(*shape, dtype=dtype)
    nz = torch_npu.npu_format_cast(x.npu(), FRACTAL_NZ)
    assert torch_npu.get_npu_format(nz) == FRACTAL_NZ
    rows, columns = shape[-2:]
    blocks = (*shape[:-2], -(-columns // c0), -(-rows // 16), 16, c0)
    assert nz.untyped_storage().nbytes() >= np.prod(blocks) * dtype.itemsize
    assert torch.equal(nz.cpu(), x)  # torch_npu casts it back on the way
    back = torch_npu.npu_format_cast(nz, ND)
    assert torch_npu.get_npu_format(back) == ND
    assert torch.equal(back.cpu(), x)
