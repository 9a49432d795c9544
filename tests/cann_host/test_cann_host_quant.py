"""Quantized activations and norms by the vendor's calls, in eager mode and in graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from support import golden
from support.eager import (
    BF16,
    F16,
    F32,
    I8,
    I32,
    as_numpy,
    pretend,
    refused,
    values,
)

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
ARITHMETIC = {A2: "multiply", A950: "divide", P310: "half"}


# ---- quantized activations, by the vendor's calls ----


def exact_rows(*shape: int, dtype: torch.dtype) -> Tensor:
    """Rows whose peak is a power of two, so that 127 / peak and 7 / peak are exact."""
    x = values(*shape, dtype=dtype).clamp(-60, 60)
    x[..., 0] = 64
    return x


def either_way(function: Callable[..., Any], way: str) -> Callable[..., Any]:
    """The function as it is, or compiled by torchair."""
    if way == "eager":
        return function
    import torchair

    torch._dynamo.reset()
    backend = torchair.get_npu_backend()
    return torch.compile(function, backend=backend, dynamic=way == "dynamic", fullgraph=True)


WAYS = pytest.mark.parametrize("way", ["eager", "static", "dynamic"])


@WAYS
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 40)], ids=str)
def test_npu_dynamic_quant(
    shape: tuple[int, ...], dtype: torch.dtype, int4: bool, way: str
) -> None:
    x = exact_rows(*shape, dtype=dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant(x, dst_type=torch.quint4x2 if int4 else I8)

    y, scale = either_way(run, way)(x.npu())
    want, want_scale = golden.dynamic_quant(x.float().numpy(), 7 if int4 else 127)
    want = golden.pack_int4(want.astype(np.int8)) if int4 else want.astype(np.int8)
    assert y.dtype == (I32 if int4 else I8) and scale.dtype == F32
    np.testing.assert_array_equal(y.cpu().numpy(), want)
    np.testing.assert_array_equal(scale.cpu().numpy(), want_scale)


def assert_quantized(
    got: tuple[Tensor, ...], want: tuple[np.ndarray, ...], int4: bool = False
) -> None:
    """Integers, float32 scales and perhaps offsets, bit by bit."""
    y, *steps = (one.cpu().numpy() for one in got)
    first = want[0].astype(np.int8)
    np.testing.assert_array_equal(y, golden.pack_int4(first) if int4 else first)
    assert len(steps) == len(want) - 1
    for one, other in zip(steps, want[1:], strict=True):
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_npu_dynamic_quant_asymmetric(
    soc: str, dtype: torch.dtype, int4: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, soc)
    x = values(2, 3, 64, dtype=dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant_asymmetric(x, dst_type=torch.quint4x2 if int4 else I8)

    if soc == P310 and (int4 or dtype == BF16):
        with refused(f"(?s){'561002' if way != 'eager' else '161002'}.*Ascend310P3 allows"):
            either_way(run, way)(x.npu())
        return
    given = as_numpy(x) if dtype == F16 else as_numpy(x.float())
    top = 7 if int4 else 127
    want = golden.dynamic_quant_with_offset(given, top, ARITHMETIC[soc])
    assert_quantized(either_way(run, way)(x.npu()), want, int4)


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("grouped", [False, True])
def test_npu_dynamic_quant_asymmetric_with_smooth_scales(grouped: bool, way: str) -> None:
    x, smooth = values(2, 3, 40, dtype=F16), values(2, 40, dtype=F16, seed=1) / 50
    smooth = smooth if grouped else smooth[0].contiguous()
    groups = torch.tensor([2, 6], dtype=I32) if grouped else None

    def run(x: Tensor, smooth: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        call = torch_npu.npu_dynamic_quant_asymmetric
        return call(x, smooth_scales=smooth, group_index=groups)

    factors = smooth.float().numpy()
    if grouped:
        factors = factors[[0, 0, 1, 1, 1, 1]].reshape(2, 3, 40)
    given = None if groups is None else groups.npu()
    got = either_way(run, way)(x.npu(), smooth.npu(), given)
    assert_quantized(got, golden.dynamic_quant_with_offset(x.float().numpy() * factors, 127))


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mode", ["pertensor", "perchannel"])
def test_npu_dynamic_quant_of_950_by_other_modes(
    mode: str, symmetric: bool, smooth: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aclnnDynamicQuantV4, and DynamicQuantV2 in a graph."""
    pretend(monkeypatch, A950)
    x = values(2, 5, 64, dtype=F16)
    length = 5 if mode == "perchannel" else 64
    factors = (values(length, dtype=F16, seed=1) / 50) if smooth else None

    def run(x: Tensor, factors: Tensor | None) -> tuple[Tensor, ...]:
        name = "npu_dynamic_quant" + "_asymmetric" * (not symmetric)
        return getattr(torch_npu, name)(x, smooth_scales=factors, quant_mode=mode)

    got = either_way(run, way)(x.npu(), None if factors is None else factors.npu())
    value = x.float().numpy()
    if factors is not None:
        each = factors.float().numpy()
        value = value * (each[:, None] if mode == "perchannel" else each)
    rows = value.reshape(1, -1) if mode == "pertensor" else np.swapaxes(value, -1, -2)
    arithmetic = golden.dynamic_quant if symmetric else golden.dynamic_quant_with_offset
    want, *steps = arithmetic(rows, 127, "divide")
    want = want.reshape(value.shape) if mode == "pertensor" else np.swapaxes(want, -1, -2)
    assert_quantized(got, (want, *steps))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("soc", [A2, P310])
