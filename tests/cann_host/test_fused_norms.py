"""Norms that quantize, by torch_npu's calls and in graphs, beside a numpy golden, bit by bit.

The values are multiples of 1/8 and k is a power of two, so no sum of squares rounds: the order of a
sum does not matter.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.graph import executor
from cann_host.rules import (
    AddRmsNormDynamicQuantCall,
    AddRmsNormQuantCall,
    RmsNormCall,
    RmsNormQuantCall,
    TensorDesc,
    check_add_rms_norm_cast,
    check_add_rms_norm_dynamic_quant,
    check_add_rms_norm_quant,
    check_rms_norm_quant,
)
from support import golden, golden_fused
from support.eager import BF16, F16, F32, I8, I32, pretend, refused
from support.fused import (
    EPSILON,
    K,
    as_array,
    assert_bits,
    compute,
    dtype_of,
    either_way,
    exact,
    norm_of,
    positive,
    there,
)
from support.has import need_converter, need_operator

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"


def points(*shape: int, dtype: torch.dtype = I32) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(6)).to(dtype)


# ---- AddRmsNorm: two roundings more before Ascend 950 ----

ROUNDS = [
    (soc, dtype, "tn" if soc != A950 else "")
    for soc in (A2, A950, P310)
    for dtype in (F32, F16, BF16)
    if (soc, dtype) != (P310, BF16)
]


@pytest.mark.parametrize(("soc", "dtype", "rounds"), ROUNDS, ids=str)
def test_add_rms_norm(
    soc: str, dtype: torch.dtype, rounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, soc)
    x1, x2 = exact(3, 5, K, dtype=dtype), exact(3, 5, K, dtype=dtype, seed=1)
    gamma = exact(K, dtype=dtype, seed=2)
    y, rstd, x = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu(), EPSILON)
    want, want_rstd, want_x = norm_of(x1, x2, gamma, rounds)
    assert (y.dtype, rstd.dtype, x.dtype) == (dtype, F32, dtype)
    assert_bits(x, want_x)
    assert_bits(rstd, want_rstd)
    assert_bits(y, golden_fused.rounded(want, dtype_of(x1)))
    inputs = {"x1": x1, "x2": x2, "gamma": gamma}
    in_graph = executor.run_op(executor.find_op("AddRmsNorm"), inputs, {"epsilon": EPSILON})
    assert all(torch.equal(a.cpu(), b) for a, b in zip((y, rstd, x), in_graph, strict=True))


def test_a_device_rounds_where_the_document_does_not() -> None:
    """The bits say which: rounding once gives others."""
    x1, x2, gamma = (exact(*s, dtype=F16, seed=i) for i, s in enumerate([(9, K), (9, K), (K,)]))
    once, *_ = norm_of(x1, x2, gamma)
    y = torch_npu.npu_add_rms_norm(x1.npu(), x2.npu(), gamma.npu(), EPSILON)[0].cpu()
    assert not np.array_equal(as_array(y), golden_fused.rounded(once, "float16"))
    np.testing.assert_allclose(as_array(y), once, rtol=2e-3)


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("soc", [A2, A950])
def test_add_rms_norm_cast(soc: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ascend 950 the float32 result is the rounded y."""
    need_operator("npu_add_rms_norm_cast")
    if way != "eager":
        need_converter("npu_add_rms_norm_cast")
    pretend(monkeypatch, soc)
    x1, x2 = exact(5, K, dtype=BF16), exact(5, K, dtype=BF16, seed=1)
    gamma = exact(K, dtype=BF16, seed=2)

    def run(x1: Tensor, x2: Tensor, gamma: Tensor) -> Any:
        return torch_npu.npu_add_rms_norm_cast(x1, x2, gamma, EPSILON)

    wide, y, rstd, x = either_way(run, way)(x1.npu(), x2.npu(), gamma.npu())
    want, want_rstd, want_x = norm_of(x1, x2, gamma, "tn" if soc == A2 else "")
    assert wide.dtype == F32
    assert_bits(wide, golden.bfloat16(want) if soc == A2 else want)
    for got, expected in ((y, golden.bfloat16(want)), (rstd, want_rstd), (x, want_x)):
        assert_bits(got, expected)


