"""RMSNorm in graphs: what becomes one operator, its numbers beside the numpy golden bit by bit, and
what is left with which reason.

The values are multiples of 1/8 and k is a power of two, so no sum of squares rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cann_host
import lq_graph
from support import golden_fused
from support.eager import BF16, F16, F32, I8, I32
from support.fused import EPSILON, K, as_array, assert_bits, dtype_of, exact, norm_of, positive
from support.fused_graphs import calls_of, fused, outcomes, traced
from support.has import need_operator

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")

NORMS = ("rms_norm", "add_rms_norm", "add_rms_norm_dynamic_quant", "add_rms_norm_cast")


# ---- the ways to write a norm ----


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def transformers(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(F32)
    wide = wide * torch.rsqrt(mean_square(wide) + EPSILON)
    return w * wide.to(x.dtype)


def torch_nn(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, EPSILON)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(mean_square(wide) + EPSILON) * (1.0 + w.float())).type_as(x)


def weight_last(x: Tensor, w: Tensor) -> Tensor:
    wide = x.to(F32)
    return (torch.rsqrt(EPSILON + mean_square(wide)) * wide).to(x.dtype) * w


def by_a_power(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return ((wide * torch.pow(mean_square(wide) + EPSILON, -0.5)) * w.float()).to(x.dtype)


def by_a_division(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    root = torch.sqrt(torch.square(wide).mean(dim=x.dim() - 1, keepdim=True) + EPSILON)
    return (wide / root).to(x.dtype) * w


def by_a_reciprocal(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    root = torch.reciprocal(torch.sqrt((wide * wide).mean(-1, keepdim=True) + EPSILON))
    return (x.float() * root).to(x.dtype) * w


def of_the_narrow(x: Tensor, w: Tensor) -> Tensor:
    return (x * torch.rsqrt(mean_square(x.float()) + EPSILON)).to(x.dtype) * w


def vendor(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = torch_npu.npu_rms_norm(x, w, EPSILON)[0]
    return y


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        transformers,
        torch_nn,
        gemma,
        weight_last,
        by_a_power,
        by_a_division,
        by_a_reciprocal,
        of_the_narrow,
        vendor,
    )
}
WAYS = [(F16, False), (BF16, True), (F32, False)]  # dtype, and whether sizes are symbolic


def inputs_of(dtype: torch.dtype, *rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a residual, and a weight."""
    shape = (*(rows or (2, 3)), K)
    return exact(*shape, dtype=dtype), exact(*shape, dtype=dtype, seed=1), exact(K, dtype=dtype)


def run(module: Callable[..., Any], *inputs: Tensor) -> Any:
    return module(*(x.npu() for x in inputs))


# ---- RmsNorm and AddRmsNorm ----