def test_other_modes_are_for_950(soc: str, asymmetric: bool, monkeypatch) -> None:
    pretend(monkeypatch, soc)
    call = getattr(torch_npu, "npu_dynamic_quant" + "_asymmetric" * asymmetric)
    for options in ({"quant_mode": "pertensor"}, {"dst_type_max": 3.0}):
        with refused(f"(?s)aclnnDynamicQuantV4.*for Ascend 950, and this is {soc}.*561000"):
            call(values(4, 64, dtype=F16).npu(), **options)


def test_310p_reads_no_smooth_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, P310)
    x, smooth = values(3, 64, dtype=F16), values(64, dtype=F16, seed=1)
    with pytest.warns(RuntimeWarning, match="smooth_scales has no effect on Ascend310P3"):
        got = torch_npu.npu_dynamic_quant(x.npu(), smooth_scales=smooth.npu())
    assert_quantized(got, golden.dynamic_quant(as_numpy(x), 127, "half"))
    with refused("(?s)561002.*multiple of 32"):
        torch_npu.npu_dynamic_quant(x[:, :48].contiguous().npu())
    with refused("(?s)4128 on Ascend310P3.*never writes one"):
        torch_npu.npu_dynamic_quant_asymmetric(torch.ones(2, 4128, dtype=F16).npu())


def test_group_index_alone_has_no_effect() -> None:
    x, groups = exact_rows(4, 40, dtype=F16), torch.tensor([1, 4], dtype=I32)
    with pytest.warns(RuntimeWarning, match="group_index has no effect without smooth_scales"):
        got = torch_npu.npu_dynamic_quant(x.npu(), group_index=groups.npu())
    assert_quantized(got, golden.dynamic_quant(x.float().numpy(), 127))