def test_add_rms_norm_in_place() -> None:
    need_operator("npu_add_rms_norm_v2")
    x1, x2 = exact(5, K, dtype=F16), exact(5, K, dtype=F16, seed=1)
    gamma = exact(K, dtype=F16, seed=2)
    y, total = x1.npu(), x2.npu()
    rstd = torch_npu.npu_add_rms_norm_v2(y, total, gamma.npu(), EPSILON)
    want, want_rstd, want_x = norm_of(x1, x2, gamma, "tn")
    assert_bits(y, golden_fused.rounded(want, "float16"))
    assert_bits(total, want_x)
    assert_bits(rstd, want_rstd)


# ---- AddRmsNormDynamicQuant: float32 until it is quantized ----

DYNAMIC = {
    # id: smooth scales, beta, output_mask, int4; which results are written
    "plain": ((False, False), False, None, False, (True, False)),
    "one smooth scale": ((True, False), False, None, False, (True, False)),
    "two smooth scales": ((True, True), False, None, False, (True, True)),
    "beta": ((False, False), True, None, False, (True, False)),
    "the second only": ((False, True), False, [False, True], False, (False, True)),
    "both without smooth scales": ((False, False), True, [True, True], False, (True, True)),
    "int4": ((True, False), False, [True, False], True, (True, False)),
}


@pytest.mark.parametrize("way", ["eager", "static"])
@pytest.mark.parametrize("case", DYNAMIC)
def test_add_rms_norm_dynamic_quant(case: str, way: str) -> None:
    check_dynamic(case, way, BF16)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["eager", "dynamic"])
@pytest.mark.parametrize(("soc", "dtype"), [(A2, F16), (A950, F16), (A950, BF16)], ids=str)
@pytest.mark.parametrize("case", DYNAMIC)
def test_add_rms_norm_dynamic_quant_of_chips(
    case: str, soc: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, soc)
    check_dynamic(case, way, dtype, "divide" if soc == A950 else "reciprocal")


def check_dynamic(case: str, way: str, dtype: torch.dtype, kernel: str = "reciprocal") -> None:
    need_operator("npu_add_rms_norm_dynamic_quant", "output_mask", "y_dtype")
    if way != "eager":
        need_converter("npu_add_rms_norm_dynamic_quant")
    has_smooth, has_beta, mask, int4, wanted = DYNAMIC[case]
    x1, x2 = exact(2, 5, K, dtype=dtype), exact(2, 5, K, dtype=dtype, seed=1)
    gamma = exact(K, dtype=dtype, seed=2)
    smooth = [
        exact(K, dtype=dtype, seed=3 + i) if has else None for i, has in enumerate(has_smooth)
    ]
    beta = exact(K, dtype=dtype, seed=7) if has_beta else None
    options: dict[str, Any] = {"output_mask": mask, "y_dtype": torch.quint4x2 if int4 else None}

    def run(x1: Tensor, x2: Tensor, gamma: Tensor, smooth1: Any, smooth2: Any, beta: Any) -> Any:
        return torch_npu.npu_add_rms_norm_dynamic_quant(
            x1,
            x2,
            gamma,
            smooth_scale1=smooth1,
            smooth_scale2=smooth2,
            beta=beta,
            epsilon=EPSILON,
            **{name: value for name, value in options.items() if value is not None},
        )

    got = either_way(run, way)(*(there(t) for t in (x1, x2, gamma, *smooth, beta)))
    y, _, total = norm_of(x1, x2, gamma)
    if beta is not None:
        y = y + as_array(beta)
    assert_bits(got[2], total)
    for index in (0, 1):
        if not wanted[index]:
            continue
        factors = as_array(smooth[index])
        scaled = y if factors is None else y * factors
        values, scale = golden_fused.quantize_rows(scaled, 7 if int4 else 127, kernel)
        assert got[index].dtype == (I32 if int4 else I8) and got[3 + index].dtype == F32
        assert_bits(got[index], golden.pack_int4(values) if int4 else values)
        assert_bits(got[3 + index], scale)


