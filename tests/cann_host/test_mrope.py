"""Rotary embeddings by rows of a cache (npu_mrope): numbers beside the golden, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cann_host
from cann_host.rules import INVALID, TILING, MropeCall, TensorDesc, check_mrope
from support import golden_rope
from support.eager import BF16, F16, F32, as_numpy, pretend, refused
from support.has import need_operator
from support.refusals import described, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
PLAIN = [0, 0, 0]  # the wheel reads memory that is gone if no section is given
DTYPES = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=lambda d: str(d)[6:])


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def places(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(7))


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# section, cache_mode, head size, D of the cache
SERVED = [
    (PLAIN, "default", 64, 64),
    (PLAIN, "default", 96, 32),
    ([16, 24, 24], "default", 128, 128),
    ([8, 12, 12], "interleave", 128, 64),
    ([24, 20, 20], "interleave", 128, 128),
    ([16, 16, 16, 16], "default", 128, 128),
]


@DTYPES
@pytest.mark.parametrize("mode", ["half", "interleave"])
@pytest.mark.parametrize(("section", "cache_mode", "head", "d"), SERVED, ids=str)
@pytest.mark.parametrize("soc", [A2, A950])
def test_mrope(soc, section, cache_mode, head, d, mode, dtype, monkeypatch) -> None:
    need_operator("npu_mrope", "cache_mode")
    pretend(monkeypatch, soc)
    positions = places(5) if section == PLAIN else places(len(section), 5)
    query, key = randn(5, 3 * head, dtype=dtype), randn(5, head, dtype=dtype, seed=1)
    cache = randn(40, d, dtype=dtype, seed=2)
    results = torch_npu.npu_mrope(
        *(t.npu() for t in (positions, query, key, cache)),
        head,
        mrope_section=section,
        rotary_mode=mode,
        cache_mode=cache_mode,
    )
    for x, result in zip((query, key), results, strict=True):
        want = golden_rope.mrope(
            positions.numpy(), *map(as_numpy, (x, cache)), section, head, mode, cache_mode,
            name(dtype),
        )  # fmt: skip
        np.testing.assert_array_equal(as_numpy(result.cpu()), want)


def test_mrope_of_views() -> None:
    """Query and key are parts of one projection; the results are not."""
    need_operator("npu_mrope")
    positions, fused, cache = places(5), randn(5, 6 * 64, dtype=F16), randn(40, 64, dtype=F16)
    on_npu = fused.npu()
    results = torch_npu.npu_mrope(
        positions.npu(), on_npu[:, :256], on_npu[:, 256:320], cache.npu(), 64, mrope_section=PLAIN
    )
    for x, result in zip((fused[:, :256], fused[:, 256:320]), results, strict=True):
        want = golden_rope.mrope(
            positions.numpy(), *map(as_numpy, (x, cache)), PLAIN, 64, "half", "default", "float16"
        )
        np.testing.assert_array_equal(as_numpy(result.cpu()), want)
    assert torch.equal(on_npu.cpu(), fused)


@pytest.mark.parametrize("wrong", [-1, 40])
@pytest.mark.parametrize("tokens", [3, 100])
def test_a_position_outside_the_cache(tokens: int, wrong: int) -> None:
    need_operator("npu_mrope")
    positions = places(tokens)
    positions[1] = wrong
    x, cache = randn(tokens, 64).npu(), randn(40, 64).npu()
    with refused(f"(?s)positions.*{wrong}.*cosSinCache.*cann_host"):
        torch_npu.npu_mrope(positions.npu(), x, x, cache, 64, mrope_section=PLAIN)


CALL: dict[str, Any] = {
    "positions": TensorDesc("int64", (5,)),
    "query": described((5, 384)),
    "key": described((5, 128)),
    "cache": described((40, 128)),
    "section": (0, 0, 0),
    "head_size": 128,
}
THREE = TensorDesc("int64", (3, 5))
# soc, what is changed, code, texts
REFUSED = [
    (P310, {}, INVALID, ("Ascend310P3", "RopeWithSinCosCache")),
    ("Ascend1", {}, None, ("Ascend1",)),
    (A2, {"cache_mode": 2}, INVALID, ("cacheMode is 2", "0 or 1")),
    (A2, {"positions": TensorDesc("int32", (5,))}, INVALID, ("positions is int32", "int64")),
    (A2, {"query": described((5, 384), "int8")}, INVALID, ("queryIn is int8", "bfloat16")),
    (A2, {"cache": described((40, 128), "float32")}, INVALID, ("cosSinCache is float32",)),
    (A2, {"query": described((5, 3, 128))}, INVALID, ("queryIn", "2 dims")),
    (A2, {"key": described((0, 128))}, INVALID, ("keyIn", "empty")),
    (A2, {"key": described((4, 128))}, INVALID, ("(5, 384)", "(4, 128)")),
    (A2, {"section": (64,)}, INVALID, ("mropeSection is (64,)", "3 or 4 values")),
    (A2, {"section": (64, 4, -4)}, INVALID, ("below 0",)),
    (A2, {"section": (16, 24, 16)}, INVALID, ("half of D", "128")),
    (A2, {"section": (24, 24, 16)}, INVALID, ("(24, 24, 16)", "(16, 24, 24)")),
    (A2, {"head_size": 0}, INVALID, ("headSize is 0",)),
    (A2, {"head_size": 48}, TILING, ("headSize is 48", "multiple of 32")),
    (A2, {"head_size": -32}, TILING, ("headSize is -32",)),
    (A2, {"cache": described((40, 80))}, TILING, ("D of cosSinCache is 80",)),
    (A2, {"head_size": 64}, TILING, ("headSize is 64", "128")),
    (A2, {"section": (16,) * 4, "cache_mode": 1}, TILING, ("cacheMode is 1", "must be 0")),
    (A2, {"positions": THREE}, None, ("positions has shape (3, 5)", "(5,)")),
    (A2, {"section": (16, 24, 24)}, None, ("positions has shape (5,)", "(3, 5)")),
    (A2, {"query": described((5, 400))}, None, ("(5, 400)", "128")),
    (A2, {"strides": ((390, 1), (128, 1))}, None, ("queryIn has strides (390, 1)",)),
    (A2, {"strides": ((384, 1), (1, 5))}, None, ("keyIn has strides (1, 5)",)),
    (A2, {"head_size": 16384, "query": described((5, 16384))}, None, ("16384",)),
]


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), REFUSED, ids=str)
def test_mrope_refuses(soc, changes, code, texts) -> None:
    told(check_mrope(MropeCall(soc, **(CALL | changes))), code, *texts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"section": None},
        {"section": (16, 24, 24), "positions": THREE, "cache_mode": 1},
        {"strides": ((512, 1), (512, 1))},
    ],
    ids=str,
)
def test_mrope_accepts(changes: dict[str, Any]) -> None:
    assert check_mrope(MropeCall(A2, **(CALL | changes))) is None


def test_rows_of_float32_must_be_dense() -> None:
    """Its kernel finds the first row of a core without the stride."""
    wide = {key: TensorDesc("float32", CALL[key].shape) for key in ("query", "key", "cache")}
    call = MropeCall(A2, **(CALL | wide | {"strides": ((512, 1), (128, 1))}))
    told(check_mrope(call), None, "queryIn has strides (512, 1)")