def test_asymmetric_although_symmetry_is_asked_for() -> None:
    """What torchair makes of dst_type_max on A2, where the kernel knows offsets only."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch_npu.npu_dynamic_quant(x, dst_type_max=3.0)

    x = values(3, 64, dtype=F16)
    with pytest.warns(RuntimeWarning, match="its kernel quantizes with an offset all the same"):
        got = either_way(run, "static")(x.npu())
    assert_quantized(got, golden.dynamic_quant_with_offset(x.float().numpy(), 127)[:2])


@WAYS
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_npu_quantize(dtype: torch.dtype, length: int, zero_points: bool, way: str) -> None:
    x = (values(2, 3, 40) / 50).to(dtype)
    scale = values(length, seed=1).abs().to(dtype)
    offset = values(length, seed=2).to(dtype) if zero_points else None

    def run(x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        return torch_npu.npu_quantize(x, scale, offset, torch.qint8, -1, False)

    y = either_way(run, way)(x.npu(), scale.npu(), None if offset is None else offset.npu())
    steps = as_numpy(x.float()) * as_numpy(scale.float())
    if offset is not None:
        steps = steps + as_numpy(offset.float())
    assert y.dtype == I8
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
def test_npu_dynamic_quant_with_smooth_scales(int4: bool, grouped: bool, way: str) -> None:
    x, smooth = values(2, 3, 40, dtype=F16), values(3, 40, dtype=F16, seed=1) / 50
    smooth = smooth if grouped else smooth[0].contiguous()
    groups = torch.tensor([2, 2, 6], dtype=I32) if grouped else None  # the second one is empty

    def run(x: Tensor, smooth: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.quint4x2 if int4 else I8
        return torch_npu.npu_dynamic_quant(
            x, smooth_scales=smooth, group_index=groups, dst_type=dtype
        )

    given = None if groups is None else groups.npu()
    y, scale = either_way(run, way)(x.npu(), smooth.npu(), given)
    factors = smooth.float().numpy()
    if grouped:
        factors = factors[[0, 0, 2, 2, 2, 2]].reshape(2, 3, 40)
    arithmetic = "reciprocal" if grouped else "multiply"  # dynamic_quant_moe.h writes it so
    top, product = 7 if int4 else 127, x.float().numpy() * factors
    want, want_scale = golden.dynamic_quant(product, top, arithmetic)
    want = want.astype(np.int8)
    np.testing.assert_array_equal(y.cpu().numpy(), golden.pack_int4(want) if int4 else want)
    np.testing.assert_array_equal(scale.cpu().numpy(), want_scale)


@pytest.mark.parametrize("way", ["eager", "static"])
def test_npu_quantize_to_int4(way: str) -> None:
    x, scale = values(3, 40, dtype=F16), values(40, dtype=F16, seed=1) / 99

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return torch_npu.npu_quantize(x, scale, None, torch.quint4x2, -1, False)

    y = either_way(run, way)(x.npu(), scale.npu())
    steps = np.clip(np.rint(x.float().numpy() * scale.float().numpy()), -8, 7).astype(np.int8)
    np.testing.assert_array_equal(y.cpu().numpy(), golden.pack_int4(steps))


QUANTIZE = [
    # chips, dtype of x, of scales, of zero_points, to, axis, length, range of the result
    ((A2, A950, P310), F32, F32, I32, torch.qint32, 0, 3, (-(2**31), 2**31 - 1)),
    ((A2, A950, P310), F32, F32, I8, torch.qint8, 1, 40, (-128, 127)),
    ((A2, A950, P310), F16, F16, I32, torch.quint8, -1, 40, (0, 255)),
    ((A2, A950, P310), F32, F16, None, torch.qint8, 1, 40, (-128, 127)),
    ((A2, A950), BF16, F32, None, torch.qint8, 0, 3, (-128, 127)),
    ((A2, A950), BF16, BF16, BF16, torch.qint8, 1, 40, (-128, 127)),
    ((A950,), F32, F32, F32, torch.quint8, 1, 1, (0, 255)),
]


@pytest.mark.parametrize(
    ("socs", "dtype", "scales", "points", "to", "axis", "length", "limits"), QUANTIZE
)
@pytest.mark.parametrize("soc", [A2, A950, P310])
def test_npu_quantize_by_a_division(
    soc, socs, dtype, scales, points, to, axis, length, limits, monkeypatch
) -> None:
    pretend(monkeypatch, soc)
    x, scale = values(3, 40, dtype=dtype), values(length, seed=1).abs().to(scales)
    offset = None if points is None else (values(length, seed=2) / 9).to(points)
    given = (x.npu(), scale.npu(), None if offset is None else offset.npu(), to, axis)
    if soc not in socs:
        with refused(f"(?s)161002.*{soc} allows"):
            torch_npu.npu_quantize(*given)
        return
    y = torch_npu.npu_quantize(*given)
    along = (-1, 1) if axis == 0 else (1, -1)
    steps = x.float().numpy() / scale.float().numpy().reshape(along)
    if offset is not None:
        steps = steps + offset.float().numpy().reshape(along)
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), *limits))


@pytest.mark.parametrize(
    ("scale", "points", "message"),
    [
        (torch.ones(1, dtype=BF16), None, "x is float32, scales and zero_points bfloat16; if one"),
        (torch.ones(40), torch.ones(1, dtype=I32), r"zero_points has shape \(1,\); .* \(40,\)"),
        (torch.ones(1), torch.ones(40, dtype=I32), r"zero_points has shape \(40,\); .* \(1,\)"),
        (torch.ones(1), torch.ones(1), "zero_points is float32; Ascend910B2 allows int8"),
    ],
    ids=["bfloat16", "short", "long", "float32"],
)
def test_npu_quantize_refuses(scale: Tensor, points: Tensor | None, message: str) -> None:
    with refused(f"(?s)161002.*{message}"):
        there = None if points is None else points.npu()
        torch_npu.npu_quantize(values(3, 40).npu(), scale.npu(), there, torch.qint8, 1)


def test_npu_quantize_casts_the_scale_of_a_float32_x() -> None:
    x, scale = values(3, 40), torch.tensor([0.3], dtype=F16)
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), None, torch.qint8, -1, False)
    steps = x.numpy() * scale.float().numpy()
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


def test_npu_quantize_along_rows() -> None:
    x, scale = values(2, 3, 40) / 50, values(3, seed=1).abs()
    y = torch_npu.npu_quantize(x.npu(), scale.npu(), None, torch.qint8, -2, False)
    steps = x.numpy() * scale.numpy()[:, None]
    np.testing.assert_array_equal(y.cpu().numpy(), np.clip(np.rint(steps), -128, 127))


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)], ids=str)
def test_npu_dynamic_quant_of_nothing(shape: tuple[int, ...]) -> None:
    y, scale = torch_npu.npu_dynamic_quant(torch.empty(shape, dtype=F16).npu())
    assert (y.shape, scale.shape) == (shape, shape[:1])


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32])
def test_attention(dtype: torch.dtype, mask: str | None) -> None:
    """torch's sdpa, which torch_npu makes its fused attention of."""
    q, k, v = (values(2, 4, 6, 8, dtype=dtype, seed=i) / 50 for i in range(3))
    hide = torch.arange(6) >= torch.tensor([4, 6]).view(2, 1, 1, 1)
    given = {None: None, "bool": ~hide, "float": hide.to(dtype) * -1e4}[mask]
    there = None if given is None else given.npu()
    attend = torch.nn.functional.scaled_dot_product_attention
    out = attend(q.npu(), k.npu(), v.npu(), attn_mask=there)
    scores = q.double() @ k.double().mT / 8**0.5
    if mask:
        scores = scores.masked_fill(hide, -torch.inf)
    want = scores.softmax(-1) @ v.double()
    assert (out.device.type, out.dtype) == ("npu", dtype)
    tolerance = {F16: 2e-3, BF16: 2e-2, F32: 1e-5}[dtype]
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    x, gamma = values(3, 5, 16, dtype=dtype), values(16, dtype=dtype, seed=1)
    y, rstd = torch_npu.npu_rms_norm(x.npu(), gamma.npu(), 0.5)
    a, g = x.double().numpy(), gamma.double().numpy()
    factor = 1 / np.sqrt((a * a).mean(-1, keepdims=True) + 0.5)
    np.testing.assert_allclose(rstd.cpu().numpy(), factor, rtol=1e-5)
    close = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(y.cpu().double().numpy(), a * factor * g, rtol=close)
    with pytest.raises(RuntimeError, match=r"aclnnRmsNorm: gamma has shape \(8,\)"):
        torch_npu.npu_rms_norm(x.npu(), gamma[:8].npu(), 0.5)