# ---- AddRmsNormQuant ----

QUANT = {
    # id: chip, dtype of x, of scales, of zero points; roundings without beta, and with it
    "float16": (A2, F16, F32, I32, "tnp", "tnp"),
    "bfloat16": (A2, BF16, BF16, BF16, "", "t"),
    "bfloat16 by float32": (A2, BF16, F32, I32, "", "t"),
    "310P": (P310, F16, F32, I32, "tnp", "tnp"),
    "950": (A950, F16, F16, F16, "", ""),
    "float32 of 950": (A950, F32, F32, F32, "", ""),
}


@pytest.mark.parametrize("second", [False, True], ids=["one result", "two results"])
@pytest.mark.parametrize("with_points", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("case", QUANT)
def test_add_rms_norm_quant(
    case: str, with_points: bool, second: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager operator, and the graph's, which torchair does not make."""
    need_operator("npu_add_rms_norm_quant", "beta", "div_mode")
    soc, dtype, of_scales, of_points, plain, with_beta = QUANT[case]
    pretend(monkeypatch, soc)
    divides = not second or soc == A950
    x1, x2 = exact(2, 5, K, dtype=dtype), exact(2, 5, K, dtype=dtype, seed=1)
    tensors = {
        "gamma": exact(K, dtype=dtype, seed=2),
        "scales1": positive(K, dtype=of_scales) * (1 if divides else 100),
        "zero_points1": points(K, dtype=of_points) if with_points else None,
        "beta": exact(K, dtype=dtype, seed=3) if second else None,
        "scales2": positive(K, dtype=of_scales, seed=8) if second else None,
        "zero_points2": points(K, dtype=of_points) if second and with_points else None,
    }
    options = {"epsilon": EPSILON, "div_mode": divides}
    y1, y2, x = torch_npu.npu_add_rms_norm_quant(
        x1.npu(), x2.npu(), **{name: there(t) for name, t in tensors.items()}, **options
    )
    inputs = {"x1": x1, "x2": x2, **{k: t for k, t in tensors.items() if t is not None}}
    in_graph = executor.run_op(executor.find_op("AddRmsNormQuant"), inputs, options)

    want, _, total = norm_of(x1, x2, tensors["gamma"], with_beta if second else plain)
    if second:
        want = want + as_array(tensors["beta"])
    assert_bits(x, total)
    for index, got in ((1, y1), (2, y2)):
        scale, offset = (as_array(tensors[f"{name}{index}"]) for name in ("scales", "zero_points"))
        if scale is not None:
            assert_bits(got, golden_fused.quantize(want, scale, offset, divides=divides))
            assert torch.equal(got.cpu(), in_graph[index - 1])
    assert torch.equal(x.cpu(), in_graph[2])
    if not second:  # InferShape gives one element
        assert in_graph[1].shape == (1,)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_add_rms_norm_quant_with_one_scale(dtype: torch.dtype) -> None:
    """aclnnAddRmsNormQuantV2 has another kernel: float32, and a multiplication by 1 / scale."""
    need_operator("npu_add_rms_norm_quant", "beta")
    x1, x2 = exact(2, 5, K, dtype=dtype), exact(2, 5, K, dtype=dtype, seed=1)
    gamma, beta = exact(K, dtype=dtype, seed=2), exact(K, dtype=dtype, seed=3)
    scale, offset = positive(1), points(1)
    y1, _, x = torch_npu.npu_add_rms_norm_quant(
        *(t.npu() for t in (x1, x2, gamma, scale, offset, beta)), epsilon=EPSILON
    )
    want, _, total = norm_of(x1, x2, gamma)
    inverse = np.float32(1) / as_array(scale)
    want = golden_fused.quantize(want + as_array(beta), inverse, as_array(offset), divides=False)
    assert_bits(y1, want)
    assert_bits(x, total)


def test_add_rms_norm_quant_of_950() -> None:
    """torch_npu calls aclnnAddRmsNormQuant there, without beta."""
    x1, x2 = exact(2, 5, K, dtype=BF16), exact(2, 5, K, dtype=BF16, seed=1)
    gamma, scale, offset = exact(K, dtype=BF16, seed=2), positive(K), points(K, dtype=F32)
    y1, y2, x = torch.zeros(2, 5, K, dtype=I8), torch.zeros(2, 5, K, dtype=I8), torch.zeros_like(x1)
    given = (x1, x2, gamma, scale, None, offset, None, -1, EPSILON, 1, y1, y2, x)
    compute("aclnnAddRmsNormQuant", *given, soc=A950)
    want, _, total = norm_of(x1, x2, gamma)
    assert_bits(y1, golden_fused.quantize(want, as_array(scale), as_array(offset)))
    assert_bits(x, total)


# ---- RmsNormQuant ----


@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rms_norm_quant(dtype: torch.dtype, int4: bool) -> None:
    need_operator("npu_rms_norm_quant", "dst_dtype")
    x, gamma = exact(2, 5, K, dtype=dtype), exact(K, dtype=dtype, seed=1)
    beta, scale = exact(K, dtype=dtype, seed=2), positive(1, dtype=dtype)
    offset = points(1, dtype=I8)
    options = {"dst_dtype": torch.quint4x2} if int4 else {}
    tensors = (x, gamma, beta, scale, offset)
    y = torch_npu.npu_rms_norm_quant(*(t.npu() for t in tensors), EPSILON, **options)
    zero = torch.zeros_like(x)
    want = norm_of(x, zero, gamma)[0] + as_array(beta)
    inverse = np.float32(1) / as_array(scale)
    value = want * inverse + as_array(offset).astype(np.float32)
    halves = value.astype(np.float16).astype(np.float32)
    integers = golden.to_even(halves, 7 if int4 else 127)
    assert_bits(y, golden.pack_int4(integers) if int4 else integers)
    inputs = dict(zip(("x", "gamma", "beta", "scale", "offset"), tensors, strict=True))
    attrs = {"epsilon": EPSILON, "dst_type": 29 if int4 else 2}
    (in_graph,) = executor.run_op(executor.find_op("RmsNormQuant"), inputs, attrs)
    assert torch.equal(y.cpu(), in_graph.packed if int4 else in_graph)


def test_rms_norm_quant_reads_one_scale() -> None:
    need_operator("npu_rms_norm_quant")
    x, one = exact(2, K, dtype=F16), torch.ones(K, dtype=F16)
    with pytest.warns(RuntimeWarning, match=r"reads one scale and one offset of \(64,\)"):
        torch_npu.npu_rms_norm_quant(
            x.npu(), one.npu(), one.npu(), one.npu(), points(K, dtype=I8).npu(), EPSILON
        )


# ---- refusals: CANN's code, argument, given, allowed ----

X, G, FX = (
    TensorDesc("bfloat16", (5, K)),
    TensorDesc("bfloat16", (K,)),
    TensorDesc("float16", (5, K)),
)
F32K, POINTS = TensorDesc("float32", (K,)), TensorDesc("int32", (K,))
SHORT = TensorDesc("bfloat16", (8,))


def of(desc: TensorDesc, dtype: str) -> TensorDesc:
    return desc._replace(dtype=dtype)


REFUSED = [
    # AddRmsNormDynamicQuant: what differs from a good call; code eagerly and in a graph; text
    (AddRmsNormDynamicQuantCall, {"x1": of(X, "float32")}, 561003, 561003, "x1 is float32"),
    (AddRmsNormDynamicQuantCall, {"gamma": of(G, "float16")}, 561003, 561003, "gamma is float16"),
    (AddRmsNormDynamicQuantCall, {"gamma": SHORT}, 561002, 561002, r"\(8,\); it must be \(64,\)"),
    (AddRmsNormDynamicQuantCall, {"smooth_scale1": SHORT}, 561002, 561002, "smooth_scale1 has"),
    (AddRmsNormDynamicQuantCall, {"smooth_scale2": G}, 161002, 561002, "without smooth_scale1"),
    (AddRmsNormDynamicQuantCall, {"beta": SHORT}, None, None, "CANN does not compare"),
    (AddRmsNormDynamicQuantCall, {"x2": X._replace(shape=(4, K))}, None, None, "x1 is .* and x2"),
    (AddRmsNormDynamicQuantCall, {"epsilon": 0.0}, 561002, 561002, "epsilon is 0.0"),
    (AddRmsNormDynamicQuantCall, {"y_dtype": "float8_e5m2"}, 561003, 561003, "y is float8_e5m2"),
    (AddRmsNormDynamicQuantCall, {"soc": P310}, 561003, 561003, "no kernel on Ascend310P3"),
    (
        AddRmsNormDynamicQuantCall,
        {"soc": A950, "y_dtype": "hifloat8"},
        None,
        None,
        "cann_host does",
    ),
    (
        AddRmsNormDynamicQuantCall,
        {"smooth_scale1": G, "output_mask": (False, True)},
        161002,
        "taken",
        r"smooth_scale1 is given and output_mask is \[False, True\]",
    ),
    # AddRmsNormQuant
    (AddRmsNormQuantCall, {"x1": of(X, "float32")}, 161002, 561003, "x1 is float32"),
    (AddRmsNormQuantCall, {"scales1": of(F32K, "int8")}, 161002, 561003, "scales1 is int8"),
    (AddRmsNormQuantCall, {"scales1": F32K._replace(shape=(1,))}, 161002, None, r"\(1,\)"),
    (AddRmsNormQuantCall, {"zero_points1": of(POINTS, "bfloat16")}, 561003, 561003, "zero_points"),
    (
        AddRmsNormQuantCall,
        {"zero_points2": POINTS._replace(shape=(8,))},
        161002,
        None,
        "points2 has",
    ),
    (AddRmsNormQuantCall, {"scales2": of(F32K, "bfloat16")}, 561003, 561003, "scales2 is bfloat16"),
    (AddRmsNormQuantCall, {"gamma": SHORT}, 161002, None, "last dims of x1"),
    (AddRmsNormQuantCall, {"beta": SHORT}, 161002, None, "beta has shape"),
    (AddRmsNormQuantCall, {"y_dtype": "int4"}, 161002, 561003, "y is int4.*allows int8"),
    (AddRmsNormQuantCall, {"soc": A950, "zero_points2": POINTS}, None, 561002, "without scales2"),
    # RmsNormQuant
    (RmsNormQuantCall, {"x": of(X, "float32")}, 161002, 561003, "x is float32"),
    (RmsNormQuantCall, {"gamma": of(G, "float16")}, 161002, 561003, "gamma is float16"),
    (RmsNormQuantCall, {"offset": TensorDesc("int32", (1,))}, 161002, 561003, "must be int8"),
    (RmsNormQuantCall, {"gamma": SHORT}, 161002, 561002, r"gamma has shape \(8,\)"),
    (RmsNormQuantCall, {"beta": SHORT}, 161002, 561002, "beta has shape"),
    (RmsNormQuantCall, {"offset": TensorDesc("int8", (2,))}, 161002, 561002, "offset has shape"),
    (RmsNormQuantCall, {"epsilon": 0.0}, 561002, 561002, "epsilon is 0.0"),
    (RmsNormQuantCall, {"soc": A950}, None, None, "cann_host has no RmsNormQuant"),
]
GOOD: dict[Any, tuple[Any, dict[str, Any]]] = {
    AddRmsNormDynamicQuantCall: (
        check_add_rms_norm_dynamic_quant,
        {"soc": A2, "x1": X, "x2": X, "gamma": G},
    ),
    AddRmsNormQuantCall: (
        check_add_rms_norm_quant,
        {"soc": A2, "x1": X, "x2": X, "gamma": G, "scales1": F32K, "zero_points1": POINTS},
    ),
    RmsNormQuantCall: (
        check_rms_norm_quant,
        {
            "soc": A2,
            "x": X,
            "gamma": G,
            "beta": G,
            "scale": TensorDesc("bfloat16", (1,)),
            "offset": TensorDesc("int8", (1,)),
            "y_dtype": "int8",
            "epsilon": 1e-6,
        },
    ),
}


def in_place(kind: Any, changes: dict[str, Any], is_graph: bool) -> Any:
    """A good call with changes; x1's changes are x2's too."""
    given = {**GOOD[kind][1], **changes}
    if "x1" in changes:
        given["x2"] = changes["x1"]
    if kind is AddRmsNormQuantCall:
        return kind(**given, entry="graph" if is_graph else "v2")
    return kind(**given, is_graph=is_graph)


@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("kind", "changes", "eager", "graph", "text"), REFUSED)
def test_refusals(
    kind: Any, changes: dict[str, Any], eager: Any, graph: Any, text: str, is_graph: bool
) -> None:
    check, code = GOOD[kind][0], graph if is_graph else eager
    assert check(in_place(kind, {}, is_graph)) is None
    refusal = check(in_place(kind, changes, is_graph))
    if code == "taken":
        assert refusal is None
        return
    assert refusal is not None and refusal.code == code
    assert re.search(text, str(refusal)), str(refusal)
    assert (code is None) == ("CANN error" not in str(refusal))


@pytest.mark.parametrize(
    ("soc", "dtype", "code"), [(A2, "float32", 161002), (P310, "float16", 561003)]
)
def test_add_rms_norm_cast_refuses(soc: str, dtype: str, code: int) -> None:
    x, gamma = TensorDesc(dtype, (5, K)), TensorDesc(dtype, (K,))
    refusal = check_add_rms_norm_cast(RmsNormCall(soc, x, gamma, 1e-6, x))
    assert refusal is not None and refusal.code == code


def test_refusals_arrive_by_torch_npu() -> None:
    for name in ("add_rms_norm_dynamic_quant", "add_rms_norm_quant", "rms_norm_quant"):
        need_operator(f"npu_{name}")
    x, gamma = exact(5, K, dtype=F16).npu(), exact(K, dtype=F16).npu()
    with refused(
        r"561003[\s\S]*aclnnAddRmsNormDynamicQuantV2: gamma is float32; it must be float16"
    ):
        torch_npu.npu_add_rms_norm_dynamic_quant(x, x, gamma.float())
    with refused(r"161002[\s\S]*aclnnAddRmsNormQuantV2: scales1 has shape \(8,\)"):
        torch_npu.npu_add_rms_norm_quant(x, x, gamma, positive(8).npu(), None)
    with refused(r"161002[\s\S]*aclnnRmsNormQuant: offset is int32; it must be int8"):
        one = torch.ones(1, dtype=F16).npu()
        torch_npu.npu_rms_norm_quant(x, gamma, gamma, one, points(1).npu(), EPSILON)
    with refused(r"aclnnAddRmsNorm: x1 is .* x2 .* \(5, 8\)"):
        torch_npu.npu_add_rms_norm(x, x[:, :8].contiguous(), gamma, EPSILON)