@pytest.mark.parametrize(("dtype", "dynamic"), WAYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rms_norm(form: str, dtype: torch.dtype, dynamic: bool) -> None:
    x, _, w = inputs_of(dtype)
    norm = FORMS[form]
    module, report = fused(norm, x.npu(), w.npu(), dynamic=dynamic)
    kept = {"add.Tensor": 1} if form == "gemma" else {}
    if form == "gemma" and dtype != F32:
        kept["_to_copy"] = 1  # of the weight
    assert calls_of(module) == {"npu_rms_norm": 1, **kept}
    assert outcomes(report) == ({} if form == "vendor" else {"rms_norm": [""]})
    zero = torch.zeros_like(x)
    weight = 1 + w.float() if form == "gemma" else w
    want, _, _ = norm_of(x, zero, weight)
    y = run(module, x, w)
    assert y.dtype == dtype
    assert_bits(y, golden_fused.rounded(want, dtype_of(x)))
    torch.testing.assert_close(y.cpu(), norm(x, w) if form != "vendor" else y.cpu())


@pytest.mark.parametrize(("dtype", "dynamic"), WAYS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_add_rms_norm(form: str, dtype: torch.dtype, dynamic: bool) -> None:
    """The sum has a reader before the norm, one after it, and is returned."""
    norm = FORMS[form]

    def layer(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = x + residual
        before = total.abs()
        y = norm(total, w)
        return y, total, total + before

    x, residual, w = inputs_of(dtype)
    w = w / 512 if form == "gemma" else w  # 1 + w is no float16
    module, report = fused(layer, x.npu(), residual.npu(), w.npu(), dynamic=dynamic)
    weights = 1 if form == "gemma" else 0  # 1 + weight, in the dtype of the sum
    assert calls_of(module) == {"npu_add_rms_norm": 1, "abs": 1, "add.Tensor": 1 + weights}
    assert outcomes(report)["add_rms_norm"] == [""]
    y, total, later = run(module, x, residual, w)
    weight = (1 + w.float()).to(dtype) if form == "gemma" else w
    want, _, want_total = norm_of(x, residual, weight, "tn")  # as Atlas A2 rounds
    assert_bits(y, golden_fused.rounded(want, dtype_of(x)))
    assert_bits(total, want_total)
    assert torch.equal(later.cpu(), total.cpu() + total.cpu().abs())


def test_a_float32_weight_of_a_narrow_norm() -> None:
    """The product is float32 and is cast: RmsNorm has that, AddRmsNorm has not."""
    x, residual, w = inputs_of(F16)
    w = w.float()

    def layer(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        return transformers(x + residual, w).to(F16)

    module, report = fused(layer, x.npu(), residual.npu(), w.npu())
    assert calls_of(module) == {"npu_rms_norm": 1, "add.Tensor": 1}
    assert outcomes(report)["add_rms_norm"] == ["the weight is float32 and the sum float16"]
    want, _, _ = norm_of(x, residual, w, "t")
    assert_bits(run(module, x, residual, w), golden_fused.rounded(want, "float16"))


def test_two_norms_of_one_sum() -> None:
    def layer(x: Tensor, residual: Tensor, w: Tensor, v: Tensor) -> Any:
        total = x + residual
        return transformers(total, w), transformers(total, v)

    x, residual, w = inputs_of(F16)
    module, _ = fused(layer, x.npu(), residual.npu(), w.npu(), w.npu())
    assert calls_of(module) == {"npu_add_rms_norm": 1, "npu_rms_norm": 1}
    first, second = run(module, x, residual, w, w)
    total = x + residual
    assert_bits(first, golden_fused.rounded(norm_of(x, residual, w, "tn")[0], "float16"))
    want = norm_of(total, torch.zeros_like(total), w)[0]
    assert_bits(second, golden_fused.rounded(want, "float16"))


# ---- with what follows ----


def ours(x: Tensor) -> Any:
    return lq_graph.dynamic_quant(x)


def theirs(x: Tensor) -> Any:
    return torch_npu.npu_dynamic_quant(x)


@pytest.mark.parametrize(("dtype", "dynamic"), WAYS[:2], ids=str)
@pytest.mark.parametrize("flat", [False, True], ids=["3 dims", "view"])
@pytest.mark.parametrize("quantize", [ours, theirs])
@pytest.mark.parametrize("form", ["transformers", "torch_nn", "gemma", "vendor"])
def test_add_rms_norm_dynamic_quant(
    form: str, dtype: torch.dtype, quantize: Any, flat: bool, dynamic: bool
) -> None:
    need_operator("npu_add_rms_norm_dynamic_quant")

    def layer(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = x + residual
        y = FORMS[form](total, w)
        y = y.view(-1, y.shape[-1]) if flat else y
        return (*quantize(y), *quantize(y), total)

    x, residual, w = inputs_of(dtype)
    module, report = fused(layer, x.npu(), residual.npu(), w.npu(), dynamic=dynamic)
    got = calls_of(module)
    views = got.pop("view", 0) + got.pop("sym_size.int", 0)
    assert got.pop("add.Tensor", 0) == (form == "gemma")
    assert got == {"npu_add_rms_norm_dynamic_quant": 1} and bool(views) == flat
    assert outcomes(report)["add_rms_norm_dynamic_quant"] == [""]
    values, scale, again, _, total = run(module, x, residual, w)
    weight = (1 + w.float()).to(dtype) if form == "gemma" else w
    want, _, want_total = norm_of(x, residual, weight)
    want_values, want_scale = golden_fused.quantize_rows(want, 127, "reciprocal")
    rows = (-1,) if flat else (2, 3)
    assert_bits(values, want_values.reshape(*rows, K))
    assert_bits(scale, want_scale.reshape(rows))
    assert torch.equal(values, again)
    assert_bits(total, want_total)
    assert (values.dtype, scale.dtype) == (I8, F32)


@pytest.mark.parametrize("first", [False, True], ids=["smooth, smooth", "plain, smooth"])
def test_two_quantizations_of_one_norm(first: bool) -> None:
    need_operator("npu_add_rms_norm_dynamic_quant", "output_mask")
    x, residual, w = inputs_of(BF16)
    a, b = exact(K, dtype=BF16, seed=3), exact(K, dtype=BF16, seed=4)

    def layer(x: Tensor, residual: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Any:
        y = transformers(x + residual, w)
        one = torch_npu.npu_dynamic_quant(y, smooth_scales=None if first else a)
        return (*one, *torch_npu.npu_dynamic_quant(y.view(-1, K), smooth_scales=b))

    inputs = (x, residual, w, a, b)
    module, _ = fused(layer, *(t.npu() for t in inputs))
    assert calls_of(module)["npu_add_rms_norm_dynamic_quant"] == 1
    assert not calls_of(module)["npu_dynamic_quant"]
    values1, scale1, values2, scale2 = run(module, *inputs)
    y, _, _ = norm_of(x, residual, w)
    for values, scale, smooth in ((values1, scale1, None if first else a), (values2, scale2, b)):
        scaled = y if smooth is None else y * as_array(smooth)
        want, want_scale = golden_fused.quantize_rows(scaled, 127, "reciprocal")
        assert_bits(values, want.reshape(values.shape))
        assert_bits(scale, want_scale.reshape(scale.shape))


QUANTIZED = {
    # id: dtypes of x, of the scales and of the zero points; roundings of Atlas A2
    "ours": (BF16, BF16, BF16, ""),
    "theirs, multiplied": (BF16, BF16, BF16, ""),
    "theirs, divided": (F16, F32, I32, "tnp"),
}


def statically(way: str, y: Tensor, scale: Tensor, points: Tensor | None) -> Tensor:
    if way == "ours":
        return lq_graph.static_quant(y, scale, points)
    divides = way == "theirs, divided"
    values: Tensor = torch_npu.npu_quantize(y, scale, points, torch.qint8, -1, divides)
    return values


@pytest.mark.parametrize("has_points", [False, True], ids=["symmetric", "points"])
@pytest.mark.parametrize("flat", [False, True], ids=["3 dims", "view"])
@pytest.mark.parametrize("way", QUANTIZED)
def test_add_rms_norm_quant(way: str, flat: bool, has_points: bool) -> None:
    need_operator("npu_add_rms_norm_quant", "div_mode")
    dtype, of_scale, of_points, rounds = QUANTIZED[way]
    x, residual, w = inputs_of(dtype)
    divides = way == "theirs, divided"
    scale = positive(K, dtype=of_scale) * (1 if divides else 100)
    points = exact(K, dtype=F32, seed=5).round().to(of_points) if has_points else None
    inputs = [x, residual, w, scale, scale if points is None else points]

    def layer(x: Tensor, r: Tensor, w: Tensor, scale: Tensor, points: Tensor) -> Any:
        total = x + r
        y = transformers(total, w)
        y = y.view(-1, K) if flat else y
        return statically(way, y, scale, points if has_points else None), total

    module, report = fused(layer, *(t.npu() for t in inputs))
    got = calls_of(module)
    assert got.pop("view", 0) == flat and got == {"npu_add_rms_norm_quant": 1}
    assert outcomes(report)["add_rms_norm_quant"] == [""]
    values, total = run(module, *inputs)
    want, _, want_total = norm_of(x, residual, w, rounds)
    want = golden_fused.quantize(want, as_array(scale), as_array(points), divides=divides)
    assert_bits(values, want.reshape(values.shape))
    assert_bits(total, want_total)
    assert values.shape == ((6, K) if flat else (2, 3, K)) and values.dtype == I8


@pytest.mark.parametrize("flat", [False, True], ids=["3 dims", "view"])
def test_add_rms_norm_cast(flat: bool) -> None:
    """On Atlas A2 the float32 result is the rounded norm, so no bit changes."""
    need_operator("npu_add_rms_norm_cast")
    x, residual, w = inputs_of(BF16)

    def layer(x: Tensor, residual: Tensor, w: Tensor) -> Any:
        total = x + residual
        y = transformers(total, w)
        return y, (y.view(-1, K) if flat else y).to(F32), total

    module, report = fused(layer, x.npu(), residual.npu(), w.npu())
    got = calls_of(module)
    assert got.pop("view", 0) == flat and got == {"npu_add_rms_norm_cast": 1}
    assert outcomes(report)["add_rms_norm_cast"] == [""]
    y, wide, total = run(module, x, residual, w)
    want, _, want_total = norm_of(x, residual, w, "tn")
    assert_bits(y, golden_fused.rounded(want, "bfloat16"))
    assert torch.equal(wide.cpu().view(y.shape), y.cpu().float())
    assert_bits(total, want_total)


# ---- what is left, and why ----


def rooted(x: Tensor, w: Tensor) -> Any:
    root = torch.rsqrt(mean_square(x.float()) + EPSILON)
    return w * (x.float() * root).to(x.dtype), root


def kept_variance(x: Tensor, w: Tensor) -> Any:
    variance = mean_square(x.float())
    return w * (x.float() * torch.rsqrt(variance + EPSILON)).to(x.dtype), variance


def of_another(x: Tensor, w: Tensor) -> Tensor:
    return w * (x.abs().float() * torch.rsqrt(mean_square(x.float()) + EPSILON)).to(x.dtype)


def over(*dims: int, keepdim: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        wide = x.float()
        mean = wide.pow(2).mean(dims, keepdim=keepdim)
        return w * (wide * torch.rsqrt(mean + EPSILON)).to(x.dtype)

    return norm


def rms(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm of a function of x."""
    return lambda x, w: transformers(function(x), w)


LEFT: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "epsilon is a tensor": (
        lambda x, w: (
            w * (x.float() * torch.rsqrt(mean_square(x.float()) + w[0].float())).to(x.dtype)
        ),
        "epsilon is a tensor; .*specialize_float",
    ),
    "epsilon has a factor": (
        lambda x, w: (
            w
            * (x.float() * torch.rsqrt(torch.add(mean_square(x.float()), 0.5, alpha=2))).to(x.dtype)
        ),
        "epsilon has a factor",
    ),
    "epsilon is subtracted": (
        lambda x, w: w * (x.float() * torch.rsqrt(mean_square(x.float()) - -EPSILON)).to(x.dtype),
        "",
    ),
    "two dims": (over(-2, -1), r"over the dims \[1, 2\]"),
    "another dim": (over(1), r"over the dims \[1\]"),
    "the dim is dropped": (
        lambda x, w: over(-1, keepdim=False)(x[:1, :1].expand(1, K, K).contiguous(), w),
        "the mean drops its dim",
    ),
    "the root is used": (rooted, "the reciprocal root has 2 users"),
    "the variance is used": (kept_variance, "the mean square has 2 users"),
    "another tensor": (of_another, "the reciprocal root multiplies another tensor"),
    "in float16": (
        lambda x, w: w * x * torch.rsqrt(mean_square(x) + EPSILON),
        "the reciprocal root multiplies another|it is computed in float16",
    ),
    "no weight": (
        lambda x, w: (x.float() * torch.rsqrt(mean_square(x.float()) + EPSILON)).to(x.dtype),
        "x / rms\\(x\\) has 1 users|no weight",
    ),
    "a weight of 2 dims": (lambda x, w: transformers(x, w.view(1, K)), r"shape \(1, 64\)"),
    "a weight of one value": (lambda x, w: transformers(x, w[:1]), r"weight has shape \(1,\)"),
    "a weight of each token": (lambda x, w: transformers(x, x), r"weight has shape \(2, 3, 64\)"),
    "a float32 result": (lambda x, w: transformers(x, w.float() * 2), "users|norm is float32"),
    "not contiguous": (rms(lambda x: x.transpose(0, 1).abs()), "x is not contiguous"),
}


@pytest.mark.parametrize("case", LEFT)
def test_norms_that_are_left(case: str) -> None:
    function, why = LEFT[case]
    x, _, w = inputs_of(F16)
    module, report = fused(function, x.npu(), w.npu())
    assert not calls_of(module)["npu_rms_norm"]
    before = traced(function, x.npu(), w.npu())
    assert calls_of(module) <= calls_of(before)
    if why:
        (found,) = outcomes(report)["rms_norm"]
        assert re.search(why, found), found


def test_what_is_no_norm_is_not_mentioned() -> None:
    x, _, w = inputs_of(F16)
    _, report = fused(lambda x, w: (mean_square(x) + 1, x.mean(-1) + w[:3]), x.npu(), w.npu())
    assert not report.lines


SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "alpha": (lambda x, r: torch.add(x, r, alpha=2), "the sum has alpha 2"),
    "broadcast": (lambda x, r: x + r[:, :1], r"sum is of \(2, 3, 64\) and \(2, 1, 64\)"),
    "dtypes": (lambda x, r: (x + r.to(BF16)).to(F16), ""),
    "of float32": (lambda x, r: x.float() + r, "the sum is of float32 and float16"),
    "not contiguous": (
        lambda x, r: x.transpose(0, 1).contiguous().transpose(0, 1) + r,
        "a tensor of the sum is not contiguous|x is not contiguous",
    ),
    "a number": (lambda x, r: x + 1.0, ""),
}


@pytest.mark.parametrize("case", SUMS)
def test_sums_that_are_left(case: str) -> None:
    total, why = SUMS[case]
    x, residual, w = inputs_of(F16)
    module, report = fused(
        lambda x, r, w: transformers(y := total(x, r), w.to(y.dtype)),
        x.npu(),
        residual.npu(),
        w.npu(),
    )
    assert not calls_of(module)["npu_add_rms_norm"]
    found = outcomes(report)
    whys = [one for one in found.get("rms_norm", []) + found.get("add_rms_norm", []) if one]
    assert len(whys) == bool(why) and all(re.search(why, one) for one in whys), found


FOLLOWERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a second reader": (lambda y, s: (*ours(y), y.abs()), "aten.abs.default reads the norm too"),
    "returned": (lambda y, s: (*ours(y), y), "output reads the norm too"),
    "int4": (lambda y, s: lq_graph.dynamic_quant(y, dtype=torch.int32), "to int4"),
    "another last dim": (lambda y, s: (*ours(y), y.view(-1, K // 2) + 1), "view.* reads the norm"),
    "three": (
        lambda y, s: (
            *theirs(y),
            *torch_npu.npu_dynamic_quant(y, smooth_scales=s),
            *torch_npu.npu_dynamic_quant(y, smooth_scales=s * 2),
        ),
        "3 quantizations; the operator has two results",
    ),
    "smooth scales made later": (
        lambda y, s: torch_npu.npu_dynamic_quant(y, smooth_scales=s * 2),
        "the smooth scales are computed after the norm",
    ),
}


@pytest.mark.parametrize("case", FOLLOWERS)
def test_quantizations_that_are_left(case: str) -> None:
    need_operator("npu_add_rms_norm_dynamic_quant")
    function, why = FOLLOWERS[case]
    x, residual, w = inputs_of(BF16)
    inputs = [t.npu() for t in (x, residual, w, exact(K, dtype=BF16, seed=3))]
    module, report = fused(lambda x, r, w, s: function(transformers(x + r, w), s), *inputs)
    assert calls_of(module)["npu_add_rms_norm"] == 1
    (found,) = outcomes(report)["add_rms_norm_dynamic_quant"]
    assert re.search(why, found), found


STATIC: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Any], str]] = {
    "one value": (BF16, lambda y, s: lq_graph.static_quant(y, s[:1]), r"scale has shape \(1,\)"),
    "a float16 scale": (F16, lq_graph.static_quant, "the scale is float16; .* takes float32"),
    "three scales": (
        BF16,
        lambda y, s: [lq_graph.static_quant(y, one) for one in (s, s.abs(), -s)],
        "3 quantizations with scales of their own",
    ),
    "two ways": (
        BF16,
        lambda y, s: (
            lq_graph.static_quant(y, s),
            torch_npu.npu_quantize(y, s, None, torch.qint8, -1),
        ),
        "one quantization divides and one multiplies",
    ),
    "a second reader": (
        BF16,
        lambda y, s: (lq_graph.static_quant(y, s), y.abs()),
        "aten.abs.default reads the norm too",
    ),
    "axis": (
        F16,
        lambda y, s: torch_npu.npu_quantize(y, s.float()[:2], None, torch.qint8, 0),
        "along axis 0",
    ),
    "int8 points": (
        BF16,
        lambda y, s: torch_npu.npu_quantize(y, s, s.to(I8), torch.qint8, -1),
        "the zero point is computed after the norm",
    ),
}


@pytest.mark.parametrize("case", STATIC)
def test_static_quantizations_that_are_left(case: str) -> None:
    need_operator("npu_add_rms_norm_quant", "div_mode")
    dtype, function, why = STATIC[case]
    x, residual, w = inputs_of(dtype)
    inputs = [t.npu() for t in (x, residual, w, exact(K, dtype=dtype, seed=3))]
    module, report = fused(lambda x, r, w, s: function(transformers(x + r, w), s), *inputs)
    assert calls_of(module)["npu_add_rms_norm"] == 1
    (found,) = outcomes(report)["add_rms_norm_quant"]
    assert re.search(why, found), found


@pytest.mark.parametrize(
    ("k", "of_points", "product", "cann", "why"),
    [
        (K, BF16, "A2", "8.2.RC1", "CANN 8.2.RC1 divides only"),
        (24, BF16, "A2", None, "a row has 24 values of 2 bytes"),
        (K, F32, "A2", None, "the zero point is float32, not bfloat16"),
        (K, BF16, "310P", None, ""),
    ],
)
def test_conditions_of_add_rms_norm_quant(
    k: int, of_points: torch.dtype, product: str, cann: str | None, why: str
) -> None:
    need_operator("npu_add_rms_norm_quant", "div_mode")

    def layer(x: Tensor, r: Tensor, w: Tensor, points: Tensor) -> Any:
        y = torch_npu.npu_add_rms_norm(x, r, w, EPSILON)[0]
        return torch_npu.npu_quantize(y, w, points, torch.qint8, -1, False)

    x = exact(2, k, dtype=BF16).npu()
    w, points = exact(k, dtype=BF16).npu(), exact(k, dtype=of_points).npu()
    lq_graph.set_product(product)
    lq_graph.set_cann_version(cann)
    try:
        _, report = fused(layer, x, x, w, points)
    finally:
        lq_graph.set_product(None)
        lq_graph.set_cann_version(None)
    (found,) = outcomes(report)["add_rms_norm_quant"]
    assert re.search(why or "takes no bfloat16", found), found


def test_a_norm_without_a_sum_is_not_quantized() -> None:
    x, _, w = inputs_of(BF16)
    module, report = fused(lambda x, w: ours(transformers(x, w)), x.npu(), w.npu())
    assert calls_of(module) == {"npu_rms_norm": 1, "npu_dynamic_quant": 1}
    (found,) = outcomes(report)["add_rms_norm_dynamic_quant"]
    assert "no sum before the norm" in found


def test_a_norm_without_a_sum_is_not_quantized_statically() -> None:
    x, _, w = inputs_of(BF16)
    module, report = fused(
        lambda x, w: lq_graph.static_quant(transformers(x, w), w), x.npu(), w.npu()
    )
    assert "npu_rms_norm" in calls_of(module)
    (found,) = outcomes(report)["add_rms_norm_quant"]
    assert "no sum before the norm" in found


def test_a_tensor_that_the_graph_writes_is_left() -> None:
    def layer(x: Tensor, w: Tensor) -> Tensor:
        y = transformers(x, w)
        torch.ops.aten.copy_.default(x, y)
        return y

    x, _, w = inputs_of(F16)
    module, report = fused(layer, x.npu(), w.npu())
    assert not calls_of(module)["npu_rms_norm"]
    assert outcomes(report) == {"rms_norm": ["the graph writes into a tensor that it reads"]}


def test_two_streams_are_left() -> None:
    from lq_graph.fusion.passes import fuse

    x, _, w = inputs_of(F16)
    module = traced(transformers, x.npu(), w.npu())
    next(n for n in module.graph.nodes if "mean" in n.name).meta["stream_label"] = "2"
    assert outcomes(fuse(module)) == {"rms_norm": ["its nodes are on two streams"]}


def test_a_cpu_graph_is_left() -> None:
    x, _, w = inputs_of(F16)
    _, report = fused(transformers, x, w)
    assert outcomes(report) == {"rms_norm": ["the tensors are on cpu"]}


@pytest.mark.parametrize(
    ("product", "dtype", "names"),
    [
        ("310P", F16, {"npu_add_rms_norm": 1, "npu_dynamic_quant": 1}),
        ("310P", BF16, {}),
        ("A3", BF16, {"npu_add_rms_norm_dynamic_quant": 1}),
        ("950", F16, {"npu_add_rms_norm_dynamic_quant": 1}),
    ],
    ids=str,
)
def test_products(product: str, dtype: torch.dtype, names: dict[str, int]) -> None:
    def layer(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return theirs(transformers(x + r, w))

    inputs = [t.npu() for t in inputs_of(dtype)]
    lq_graph.set_product(product)
    try:
        module, _ = fused(layer, *inputs)
    finally:
        lq_graph.set_product(None)
    got = calls_of(module)
    assert {name: got[name] for name in names} == names
    assert ("_to_copy" in got) == (not names)


def test_a_second_run_changes_nothing_and_exact_does_nothing() -> None:
    from lq_graph.fusion.passes import fuse

    def layer(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return ours(transformers(x + r, w))

    inputs = [t.npu() for t in inputs_of(F16)]
    module, _ = fused(layer, *inputs)
    before = str(module.graph)
    assert not fuse(module).lines and str(module.graph) == before
    module, report = fused(layer, *inputs, exact=True)
    assert not set(outcomes(report)) & set(NORMS)
    assert calls_of(module)["_to_copy"] == 2
    module, _ = fused(layer, *inputs, off=frozenset({"add_rms_norm"}))
    assert calls_of(module) == {"npu_rms_norm": 1, "add.Tensor": 1, "npu_dynamic_quant": 1}
