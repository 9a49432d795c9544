"""Rotary embeddings: numbers beside the golden, refusals, eager beside torchair's graphs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.graph.executor import find_op, run_op
from cann_host.rules import (
    INVALID,
    NO_KERNEL,
    TILING,
    ApplyRotaryCall,
    RotaryCall,
    TensorDesc,
    check_apply_rotary,
    check_interleave_rope,
    check_rotary,
    check_rotary_mul,
)
from support import golden_rope
from support.eager import BF16, F16, F32, as_numpy, compiled, pretend, refused
from support.has import need_operator
from support.refusals import described, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A3, A950, P310 = "Ascend910B2", "Ascend910_9391", "Ascend950PR_9579", "Ascend310P3"
PRODUCTS = {A2: "A2", A950: "950", P310: "310P"}
MODES = ("half", "interleave", "quarter", "interleave-half")
DTYPES = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=lambda d: str(d)[6:])


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def equal(got: Tensor, want: np.ndarray) -> None:
    np.testing.assert_array_equal(as_numpy(got.cpu()).astype(np.float32), want)


# ---- ApplyRotaryPosEmb ----

# soc, layout, shapes of query, key and cos, rotary_mode
APPLY = [
    (A2, "BSND", (2, 3, 4, 64), (2, 3, 1, 64), (2, 3, 1, 64), "half"),
    (A2, "BSND", (1, 2, 3, 128), (1, 2, 2, 128), (1, 2, 1, 64), "half"),
    (A2, "TND", (5, 4, 128), (5, 2, 128), (5, 1, 128), "half"),
    (P310, "BSND", (2, 3, 4, 64), (2, 3, 1, 64), (2, 3, 1, 64), "half"),
    (A950, "BSND", (2, 3, 4, 24), (2, 3, 1, 24), (1, 3, 1, 16), "interleave"),
    (A950, "SBND", (3, 2, 4, 64), (3, 2, 1, 64), (3, 2, 1, 64), "quarter"),
    (A950, "BNSD", (2, 4, 3, 64), (2, 1, 3, 64), (2, 1, 3, 64), "half"),
    (A950, "TND", (5, 4, 36), (5, 2, 36), (5, 1, 36), "quarter"),
]


@DTYPES
@pytest.mark.parametrize(("soc", "layout", "q", "k", "c", "mode"), APPLY, ids=str)
def test_apply_rotary_in_place(soc, layout, q, k, c, mode, dtype, monkeypatch) -> None:
    if soc == P310 and dtype == BF16:
        pytest.skip("310P has no bfloat16")
    need_operator("npu_apply_rotary_pos_emb", "rotary_mode")
    pretend(monkeypatch, soc)
    query, key, cos, sin = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate((q, k, c, c)))
    on_npu = [t.npu() for t in (query, key)]
    results = torch_npu.npu_apply_rotary_pos_emb(*on_npu, cos.npu(), sin.npu(), layout, mode)
    for x, written, result in zip((query, key), on_npu, results, strict=True):
        want = golden_rope.apply_rotary(
            *map(as_numpy, (x, cos, sin)), layout, mode, name(dtype), PRODUCTS[soc]
        )
        equal(written, want)
        equal(result, want)


def test_apply_rotary_rounds_a_tie_away_from_zero() -> None:
    """1 + 2**-8 lies between two bfloat16 values; the even one is 1."""
    query = torch.zeros(1, 1, 1, 64, dtype=BF16)
    query[..., 0], query[..., 32] = 1, -(2.0**-8)
    one = torch.ones(1, 1, 1, 64, dtype=BF16).npu()
    got, _ = torch_npu.npu_apply_rotary_pos_emb(query.npu(), query.npu(), one, one, "BSND")
    assert got[0, 0, 0, 0].item() == 1 + 2.0**-7


def test_apply_rotary_of_views() -> None:
    """Query and key are parts of one projection."""
    fused = randn(2, 3, 6, 64)
    cos, sin = randn(2, 3, 1, 64, seed=1), randn(2, 3, 1, 64, seed=2)
    on_npu = fused.npu()
    torch_npu.npu_apply_rotary_pos_emb(
        on_npu[:, :, :4], on_npu[:, :, 4:5], cos.npu(), sin.npu(), "BSND"
    )
    want = golden_rope.apply_rotary(
        *map(as_numpy, (fused, cos, sin)), "BSND", "half", "float32", "A2"
    )
    want[:, :, 5] = fused[:, :, 5]
    equal(on_npu, want)


def test_a_rotary_mode_that_the_chip_does_not_have() -> None:
    """CANN takes it, and its kernel rotates halves."""
    need_operator("npu_apply_rotary_pos_emb", "rotary_mode")
    x, c = randn(1, 2, 3, 64).npu(), randn(1, 2, 1, 64, seed=1).npu()
    want, _ = torch_npu.npu_apply_rotary_pos_emb(x.clone(), x.clone(), c, c, "BSND", "half")
    with pytest.warns(RuntimeWarning, match=f"interleave has no effect on {A2}.*cann_host's"):
        got, _ = torch_npu.npu_apply_rotary_pos_emb(x, x.clone(), c, c, "BSND", "interleave")
    assert torch.equal(got, want)


APPLY_CALL = {"query": (2, 3, 4, 64), "key": (2, 3, 1, 64), "cos": (2, 3, 1, 64)}
# soc, what is changed, code, texts
APPLY_REFUSED = [
    (A2, {"dtype": "int8"}, INVALID, ("query is int8", "bfloat16")),
    (P310, {"dtype": "bfloat16"}, INVALID, ("query is bfloat16", "float16 or float32")),
    (A2, {"key": described((2, 3, 1, 64), "float32")}, INVALID, ("key is float32", "float16")),
    (A2, {"layout": 2}, TILING, ("layout is 2", "1 (BSND) or 4 (TND)")),
    (A950, {"layout": 5}, TILING, ("layout is 5", "3 (BNSD)")),
    (A2, {"layout": 4}, TILING, ("query has 4 dims", "TND has 3")),
    (A2, {"query": (0, 3, 4, 64)}, TILING, ("query has shape (0, 3, 4, 64)", "empty")),
    (A2, {"sin": (2, 3, 1, 32)}, TILING, ("cos has shape (2, 3, 1, 64) and sin (2, 3, 1, 32)",)),
    (A2, {"cos": (2, 3, 2, 64)}, TILING, ("N of cos must be 1",)),
    (A2, {"cos": (1, 3, 1, 64)}, TILING, ("cos (1, 3, 1, 64)", "B must be the same")),
    (A2, {"key": (2, 4, 1, 64)}, TILING, ("key (2, 4, 1, 64)", "S must be the same")),
    (A2, {"query": (2, 3, 4, 96)}, TILING, ("D must be 64 or 128",)),
    (A2, {"cos": (2, 3, 1, 32)}, TILING, ("D must be 64 or 128",)),
    (A2, {"key": (2, 3, 1, 128)}, None, ("the same D",)),
    (A2, {"query": (2, 3, 255, 64)}, TILING, ("255 heads",)),
    (A2, {"query": (2, 30, 100, 128), "key": (2, 30, 8, 128), "cos": (2, 30, 1, 128),
          "dtype": "bfloat16"}, TILING, ("unified buffer", "196608")),
    (A950, {"mode": "thirds"}, TILING, ("rotary_mode is 'thirds'", "quarter")),
    (A950, {"query": (2, 3, 4, 66), "key": (2, 3, 1, 66), "mode": "quarter"}, TILING,
     ("multiple of 4",)),
    (A950, {"cos": (2, 3, 1, 128)}, TILING, ("D of query", "largest")),
    (A950, {"cos": (3, 3, 1, 64)}, TILING, ("B must be the same, or 1 in cos",)),
    (A950, {"key": (2, 3, 1, 32)}, None, ("the same D",)),
    ("Ascend910A", {}, None, ("no rules for Ascend910A",)),
]  # fmt: skip


def apply_call(soc: str, changes: dict[str, Any], **more: Any) -> ApplyRotaryCall:
    given = {**APPLY_CALL, **changes}
    dtype = given.pop("dtype", "float16")
    given.setdefault("sin", given["cos"])
    tensors = {
        n: given.pop(n) if isinstance(given[n], TensorDesc) else described(given.pop(n), dtype)
        for n in ("query", "key", "cos", "sin")
    }
    return ApplyRotaryCall(soc, **tensors, **given, **more)


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), APPLY_REFUSED, ids=str)
def test_apply_rotary_refuses(soc, changes, code, texts) -> None:
    told(check_apply_rotary(apply_call(soc, changes)), code, *texts)
    in_graph = NO_KERNEL if code == INVALID else code
    told(check_apply_rotary(apply_call(soc, changes, is_graph=True)), in_graph, *texts)


@pytest.mark.parametrize(
    ("soc", "changes"),
    [
        (A3, {}),
        (A950, {"layout": 3, "query": (2, 4, 3, 8), "key": (2, 1, 3, 8), "cos": (1, 1, 3, 8)}),
        # 76 heads of 128 fill the buffer; one row for each core needs less
        (A2, {"query": (2, 30, 75, 128), "key": (2, 30, 1, 128), "cos": (2, 30, 1, 128),
              "dtype": "bfloat16"}),
        (A2, {"query": (2, 3, 90, 128), "key": (2, 3, 1, 128), "cos": (2, 3, 1, 128),
              "dtype": "bfloat16"}),
    ],
    ids=str,
)  # fmt: skip
def test_apply_rotary_accepts(soc, changes) -> None:
    assert check_apply_rotary(apply_call(soc, changes)) is None


# ---- RotaryPositionEmbedding, RotaryMul, InterleaveRope ----

# soc, shapes of x and cos, mode
ROTARY = [
    (A2, (2, 3, 8, 64), (1, 1, 8, 64), 0),  # BNSD
    (A2, (2, 8, 3, 64), (1, 8, 1, 64), 1),  # BSND
    (A2, (8, 2, 3, 40), (8, 1, 1, 40), 0),  # SBND
    (A2, (2, 8, 3, 64), (2, 8, 1, 64), 0),
    (A2, (2, 3, 8, 64), (2, 1, 8, 64), 0),
    (A2, (2, 3, 1, 64), (1, 1, 1, 64), 0),
    (A2, (7, 3, 64), (7, 1, 64), 1),  # TND
    (P310, (2, 8, 3, 96), (1, 8, 1, 96), 0),
    (A950, (2, 8, 3, 20), (1, 8, 1, 20), 2),
    (A950, (2, 3, 8, 64), (2, 1, 8, 64), 3),
    (A950, (2, 3, 8, 64), (1, 1, 1, 64), 1),
    (A950, (5, 3, 8), (1, 3, 8), 0),
]


@DTYPES
@pytest.mark.parametrize(("soc", "x", "cos", "mode"), ROTARY, ids=str)
def test_rotary_position_embedding(soc, x, cos, mode, dtype, monkeypatch) -> None:
    if soc == P310 and dtype == BF16:
        pytest.skip("310P has no bfloat16")
    pretend(monkeypatch, soc)
    tensors = randn(*x, dtype=dtype), *(randn(*cos, dtype=dtype, seed=i) for i in (1, 2))
    want = golden_rope.rotary(*map(as_numpy, tensors), MODES[mode], name(dtype))
    given = dict(zip(("x", "cos", "sin"), tensors, strict=True))
    equal(run_op(find_op("RotaryPositionEmbedding"), given, {"mode": mode})[0], want)
    need_operator("npu_rotary_mul", "rotary_mode")
    if mode < 2 and soc != P310:  # torch_npu checks the mode of the chip that it runs on
        result = torch_npu.npu_rotary_mul(*(t.npu() for t in tensors), MODES[mode])
        equal(result, want)


def test_rotary_by_a_matrix() -> None:
    need_operator("npu_rotary_mul", "rotate")
    x, cos, sin = randn(2, 3, 4, 64), randn(1, 1, 4, 64, seed=1), randn(1, 1, 4, 64, seed=2)
    partner, sign = golden_rope.planes(64, "half")
    matrix = np.zeros((64, 64), np.float32)
    for i in range(64):
        matrix[partner[i], i] = sign[i]
    tensors = [t.npu() for t in (x, cos, sin)]
    got = torch_npu.npu_rotary_mul(*tensors, "half", torch.from_numpy(matrix).npu())
    equal(got, golden_rope.rotary(*map(as_numpy, (x, cos, sin))))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cos", [(2, 1, 4, 64), (2, 1, 1, 64)], ids=str)
@pytest.mark.parametrize("soc", [A2, A950])
def test_interleave_rope(soc, cos, dtype, monkeypatch) -> None:
    need_operator("npu_interleave_rope")
    pretend(monkeypatch, soc)
    tensors = randn(2, 3, 4, 64, dtype=dtype), *(randn(*cos, dtype=dtype, seed=i) for i in (1, 2))
    want = golden_rope.rotary(*map(as_numpy, tensors), "interleave-half", name(dtype))
    equal(torch_npu.npu_interleave_rope(*(t.npu() for t in tensors)), want)


ROTARY_CALL = {"x": (2, 3, 8, 64), "cos": (1, 1, 8, 64)}
# soc, what is changed, code, texts
ROTARY_REFUSED = [
    (A2, {"dtype": "int32"}, NO_KERNEL, ("x is int32", "float16")),
    (A2, {"cos": described((1, 1, 8, 64), "float32")}, NO_KERNEL, ("cos is float32", "x float16")),
    (A2, {"x": (3, 64), "cos": (3, 64)}, TILING, ("must have 3 or 4 dims",)),
    (A2, {"sin": (1, 1, 4, 64)}, TILING, ("sin (1, 1, 4, 64)",)),
    (A2, {"cos": (1, 1, 8, 32)}, TILING, ("last dims must be the same",)),
    (A2, {"x": (2, 3, 0, 64), "cos": (1, 1, 0, 64)}, TILING, ("cannot be empty",)),
    (A2, {"x": (2, 3, 8, 898), "cos": (1, 1, 8, 898)}, TILING, ("D must be even, at most 896",)),
    (A2, {"x": (2, 3, 8, 63), "cos": (1, 1, 8, 63)}, TILING, ("D must be even",)),
    (A950, {"x": (2, 3, 8, 66), "cos": (1, 1, 8, 66), "mode": 2}, TILING, ("multiple of 4",)),
    (A950, {"mode": 4}, TILING, ("mode is 4",)),
    (A950, {"cos": (1, 2, 8, 64)}, TILING, ("x's or 1",)),
    (P310, {"x": (2, 8, 3, 40), "cos": (1, 8, 1, 40)}, TILING, ("32 or 64 or 96 or 128",)),
    (P310, {"mode": 1}, TILING, ("half only",)),
    (A2, {"mode": 1, "cos": (2, 1, 8, 64)}, TILING, ("one dim of cos is x's",)),
    (A2, {"mode": 1, "x": (2, 3, 8, 63), "cos": (1, 1, 8, 63)}, None, ("odd D",)),
    (A2, {"mode": 1, "x": (1, 1, 1, 9000), "cos": (1, 1, 1, 9000)}, TILING, ("unified buffer",)),
    (A2, {"x": (2, 32, 4, 64), "cos": (1, 1, 4, 64)}, TILING, ("so many heads for 4 steps",)),
    (A2, {"x": (2, 3, 8, 24), "cos": (1, 1, 8, 24)}, TILING, ("so many heads for 8 steps",)),
    (A2, {"cos": (1, 3, 8, 64)}, TILING, ("this broadcast",)),
    (A2, {"cos": (1, 1, 1, 64)}, None, ("computes nothing",)),
    (A2, {"cos": (3, 2, 8, 64)}, None, ("each dim of cos must be x's or 1",)),
    (A2, {"rotate": (64, 32)}, TILING, ("rotate has shape (64, 32)", "(64, 64)")),
    (A950, {"rotate": (64, 64)}, INVALID, ("rotate is given", A950)),
]


def rotary_call(soc: str, changes: dict[str, Any], **more: Any) -> RotaryCall:
    given = {**ROTARY_CALL, **changes}
    dtype = given.pop("dtype", "float16")
    given.setdefault("sin", given["cos"])
    for key in {"x", "cos", "sin", "rotate"} & given.keys():
        if not isinstance(given[key], TensorDesc):
            given[key] = described(given[key], dtype)
    return RotaryCall(soc, **given, **more)


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), ROTARY_REFUSED, ids=str)
def test_rotary_refuses(soc, changes, code, texts) -> None:
    told(check_rotary(rotary_call(soc, changes)), code, *texts)
    if code != INVALID:
        told(check_rotary(rotary_call(soc, changes, is_graph=True)), code, *texts)


# soc, shapes of x and cos, dtype, code in eager mode, in a graph, text
INTERLEAVE_REFUSED = [
    (A2, (2, 3, 8, 64), (2, 1, 8, 64), "float32", INVALID, NO_KERNEL, "x is float32"),
    (A2, (2, 3, 8, 32), (2, 1, 8, 32), "float16", TILING, TILING, "(B, N, S, 64)"),
    (A2, (2, 3, 8, 64), (1, 1, 8, 64), "float16", TILING, TILING, "(2, 1, 8, 64)"),
    (P310, (2, 3, 8, 64), (2, 1, 8, 64), "float16", NO_KERNEL, NO_KERNEL, "does not have"),
]


@pytest.mark.parametrize(
    ("soc", "x", "cos", "dtype", "eager", "graph", "text"), INTERLEAVE_REFUSED, ids=str
)
def test_interleave_rope_refuses(soc, x, cos, dtype, eager, graph, text) -> None:
    call = RotaryCall(soc, *(described(s, dtype) for s in (x, cos, cos)))
    told(check_interleave_rope(call), eager, text)
    told(check_interleave_rope(call._replace(is_graph=True)), graph, text)


def test_interleave_rope_of_950_is_another_operator_in_eager_mode() -> None:
    call = RotaryCall(A950, *(described(s) for s in ((2, 3, 8, 32), (2, 1, 8, 32), (2, 1, 8, 32))))
    assert check_interleave_rope(call) is None
    told(check_interleave_rope(call._replace(is_graph=True)), NO_KERNEL, "InterleaveRope")


def test_rotary_mul_takes_four_dims() -> None:
    call = RotaryCall(A2, *(described(s) for s in ((3, 8, 64), (1, 8, 64), (1, 8, 64))))
    told(check_rotary_mul(call), None, "four dims")


def test_torch_npu_passes_a_refusal_on() -> None:
    x, c = randn(2, 3, 4, 96).npu(), randn(2, 3, 1, 96).npu()
    with refused("(?s)aclnnApplyRotaryPosEmb.*D must be 64 or 128.*561002"):
        torch_npu.npu_apply_rotary_pos_emb(x, x.clone(), c, c, "BSND")
    with refused("(?s)aclnnRotaryPositionEmbedding.*so many heads for 4 steps.*561002"):
        torch_npu.npu_rotary_mul(randn(2, 32, 4, 64).npu(), *[randn(1, 1, 4, 64).npu()] * 2)


# ---- in graphs ----


@DTYPES
def test_a_graph_computes_what_eager_computes(dtype: torch.dtype) -> None:
    need_operator("npu_apply_rotary_pos_emb", "rotary_mode")
    need_operator("npu_interleave_rope")
    query, key = randn(2, 3, 4, 64, dtype=dtype), randn(2, 3, 1, 64, dtype=dtype, seed=1)
    cos, sin = (randn(2, 3, 1, 64, dtype=dtype, seed=i) for i in (2, 3))

    def run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        mul = torch_npu.npu_rotary_mul(query, cos, sin)
        rope = query.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2)
        if dtype != F32:
            mul = mul + torch_npu.npu_interleave_rope(*rope).transpose(1, 2)
        return mul, *torch_npu.npu_apply_rotary_pos_emb(query, key, cos, sin, "BSND")

    on_npu = [t.npu() for t in (query, key, cos, sin)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        in_graph = compiled(run)(*on_npu)
    equal(on_npu[0], as_numpy(query))  # torchair copies what the operator writes into
    eager = run(*on_npu)
    assert all(torch.equal(a, b) for a, b in zip(eager, in_graph, strict=True))


def test_a_graph_refuses_with_the_codes_of_cann() -> None:
    x, c = randn(2, 3, 4, 96).npu(), randn(2, 3, 1, 96).npu()

    def run(x: Tensor, c: Tensor) -> Any:
        return torch_npu.npu_apply_rotary_pos_emb(x, x, c, c, "BSND")

    with refused("(?s)ApplyRotaryPosEmb.*D must be 64 or 128.*561002"):
        compiled(run)(x, c)
