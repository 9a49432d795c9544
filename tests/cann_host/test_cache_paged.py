"""Paged caches of keys and values: numbers beside the golden, refusals."""

from __future__ import annotations

from functools import partial
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
    KvRmsNormRopeCall,
    ScatterPaCall,
    TensorDesc,
    check_kv_rms_norm_rope_cache,
    check_scatter_pa_kv_cache,
)
from support import golden, golden_cache
from support.eager import (
    BF16,
    F16,
    I8,
    I32,
    as_numpy,
    assert_equal,
    compiled,
    pretend,
    refused,
    values,
)
from support.has import need_operator
from support.refusals import described, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
I64 = torch.int64


# ---- ScatterPaKvCache ----

# dtype, heads, D of key and of value, cache_mode, dims of a cache in NZ
PAGED = [
    (F16, 2, 32, 16, "Norm", 4),
    (BF16, 1, 64, 64, "Norm", 4),
    (F16, 2, 32, 16, "PA_NZ", 4),
    (BF16, 2, 32, 48, "PA_NZ", 5),
    (I8, 3, 64, 32, "PA_NZ", 4),
]


def paged(heads: int, d: int, dtype: torch.dtype, mode: str, dims: int) -> Tensor:
    """A cache of 5 blocks of 4."""
    d0 = 32 // dtype.itemsize
    if mode != "PA_NZ":
        shape: tuple[int, ...] = (5, 4, heads, d)
    else:
        shape = (5, heads * d // d0, 4, d0) if dims == 4 else (5, heads, d // d0, 4, d0)
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("way", ["eager", "graph"])
@pytest.mark.parametrize(("dtype", "heads", "dk", "dv", "mode", "dims"), PAGED, ids=str)
def test_scatter_pa_kv_cache(dtype, heads, dk, dv, mode, dims, way) -> None:
    need_operator("npu_scatter_pa_kv_cache", "cache_mode")
    slots = torch.tensor([9, -1, 0, 19], dtype=I32)
    rows = [values(4, heads, d, dtype=dtype, seed=d) for d in (dk, dv)]
    caches = [paged(heads, d, dtype, mode, dims).npu() for d in (dk, dv)]

    def run(key: Tensor, value: Tensor, keys: Tensor, cached: Tensor, slots: Tensor) -> None:
        torch_npu.npu_scatter_pa_kv_cache(key, value, keys, cached, slots, cache_mode=mode)

    function = run if way == "eager" else compiled(run)
    function(*(t.npu() for t in rows), *caches, slots.npu())
    d0 = 32 // dtype.itemsize if mode == "PA_NZ" else 0
    for row, cache in zip(rows, caches, strict=True):
        empty = np.zeros(cache.shape, as_numpy(row).dtype)
        assert_equal(cache, golden_cache.write_pages(empty, as_numpy(row), slots.numpy(), 4, d0=d0))


def test_a_slot_outside_writes_nothing() -> None:
    need_operator("npu_scatter_pa_kv_cache", "cache_mode")
    caches = [paged(2, 16, F16, "Norm", 4).npu() for _ in range(2)]
    rows = values(2, 2, 16, dtype=F16).npu()
    with refused("(?s)aclnnScatterPaKvCache.*slot_mapping has 20, and the cache has 20"):
        torch_npu.npu_scatter_pa_kv_cache(
            rows, rows, *caches, torch.tensor([3, 20]).npu(), cache_mode="Norm"
        )
    assert not caches[0].any() and not caches[1].any()


@pytest.mark.parametrize("strided", ["key", "value"])
def test_rows_with_gaps_are_refused(strided: str) -> None:
    """The kernel reads no strides."""
    need_operator("npu_scatter_pa_kv_cache", "cache_mode")
    caches = [paged(2, 16, F16, "Norm", 4).npu() for _ in range(2)]
    rows = {name: values(2, 2, 16, dtype=F16).npu() for name in ("key", "value")}
    rows[strided] = values(2, 4, 16, dtype=F16).npu()[:, :2]
    with refused(f"(?s)aclnnScatterPaKvCache.*{strided} has shape .* strides .*cann_host's own"):
        torch_npu.npu_scatter_pa_kv_cache(
            *rows.values(), *caches, torch.tensor([3, 4]).npu(), cache_mode="Norm"
        )
    assert not caches[0].any() and not caches[1].any()


def test_operators_of_atb_name_the_library_that_is_not_here() -> None:
    cache = paged(2, 16, F16, "Norm", 4).npu()
    rows = values(2, 2, 16, dtype=F16).npu()
    if not hasattr(torch_npu, "_npu_reshape_and_cache"):
        pytest.skip("this torch_npu has no operators of ATB")
    with pytest.raises(OSError, match=r"cann_host does not have libatb\.so"):
        torch_npu._npu_reshape_and_cache(rows, rows, cache, cache, torch.tensor([1, 2]).npu())


PA = {"key": (3, 2, 32), "key_cache": (4, 8, 2, 32), "slots": described((3,), "int32"),
      "value": (3, 2, 16), "value_cache": (4, 8, 2, 16)}  # fmt: skip
NZ = {**PA, "key_cache": (4, 4, 8, 16), "value_cache": (4, 2, 8, 16), "cache_mode": "PA_NZ"}
# soc, the call, what is changed, code in eager mode, texts
PA_REFUSED = [
    (P310, PA, {}, NO_KERNEL, ("does not have ScatterPaKvCache",)),
    (A2, PA, {"key": described((3, 2, 32), "float32")}, INVALID, ("key is float32", "int8")),
    (A2, PA, {"key_cache": described((4, 8, 2, 32), "int8")}, INVALID, ("key_cache is int8",)),
    (A2, PA, {"slots": described((3,), "int8")}, INVALID, ("slot_mapping is int8",)),
    (A2, PA, {"value": described((3, 2, 16), "bfloat16"),
              "value_cache": described((4, 8, 2, 16), "bfloat16")}, INVALID, ("PA_NZ only",)),
    (A2, NZ, {"value": described((3, 2, 32), "int8"),
              "value_cache": described((4, 2, 8, 32), "int8")}, TILING, ("key must be int8",)),
    (A2, PA, {"cache_mode": "BNSD"}, TILING, ("cache_mode is 'BNSD'",)),
    (A2, PA, {"scatter_mode": "Rope"}, None, ("scatter_mode Rope",)),
    (A950, PA, {"compressed": True}, None, ("compress_lens",)),
    (A2, PA, {"value_cache": ()}, None, ("a key alone",)),
    (A2, PA, {"slots": described((3, 1), "int32")}, TILING, ("3, 3 and 1 dims",)),
    (A2, PA, {"value": (3, 1, 16)}, TILING, ("tokens and heads differ",)),
    (A2, PA, {"key_cache": (4, 8, 1, 32)}, TILING, ("key_cache has shape", "(.., .., 2, 32)")),
    (A2, PA, {"value_cache": (4, 4, 2, 16)}, TILING, ("the same blocks",)),
    (A2, PA, {"key_cache": (1, 2, 2, 32), "value_cache": (1, 2, 2, 16)}, TILING, ("too few",)),
    (A2, PA, {"slots": described((2,), "int32")}, None, ("key has 3 tokens",)),
    (A950, PA, {"slots": described((2,), "int32")}, TILING, ("key has 3 tokens",)),
    (A2, NZ, {"key": (3, 2, 24), "key_cache": (4, 3, 8, 16)}, TILING, ("32 bytes",)),
    (A2, NZ, {"key_cache": (4, 4, 8, 32)}, TILING, ("in PA_NZ", "(.., 2, 2, .., 16)")),
]  # fmt: skip


@pytest.mark.parametrize(("soc", "call", "changes", "code", "texts"), PA_REFUSED, ids=str)
def test_scatter_pa_refuses(soc, call, changes, code, texts) -> None:
    given = {
        name: described(v) if isinstance(v, tuple) and not isinstance(v, TensorDesc) else v
        for name, v in {**call, **changes}.items()
    }
    told(check_scatter_pa_kv_cache(ScatterPaCall(soc, **given)), code, *texts)
    in_graph = NO_KERNEL if code == INVALID else code
    told(check_scatter_pa_kv_cache(ScatterPaCall(soc, **given, is_graph=True)), in_graph, *texts)


# ---- KvRmsNormRopeCache ----


class Kv:
    """Inputs of one call: 2 batches of 3 steps."""

    def __init__(self, mode: str, quant: str, with_v: bool) -> None:
        need_operator("npu_kv_rmsnorm_rope_cache", "v")
        self.mode, self.quant = mode, quant
        heads, norm = (2, 192) if with_v else (1, 512)
        self.dims = (192, 128) if with_v else (64, 512)
        self.kv = values(2, heads, 3, norm if with_v else 576, dtype=BF16)
        self.gamma = values(norm, dtype=BF16, seed=1) / 50
        self.cos, self.sin = (values(2, heads, 3, 64, dtype=BF16, seed=i) / 50 for i in (2, 3))
        self.v = values(2, heads, 3, 128, dtype=BF16, seed=4) if with_v else None
        places = {"Norm": [[0, 1, 4], [2, -1, 3]], "PA_BLK": [6, 2, 0, -1]}
        self.index = torch.tensor(places.get(mode[:6], [5, 1, 0, 7, -1, 2]))
        self.dtypes = [I8 if part in quant else BF16 for part in ("k", "c")]
        shape = (3, heads, 5) if mode == "Norm" else (6, 2, heads)
        self.caches = [
            torch.zeros(*shape, d, dtype=t) for d, t in zip(self.dims, self.dtypes, strict=True)
        ]
        self.scales = [
            values(d, seed=d).abs() / 50 + 0.1 if t == I8 else None
            for d, t in zip(self.dims, self.dtypes, strict=True)
        ]

    def run(self, *, output: bool = True) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        caches = [c.npu() for c in self.caches]
        optional = {"k_rope_scale": self.scales[0], "c_kv_scale": self.scales[1], "v": self.v}
        results = torch_npu.npu_kv_rmsnorm_rope_cache(
            *(t.npu() for t in (self.kv, self.gamma, self.cos, self.sin, self.index)),
            *caches,
            **{name: None if t is None else t.npu() for name, t in optional.items()},
            cache_mode=self.mode,
            is_output_kv=output,
        )
        return caches, results

    def want(self) -> list[np.ndarray]:
        """The caches, as float32 or int8."""
        inputs = map(as_numpy, (self.kv, self.gamma, self.cos, self.sin))
        rows = golden_cache.kv_rms_norm_rope(*inputs, as_numpy(self.v), 1e-5)
        made = []
        for x, cache, scale in zip(rows, self.caches, self.scales, strict=True):
            stored = golden.bfloat16(x)
            if scale is not None:
                stored = golden_cache.quantized(x, scale.numpy())
            tokens = np.moveaxis(stored, 1, 2).reshape(6, *stored.shape[1::2])
            size, length = (1, 5) if self.mode == "Norm" else (2, 0)
            slots = golden_cache.slots_of(self.index.numpy(), self.mode, 2, 3, size, length)
            empty = np.zeros(cache.shape, stored.dtype)
            if self.mode == "Norm":
                pages = np.moveaxis(empty, 1, 2)
                filled = golden_cache.write_pages(pages, tokens, slots, size)
                made.append(np.moveaxis(filled, 2, 1))
            else:
                d0 = (32 // cache.element_size()) if self.mode.endswith("NZ") else 0
                made.append(golden_cache.write_pages(empty, tokens, slots, size, d0=d0))
        return made


MODES = ("Norm", "PA", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")
# cache_mode, which caches are int8, whether v is given
KV = [
    *((mode, "", False) for mode in MODES),
    *((mode, quant, False) for mode in MODES[1:] for quant in ("kc", "k", "c")),
    ("Norm", "kc", True),
    ("PA_BNSD", "", True),
    ("PA_NZ", "kc", True),
]


@pytest.mark.parametrize(("mode", "quant", "with_v"), KV, ids=str)
@pytest.mark.filterwarnings("ignore:k_rope and c_kv:RuntimeWarning")
def test_kv_rms_norm_rope_cache(mode, quant, with_v) -> None:
    case = Kv(mode, quant, with_v)
    caches, results = case.run()
    for cache, want, result in zip(caches, case.want(), results[:2], strict=True):
        got = as_numpy(cache.cpu())
        # the mean is summed in another order: one step of bfloat16, or of int8
        step = 1 if want.dtype == np.int8 else np.abs(want) * 2.0**-7 + 1e-6
        assert (np.abs(got.astype(np.float64) - want) <= step).all()
        assert (got != want).mean() < 0.02 and got.any()
        assert result.data_ptr() == cache.data_ptr()
    if mode != "Norm":
        assert [tuple(t.shape) for t in results[2:]] == [(*case.kv.shape[:3], d) for d in case.dims]
        assert all(t.any() for t in results[2:])


@pytest.mark.parametrize(
    ("mode", "quant", "with_v"),
    [("PA", "", False), ("PA_NZ", "kc", False), ("PA", "", True)],
    ids=str,
)
def test_a_graph_of_kv_rms_norm_rope_cache(mode, quant, with_v) -> None:
    """Bit for bit as eager: the form whose schema says what it writes, and the other one."""
    case = Kv(mode, quant, with_v)
    want, results = case.run()
    scales = [None if t is None else t.npu() for t in case.scales]
    v = None if case.v is None else case.v.npu()

    def run(*inputs: Tensor, form: str) -> tuple[Tensor, ...]:
        made = getattr(torch_npu, form)(
            *inputs,
            k_rope_scale=scales[0],
            c_kv_scale=scales[1],
            v=v,
            cache_mode=mode,
            is_output_kv=True,
        )
        return made[-2:]

    for form in ("npu_kv_rmsnorm_rope_cache", "npu_kv_rmsnorm_rope_cache_v2"):
        if not hasattr(torch_npu, form):
            continue
        caches = [c.npu() for c in case.caches]
        inputs = [t.npu() for t in (case.kv, case.gamma, case.cos, case.sin, case.index)]
        rows = compiled(partial(run, form=form))(*inputs, *caches)
        for got, expected in zip((*caches, *rows), (*want, *results[2:]), strict=True):
            assert torch.equal(got, expected)


def test_kv_rms_norm_rope_of_a_norm_cache_gives_no_rows() -> None:
    with pytest.warns(RuntimeWarning, match="k_rope and c_kv are not written in cache_mode Norm"):
        Kv("Norm", "", False).run()


def test_an_index_of_kv_outside_writes_nothing() -> None:
    case = Kv("PA", "", False)
    case.index[2] = 12
    caches = [c.npu() for c in case.caches]
    with refused("(?s)aclnnKvRmsNormRopeCache.*index has 12, and the cache has 12"):
        torch_npu.npu_kv_rmsnorm_rope_cache(
            *(t.npu() for t in (case.kv, case.gamma, case.cos, case.sin, case.index)),
            *caches,
            cache_mode="PA",
        )
    assert not caches[0].any()


def kv_call(soc: str, **changes: Any) -> KvRmsNormRopeCall:
    given = {
        "kv": (2, 1, 3, 576),
        "gamma": (512,),
        "cos": (2, 1, 3, 64),
        "places": described((6,), "int64"),
        "k_cache": (6, 16, 1, 64),
        "ckv_cache": (6, 16, 1, 512),
        "cache_mode": "PA",
        **changes,
    }
    given.setdefault("sin", given["cos"])
    shapes = {"kv", "gamma", "cos", "sin", "places", "k_cache", "ckv_cache", "v"} & given.keys()
    for name in shapes:
        if not isinstance(given[name], TensorDesc):
            given[name] = described(given[name])
    return KvRmsNormRopeCall(soc, **given)


SCALE = described((64,), "float32")
# soc, what is changed, code in eager mode, texts
KV_REFUSED = [
    (P310, {}, NO_KERNEL, ("does not have KvRmsNormRopeCache",)),
    (A2, {"kv": described((2, 1, 3, 576), "float32")}, INVALID, ("kv is float32",)),
    (A2, {"cos": described((2, 1, 3, 64), "float32")}, INVALID, ("cos is float32",)),
    (A2, {"places": described((6,), "int32")}, INVALID, ("index is int32", "int64")),
    (A2, {"k_cache": described((6, 16, 1, 64), "int32")}, INVALID, ("k_cache is int32",)),
    (A2, {"k_cache": described((6, 16, 1, 64), "int8")}, None, ("its scale absent",)),
    (A2, {"scales": (SCALE, None)}, None, ("its scale given",)),
    (A2, {"kv": (2, 3, 576)}, TILING, ("kv has shape (2, 3, 576)", "4 dims")),
    (A2, {"gamma": (1, 512)}, TILING, ("gamma has shape",)),
    (A2, {"cos": (2, 1, 2, 64)}, TILING, ("(2, 1, 3 or 1, ..)",)),
    (A2, {"sin": (2, 1, 1, 64)}, TILING, ("sin (2, 1, 1, 64)",)),
    (A2, {"places": described((5,), "int64")}, TILING, ("needs 6 values",)),
    (A2, {"places": described((6,), "int64"), "cache_mode": "PA_BLK_NZ"}, TILING,
     ("needs 2 values",)),
    (A2, {"gamma": (256,)}, TILING, ("gamma must have 512 and cos 64",)),
    (A2, {"kv": (2, 1, 3, 640)}, TILING, ("kv must have 576",)),
    (A2, {"kv": (2, 2, 3, 576), "cos": (2, 2, 3, 64)}, TILING, ("without v it must have 1",)),
    (A2, {"k_cache": described((6, 1, 16, 64), "int8"), "scales": (SCALE, None),
          "ckv_cache": (6, 1, 16, 512), "cache_mode": "Norm"}, TILING, ("cache_mode Norm",)),
    (A2, {"v": (2, 1, 3, 128)}, TILING, ("gamma must have 192",)),
    (A2, {"v": (2, 1, 3, 64), "gamma": (192,), "kv": (2, 1, 3, 192)}, TILING, ("must be 128",)),
    (A2, {"v": (2, 3, 3, 128), "gamma": (192,), "kv": (2, 3, 3, 192), "cos": (2, 3, 3, 64)},
     TILING, ("1 or 2 or 4 or 8",)),
    (A2, {"k_cache": (6, 16, 2, 64)}, None, ("1 heads of 64",)),
    (A950, {"k_cache": (6, 16, 2, 64)}, TILING, ("1 heads of 64",)),
    (A2, {"ckv_cache": (6, 32, 1, 512)}, None, ("the same size",)),
    (A950, {"k_cache": (6, 8, 1, 64), "ckv_cache": (6, 8, 1, 512)}, TILING, ("multiple of 16",)),
    (A950, {"v": (2, 1, 3, 128)}, None, ("v is given",)),
    (A2, {"k_cache": described((6, 16, 1, 64), "int8"),
          "scales": (described((1,), "float32"), None)}, TILING, ("(64,) or (1, 64)",)),
]  # fmt: skip


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), KV_REFUSED, ids=str)
def test_kv_rms_norm_rope_refuses(soc, changes, code, texts) -> None:
    told(check_kv_rms_norm_rope_cache(kv_call(soc, **changes)), code, *texts)
    in_graph = NO_KERNEL if code == INVALID else code
    told(check_kv_rms_norm_rope_cache(kv_call(soc, **changes, is_graph=True)), in_graph, *texts)


def test_950_adds_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, A950)
    x = values(1, 1, 1, 48, dtype=F16)
    given = {
        "kv": x,
        "gamma": torch.ones(32, dtype=F16),
        "cos": torch.ones(1, 1, 1, 16, dtype=F16),
        "sin": torch.zeros(1, 1, 1, 16, dtype=F16),
        "index": torch.tensor([3]),
        "k_cache": torch.zeros(1, 32, 1, 16, dtype=I8),
        "ckv_cache": torch.zeros(1, 32, 1, 32, dtype=F16),
        "k_rope_scale": torch.full((1,), 0.5),
        "k_rope_offset": torch.full((16,), 3.0),
    }
    cache = run_op(find_op("KvRmsNormRopeCache"), given, {"cache_mode": "PA"})[0]
    rope = x[0, 0, 0, 32:].float().numpy()
    want = golden_cache.quantized(np.r_[rope[::2], rope[1::2]], np.float32(0.5), np.float32(3))
    assert_equal(cache[0, 3, 0], want)
