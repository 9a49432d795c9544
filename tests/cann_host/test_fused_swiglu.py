"""SwiGLU and SwiGLU that quantizes, by torch_npu's calls and in graphs, beside a numpy golden.

The golden computes the exponential in float64, so a value may round to the integer beside: at most
one in a hundred.
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
    DequantSwigluQuantCall,
    SwiGluCall,
    SwiGluQuantCall,
    TensorDesc,
    check_dequant_swiglu_quant,
    check_swi_glu,
    check_swi_glu_quant,
)
from support import golden_fused
from support.eager import BF16, F16, F32, I8, I32, as_numpy, refused
from support.fused import as_array, compute, either_way, positive, there
from support.has import need_converter, need_operator

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
ROWS, H = 12, 64
WAYS = pytest.mark.parametrize("way", ["eager", "static"])


def normal(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(2).to(dtype)


def sums(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-2000, 2000, shape, generator=torch.Generator().manual_seed(seed)).int()


def assert_integers(got: Tensor, want: np.ndarray) -> None:
    difference = np.abs(as_numpy(got.cpu()).astype(int) - want.astype(int))
    assert difference.max(initial=0) <= 1 and (difference > 0).mean() <= 0.01
    assert len(np.unique(want)) > 20  # the scale fits the values


def assert_steps(got: Tensor, want: np.ndarray) -> None:
    assert got.dtype == F32
    np.testing.assert_allclose(as_numpy(got.cpu()), want, rtol=1e-6)


# ---- SwiGlu ----


@WAYS
@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_swiglu(dtype: torch.dtype, dim: int, way: str) -> None:
    x = normal(4, 6, 8, dtype=dtype)
    got = either_way(lambda x: torch_npu.npu_swiglu(x, dim=dim), way)(x.npu())
    want = np.moveaxis(golden_fused.swiglu(np.moveaxis(as_array(x), dim, -1)), -1, dim)
    assert got.dtype == dtype and tuple(got.shape) == want.shape
    close = {F32: 2e-6, F16: 1e-3, BF16: 8e-3}[dtype]  # one rounding
    np.testing.assert_allclose(as_array(got.cpu()), want, rtol=close, atol=1e-7)


# ---- DequantSwigluQuant ----

DEQUANT: dict[str, dict[str, Any]] = {
    "dynamic": {"quant_mode": 1},
    "the right half": {"quant_mode": 1, "activate_left": False},
    "smooth scales": {"quant_mode": 1, "quant_scale": positive(H)},
    "one smooth scale": {"quant_mode": 1, "quant_scale": positive(1)},
    "int32 bias": {"quant_mode": 1, "bias": sums(2 * H, seed=2)},
    "float32 bias": {"quant_mode": 1, "bias": normal(2 * H)},
    "bfloat16 bias": {"quant_mode": 1, "bias": normal(2 * H, dtype=BF16)},
    "without activation_scale": {"quant_mode": 1, "activation_scale": None},
    "bfloat16 x": {"quant_mode": 1, "x": normal(ROWS, 2 * H, dtype=BF16)},
    "float16 x": {"quant_mode": 1, "x": normal(3, 4, 2 * H, dtype=F16)},
    "static": {"quant_scale": positive(H), "quant_offset": normal(H)},
    "static, one scale": {"quant_scale": positive(1), "quant_offset": normal(1)},
    "groups": {"quant_mode": 1, "groups": [5, 0, 7]},
    "groups, smooth scales": {"quant_mode": 1, "groups": [5, 0, 7], "quant_scale": positive(3, H)},
    "groups, bias": {"quant_mode": 1, "groups": [5, 0, 7], "bias": normal(3, 2 * H, dtype=F16)},
    "groups, int32 bias": {"quant_mode": 1, "groups": [4, 8], "bias": sums(2, 2 * H, seed=2)},
    "groups, static": {
        "groups": [5, 7],
        "quant_scale": positive(2, H),
        "quant_offset": normal(2, H),
    },
    "groups, a scale each": {
        "groups": [5, 7],
        "quant_scale": positive(2),
        "quant_offset": normal(2),
    },
    "bfloat16 groups": {"quant_mode": 1, "groups": [5], "x": normal(5, 2 * H, dtype=BF16)},
    "numbered groups": {"quant_mode": 1, "groups": [[2, 5], [0, 7], [1, 0]]},
    "GPT-OSS by columns": {"quant_mode": 1, "groups": [5, 7], "swiglu_mode": 1, "clamp_limit": 2.0},
    "GPT-OSS by halves": {
        "quant_mode": 1,
        "groups": [5, 7],
        "swiglu_mode": 2,
        "glu_alpha": 1.5,
        "glu_bias": 0.5,
        "clamp_limit": 1.5,
    },
}


def dequant_arguments(case: str) -> dict[str, Any]:
    given = {"activate_left": True, "activation_scale": positive(ROWS), **DEQUANT[case]}
    groups = given.pop("groups", None)
    x = given.setdefault("x", sums(ROWS, 2 * H))
    if x.dtype == I32:
        count = (len(groups),) if groups else ()
        given["weight_scale"] = positive(*count, 2 * H, seed=9) / 5
    else:
        del given["activation_scale"]
    if groups is not None:
        given["group_index"] = torch.tensor(groups)
    return given


def dequant_golden(given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    x = as_array(given["x"]).reshape(-1, 2 * H)
    numbers, counts = [0], [len(x)]
    grouped = "group_index" in given
    if grouped:
        groups = given["group_index"].numpy()
        pairs = groups.ndim == 2
        numbers = groups[:, 0].tolist() if pairs else list(range(len(groups)))
        counts = groups[:, 1].tolist() if pairs else groups.tolist()
    of_row = np.repeat(numbers, counts)

    def row(name: str) -> Any:
        array = as_array(given.get(name))
        if array is None or not grouped:
            return array
        return array.reshape(len(numbers), -1)[of_row]

    value = x
    if given["x"].dtype == I32:
        activation = as_array(given["activation_scale"])
        value = golden_fused.dequantized(x, row("weight_scale"), activation, row("bias"))
    renamed = {"swiglu_mode": "mode", "clamp_limit": "limit", "glu_alpha": "alpha"}
    options = {new: given[old] for old, new in renamed.items() if old in given}
    if "glu_bias" in given:
        options["bias"] = given["glu_bias"]
    value = golden_fused.swiglu(value, left=given["activate_left"], **options)
    scale, offset = row("quant_scale"), row("quant_offset")
    if given.get("quant_mode") == 1:
        scaled = value if scale is None else value * scale
        values, steps = golden_fused.quantize_rows(scaled, 127, "divide" if grouped else "step")
        return values, steps
    return golden_fused.quantize(value, scale, offset), None


@WAYS
@pytest.mark.parametrize("case", DEQUANT)
def test_dequant_swiglu_quant(case: str, way: str) -> None:
    given = dequant_arguments(case)
    variant = [name for name in ("swiglu_mode",) if name in given]
    need_operator("npu_dequant_swiglu_quant", *variant)
    if way != "eager":
        need_converter("npu_dequant_swiglu_quant")
    options = {k: v for k, v in given.items() if not isinstance(v, Tensor) and v is not None}
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    names = list(tensors)

    def run(*values: Tensor) -> Any:
        named = dict(zip(names, values, strict=True))
        return torch_npu.npu_dequant_swiglu_quant(named.pop("x"), **named, **options)

    y, scale = either_way(run, way)(*(t.npu() for t in tensors.values()))
    want, steps = dequant_golden(given)
    shape = given["x"].shape
    assert y.dtype == I8 and y.shape == (*shape[:-1], H) and scale.shape == shape[:-1]
    assert_integers(y.reshape(-1, H), want)
    if steps is not None:
        assert_steps(scale.reshape(-1), steps)


@WAYS
@pytest.mark.parametrize(("groups", "rows"), [([2, 0, 3], 5), ([[2, 0], [0, 0], [1, 0]], 0)])
def test_the_rest_of_padded_groups_stays(groups: list[Any], rows: int, way: str) -> None:
    """No kernel writes rows after the last group; the others are as ever."""
    need_operator("npu_dequant_swiglu_quant")
    if way != "eager":
        need_converter("npu_dequant_swiglu_quant")
    given = {**dequant_arguments("groups"), "group_index": torch.tensor(groups)}
    call = torch_npu.npu_dequant_swiglu_quant

    def run(x: Tensor, w: Tensor, a: Tensor, groups: Tensor) -> Any:
        return call(
            x,
            weight_scale=w,
            activation_scale=a,
            group_index=groups,
            activate_left=True,
            quant_mode=1,
        )

    names = ("x", "weight_scale", "activation_scale", "group_index")
    y, scale = either_way(run, way)(*(given[name].npu() for name in names))
    cut = {n: t[:rows] if n in ("x", "activation_scale") else t for n, t in given.items()}
    values, steps = dequant_golden(cut)
    assert steps is not None
    if rows:  # of none, only that it is taken
        assert_integers(y[:rows], values)
        assert_steps(scale[:rows], steps)


def test_a_quantized_matmul_feeds_it() -> None:
    """int32 of npu_quant_matmul, eagerly and in one graph, gives the same bits."""
    need_operator("npu_dequant_swiglu_quant")
    need_converter("npu_dequant_swiglu_quant")
    x = torch.randint(-128, 128, (ROWS, 32), generator=torch.Generator().manual_seed(3)).to(I8)
    weight = torch.randint(-128, 128, (32, 2 * H), generator=torch.Generator().manual_seed(4)).to(
        I8
    )
    one, scale, act = torch.ones(1), positive(2 * H) / 50, positive(ROWS)

    def run(x: Tensor, weight: Tensor, one: Tensor, scale: Tensor, act: Tensor) -> Any:
        accumulated = torch_npu.npu_quant_matmul(x, weight, one, output_dtype=I32)
        values, steps = torch_npu.npu_dequant_swiglu_quant(
            accumulated,
            weight_scale=scale,
            activation_scale=act,
            activate_left=True,
            quant_mode=1,
        )
        return accumulated, values, steps

    args = [t.npu() for t in (x, weight, one, scale, act)]
    eager, graph = run(*args), either_way(run, "static")(*args)
    assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))
    product = x.numpy().astype(int) @ weight.numpy().astype(int)
    np.testing.assert_array_equal(eager[0].cpu().numpy(), product)
    value = golden_fused.dequantized(product, scale.numpy(), act.numpy())
    values, steps = golden_fused.quantize_rows(golden_fused.swiglu(value), 127, "step")
    assert_integers(eager[1], values)
    assert_steps(eager[2], steps)


def test_swiglu_mode_without_groups_is_said_to_have_no_effect() -> None:
    need_operator("npu_dequant_swiglu_quant", "swiglu_mode")
    given = dequant_arguments("dynamic")
    tensors = {k: there(v) for k, v in given.items() if isinstance(v, Tensor)}
    x = tensors.pop("x")
    with pytest.warns(RuntimeWarning, match=r"swiglu_mode 1 .* no effect without group_index"):
        y, _ = torch_npu.npu_dequant_swiglu_quant(
            x, **tensors, activate_left=True, quant_mode=1, swiglu_mode=1
        )
    assert_integers(y, dequant_golden(given)[0])


# ---- SwiGluQuant: torchair has no converter, so the graph's operator is called directly ----

SWI_GLU_QUANT: dict[str, dict[str, Any]] = {
    "one row of scales": {"smooth_scales": positive(1, H, seed=2) * 9, "quant_mode": 1},
    "groups by ends": {
        "smooth_scales": positive(3, H) * 9,
        "group_index": torch.tensor([5, 5, 9], dtype=I32),
        "quant_mode": 1,
    },
    "groups by rows": {
        "smooth_scales": positive(3, H) * 9,
        "group_index": torch.tensor([5, 0, 4], dtype=I32),
        "group_list_type": 1,
        "quant_mode": 1,
        "activate_left": True,
    },
    "static": {
        "smooth_scales": positive(2, H) * 99,
        "offsets": normal(2, H),
        "group_index": torch.tensor([5, 12], dtype=I32),
    },
    "static, a scale each": {
        "smooth_scales": positive(2) * 99,
        "offsets": normal(2),
        "group_index": torch.tensor([5, 12], dtype=I32),
    },
}


@pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("case", SWI_GLU_QUANT)
def test_swiglu_quant(case: str, dtype: torch.dtype, int4: bool) -> None:
    need_operator("npu_swiglu_quant")
    x, given = normal(ROWS, 2 * H, dtype=dtype), SWI_GLU_QUANT[case]
    if int4 and case == "static":
        given = {**given, "smooth_scales": given["smooth_scales"] / 8}
    options = {"dst_type": torch.quint4x2} if int4 else {}
    y, scale = torch_npu.npu_swiglu_quant(
        x.npu(), **{name: there(value) for name, value in given.items()}, **options
    )
    value = golden_fused.swiglu(as_array(x), left=given.get("activate_left", False))
    ends = [ROWS]
    if "group_index" in given:
        groups = given["group_index"].numpy()
        ends = (np.cumsum(groups) if given.get("group_list_type") else groups).tolist()
    smooth = as_array(given["smooth_scales"]).reshape(len(ends), -1)
    offsets = as_array(given.get("offsets"))
    begin = 0
    for index, end in enumerate(ends):  # rows after the last group are not smoothed
        value[begin:end] *= smooth[index]
        if offsets is not None:
            value[begin:end] += offsets.reshape(len(ends), -1)[index]
        begin = end
    top = 7 if int4 else 127
    if given.get("quant_mode") == 1:
        values, factors = golden_fused.quantize_rows(value, top, "factor")
        assert_steps(scale, factors)
    else:
        values = golden_fused.to_even(value, top)
    packed = y.cpu()
    if int4:  # the first of two values is in the low half of the byte
        halves = packed.to(torch.int16) & 0xFF
        packed = torch.stack([halves & 15, halves >> 4], -1).flatten(-2)
        packed = torch.where(packed > 7, packed - 16, packed)
        assert (packed.numpy() != values).mean() <= 0.01
    else:
        assert_integers(packed, values)
    attrs: dict[str, Any] = {k: v for k, v in given.items() if not isinstance(v, Tensor)}
    attrs["quant_mode"] = "dynamic" if given.get("quant_mode") else "static"
    inputs = {"x": x, **{k: v for k, v in given.items() if isinstance(v, Tensor)}}
    attrs["dst_type"] = 29 if int4 else 2
    graph, steps = executor.run_op(executor.find_op("SwiGluQuant"), inputs, attrs)
    assert torch.equal(graph.values if int4 else graph, packed.to(I8))
    assert given.get("quant_mode") != 1 or torch.equal(steps, scale.cpu())


# ---- refusals ----

X = TensorDesc("int32", (ROWS, 2 * H))
WEIGHT, ACT = TensorDesc("float32", (2 * H,)), TensorDesc("float32", (ROWS,))
GROUPS, ONE = TensorDesc("int64", (2,)), TensorDesc("float32", (1,))
HALF, XF = TensorDesc("float32", (H,)), TensorDesc("bfloat16", (ROWS, 2 * H))
SMOOTH = TensorDesc("float32", (1, H))
WITH_GROUPS = {"group_index": GROUPS, "weight_scale": TensorDesc("float32", (2, 2 * H))}


REFUSED = [
    # the call; code eagerly and in a graph; text
    (SwiGluCall(A2, XF._replace(dtype="int8"), -1), 161002, 561003, "x is int8"),
    (SwiGluCall(A2, XF, 2), 161002, None, "dim is 2"),
    (SwiGluCall(A2, XF._replace(shape=(4, 7)), -1), 161002, None, "halves that dim"),
    (SwiGluCall(P310, TensorDesc("float16", (4, 8)), -1), 561002, 561002, "8 bytes"),
    (DequantSwigluQuantCall(P310, X, WEIGHT), 561003, 561003, "no kernel on Ascend310P3"),
    (DequantSwigluQuantCall(A950, X, WEIGHT), None, None, "cann_host does not compute"),
    (DequantSwigluQuantCall(A2, X), 161001, 561002, "weight_scale is null"),
    (DequantSwigluQuantCall(A2, XF._replace(dtype="float32")), 161002, 561003, "x is float32"),
    (DequantSwigluQuantCall(A2, X, WEIGHT, dst_type="hifloat8"), 561003, 561003, "allows int8"),
    (DequantSwigluQuantCall(A2, X, ONE), 561002, 561002, r"weight_scale has shape \(1,\)"),
    (DequantSwigluQuantCall(A2, X, WEIGHT, ONE), 561002, 561002, "must have 12 values"),
    (
        DequantSwigluQuantCall(A2, X, WEIGHT, ACT, quant_mode="neither"),
        561002,
        561002,
        "quant_mode is 'neither'",
    ),
    (
        DequantSwigluQuantCall(A2, X, WEIGHT, ACT, quant_scale=HALF),
        561002,
        561002,
        "quant_offset is null",
    ),
    (
        DequantSwigluQuantCall(A2, X, WEIGHT, ACT, quant_scale=HALF, quant_offset=ONE),
        None,
        None,
        "reads past it",
    ),
    (DequantSwigluQuantCall(A2, XF, round_mode="floor"), None, None, "round_mode is 'floor'"),
    (
        DequantSwigluQuantCall(A2, X, WEIGHT, group_index=GROUPS, quant_mode="dynamic"),
        561002,
        561002,
        r"weight_scale has shape \(128,\); it must be \(2, 128\)",
    ),
    (
        DequantSwigluQuantCall(A2, X, **WITH_GROUPS, swiglu_mode=5),
        561002,
        561002,
        "swiglu_mode is 5",
    ),
    (
        DequantSwigluQuantCall(
            A2, XF, group_index=TensorDesc("int64", (3, 2)), quant_mode="dynamic"
        ),
        561002,
        561002,
        "group_index has two dims",
    ),
    (
        DequantSwigluQuantCall(
            A2, XF._replace(shape=(4, 96)), group_index=GROUPS, quant_mode="dynamic"
        ),
        561002,
        561002,
        "multiple of 64",
    ),
    (
        DequantSwigluQuantCall(
            A2, XF._replace(shape=(4, 10624)), group_index=GROUPS, quant_mode="dynamic"
        ),
        561002,
        561002,
        "x has last dim 10624; it can have 10560",
    ),
    (SwiGluQuantCall(A2, XF), None, None, "smooth_scales is null"),
    (SwiGluQuantCall(A2, X, SMOOTH), 161002, 561003, "x is int32"),
    (SwiGluQuantCall(A2, XF, SMOOTH, quant_mode="dynamic_msd"), None, None, "dynamic_msd"),
    (SwiGluQuantCall(A2, XF, SMOOTH, group_list_type=2), 561002, 561002, "group_list_type is 2"),
    (
        SwiGluQuantCall(A2, XF, SMOOTH, group_index=TensorDesc("int32", (3,))),
        561002,
        561002,
        "its first dim must be 3",
    ),
    (SwiGluQuantCall(A2, XF, SMOOTH, quant_mode="static"), None, None, "offsets has shape None"),
]
CHECKS: dict[Any, Any] = {
    SwiGluCall: check_swi_glu,
    DequantSwigluQuantCall: check_dequant_swiglu_quant,
    SwiGluQuantCall: check_swi_glu_quant,
}


@pytest.mark.parametrize("is_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("call", "eager", "graph", "text"), REFUSED)
def test_refusals(call: Any, eager: Any, graph: Any, text: str, is_graph: bool) -> None:
    refusal = CHECKS[type(call)](call._replace(is_graph=is_graph))
    assert refusal is not None and refusal.code == (graph if is_graph else eager), refusal
    assert re.search(text, str(refusal)), str(refusal)


def test_refusals_arrive_by_torch_npu() -> None:
    need_operator("npu_dequant_swiglu_quant", "swiglu_mode")
    need_operator("npu_swiglu_quant")
    given = {k: there(v) for k, v in dequant_arguments("groups").items()}
    x = given.pop("x")
    with refused(r"161002[\s\S]*aclnnSwiGlu: x is int8; Ascend910B2 allows"):
        torch_npu.npu_swiglu(torch.ones(4, 8, dtype=I8).npu())
    with refused(r"561002[\s\S]*aclnnDequantSwigluQuantV2: weight_scale has shape \(2, 128\)"):
        weight_scale = given["weight_scale"][:2].contiguous()
        torch_npu.npu_dequant_swiglu_quant(x, **{**given, "weight_scale": weight_scale})
    with refused("gives 3 groups 27 rows, and x has 12"):
        groups = torch.tensor([9, 9, 9]).npu()
        torch_npu.npu_dequant_swiglu_quant(x, **{**given, "group_index": groups})
    for groups in (torch.tensor([[7, 2]]), torch.tensor([[-1, 2]])):
        with refused(f"group_index names group {groups[0, 0]}; there are 1"):
            one = {**given, "weight_scale": given["weight_scale"][0], "group_index": groups.npu()}
            torch_npu.npu_dequant_swiglu_quant(x, **one)
    with refused("aclnnSwiGluQuantV2: group_index gives 1 groups 13 rows"):
        groups = torch.tensor([13], dtype=I32).npu()
        torch_npu.npu_swiglu_quant(
            normal(ROWS, 2 * H).npu(),
            smooth_scales=positive(1, H).npu(),
            group_index=groups,
            quant_mode=1,
        )


def test_ends_of_groups_that_fall_are_refused() -> None:
    need_operator("npu_swiglu_quant")
    with refused("group_index gives a group of -3 rows, and x has 12"):
        torch_npu.npu_swiglu_quant(
            normal(ROWS, 2 * H).npu(),
            smooth_scales=positive(2, H).npu(),
            group_index=torch.tensor([5, 2], dtype=I32).npu(),
            quant_mode=1,
        )


# ---- the functions that older wheels, and those for Ascend 950, call ----


def test_v1_is_v2_without_its_attributes() -> None:
    need_operator("npu_dequant_swiglu_quant")
    x, weight, act = sums(ROWS, 2 * H), positive(2 * H) / 5, positive(ROWS)
    y, scale = torch.zeros(ROWS, H, dtype=I8), torch.zeros(ROWS)
    arguments = (x, weight, act, None, None, None, None, 1, "dynamic", y, scale)
    compute("aclnnDequantSwigluQuant", *arguments)
    want = torch_npu.npu_dequant_swiglu_quant(
        x.npu(),
        weight_scale=weight.npu(),
        activation_scale=act.npu(),
        activate_left=True,
        quant_mode=1,
    )
    assert torch.equal(y, want[0].cpu()) and torch.equal(scale, want[1].cpu())