NORM_DTYPES = [
    # chip, dtype of x and of gamma; what npu_rms_norm says, and npu_add_rms_norm
    (A2, F16, F32, None, "gamma is float32 and x float16"),
    (A950, BF16, F32, None, "gamma is float32 and x bfloat16"),
    (A2, torch.float64, torch.float64, "x is float64", "x is float64"),
    (A2, F32, F16, "gamma is float16 and x float32", "gamma is float16 and x float32"),
    (P310, F16, F16, None, None),
    (P310, BF16, BF16, "x is bfloat16", "x is bfloat16"),
    (P310, F16, F32, "gamma is float32 and x float16", "gamma is float32 and x float16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize(("soc", "dtype", "gamma", "alone", "added"), NORM_DTYPES, ids=str)
def test_norm_dtypes(soc, dtype, gamma, alone, added, way, monkeypatch) -> None:
    pretend(monkeypatch, soc)
    x, g = values(3, 16, dtype=dtype).npu(), values(16, dtype=gamma, seed=1).npu()

    def run(x: Tensor, g: Tensor) -> Tensor:
        return torch_npu.npu_rms_norm(x, g, 0.5)[0]

    def run_added(x: Tensor, g: Tensor) -> Tensor:
        return torch_npu.npu_add_rms_norm(x, x, g, 0.5)[0]

    a, factors = x.cpu().double().numpy(), g.cpu().double().numpy()
    code = "161002" if way == "eager" else "561003"
    for function, times, message in ((run, 1, alone), (run_added, 2, added)):
        call = either_way(function, way)
        if message is not None:
            with refused(f"(?s){message}.*CANN error {code}"):
                call(x, g)
            continue
        total = a * times
        want = total / np.sqrt((total * total).mean(-1, keepdims=True) + 0.5) * factors
        got = call(x, g).cpu().double().numpy()
        # AddRmsNorm rounds twice before Ascend 950
        np.testing.assert_allclose(got, want, rtol={F16: 2e-3, BF16: 1.6e-2}.get(dtype, 1e-5))
