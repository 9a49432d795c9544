"""Cache updates: numbers beside the golden, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import cann_host
from cann_host.graph.executor import GraphError, find_op, run_op
from cann_host.rules import (
    INVALID,
    NO_KERNEL,
    TILING,
    ScatterCall,
    TensorDesc,
    check_scatter_elements,
    check_scatter_nd_update,
    check_scatter_update,
)
from support import golden_cache
from support.eager import BF16, F16, F32, I8, I32, as_numpy, assert_equal, refused, values
from support.refusals import described, told

pytestmark = pytest.mark.skipif(not cann_host.is_active(), reason="runs on cann_host only")
torch_npu = pytest.importorskip("torch_npu")
A2, A950, P310 = "Ascend910B2", "Ascend950PR_9579", "Ascend310P3"
I64 = torch.int64


# ---- ScatterNdUpdate ----

# shape of var, indices, dtypes of var and indices
ND_UPDATES = [
    ((8, 4), [[1], [3]], F32, I64),
    ((8, 2, 3), [[7], [0], [4]], BF16, I32),
    ((3, 4, 5), [[[0, 1], [2, 3]], [[1, 1], [0, 0]]], F16, I64),
    ((3, 4), [[2, 3], [0, 1]], I8, I32),
    ((40, 2), [[i] for i in range(39, 5, -1)], torch.bool, I64),
    ((4, 4), [[2]], I64, I64),
    ((5,), [[4], [1]], torch.int16, I64),
]


@pytest.mark.parametrize(("var", "indices", "dtype", "kind"), ND_UPDATES, ids=str)
def test_scatter_nd_update(var, indices, dtype, kind) -> None:
    places = torch.tensor(indices, dtype=kind)
    cache = values(*var, dtype=dtype)
    updates = values(*places.shape[:-1], *var[places.shape[-1] :], dtype=dtype, seed=1)
    want = golden_cache.scatter_nd_update(*map(as_numpy, (cache, places, updates)))
    on_npu = cache.npu()
    assert_equal(torch_npu.npu_scatter_nd_update(on_npu, places.npu(), updates.npu()), want)
    assert_equal(on_npu, as_numpy(cache))
    torch_npu.npu_scatter_nd_update_(on_npu, places.npu(), updates.npu())
    assert_equal(on_npu, want)


def test_scatter_nd_update_of_a_view() -> None:
    cache = values(6, 2, 4).npu()
    want = as_numpy(cache.cpu()).copy()
    want[[4, 2], 1] = 7
    places, updates = torch.tensor([[4], [2]]).npu(), torch.full((2, 4), 7.0).npu()
    torch_npu.npu_scatter_nd_update_(cache[:, 1], places, updates)
    assert_equal(cache, want)


def test_the_last_of_equal_rows_remains() -> None:
    places = torch.tensor([[1], [3], [1]]).npu()
    updates = values(3, 4).npu()
    cache = torch.zeros(8, 4).npu()
    with pytest.warns(RuntimeWarning, match="repeats rows.*last one.*cann_host's caution"):
        torch_npu.npu_scatter_nd_update_(cache, places, updates)
    assert torch.equal(cache[1], updates[2]) and torch.equal(cache[3], updates[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch_npu.npu_scatter_nd_update_(cache, places, updates[:1].repeat(3, 1))


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([[1], [8]], "indices has 8, and dim 0 of var has 8"),
        ([[1], [-1]], "indices has -1, and dim 0 of var has 8"),
        ([[i] for i in range(100)], "indices has 8, and dim 0 of var has 8"),
        ([[1, 4]], "indices has 4, and dim 1 of var has 4"),
    ],
    ids=["after", "before", "many", "second"],
)
def test_an_index_outside_writes_nothing(indices, text) -> None:
    places = torch.tensor(indices)
    cache = torch.zeros(8, 4).npu()
    updates = torch.ones(len(indices), *cache.shape[places.shape[-1] :]).npu()
    with refused(f"(?s)aclnnScatterNdUpdate.*{text}.*cann_host refuses"):
        torch_npu.npu_scatter_nd_update_(cache, places.npu(), updates)
    assert not cache.any()


def scatter_call(soc: str, **given: Any) -> ScatterCall:
    """A call from shapes, or shapes with a dtype of their own."""
    dtypes = {"var": "float16", "indices": "int64", "updates": "float16"}
    for name, dtype in dtypes.items():
        if not isinstance(given[name], TensorDesc):
            given[name] = described(given[name], dtype)
    return ScatterCall(soc, **given)


ND = {"var": (8, 4), "indices": (2, 1), "updates": (2, 4)}
# soc, what is changed, code, texts
ND_REFUSED = [
    (A2, {"var": described((8, 4), "float64")}, INVALID, ("var is float64", "bfloat16")),
    (P310, {"var": described((8, 4), "bfloat16")}, INVALID, ("var is bfloat16", "bool")),
    (A950, {"var": described((8, 4), "int32")}, INVALID, ("var is int32", "float8_e5m2")),
    (A2, {"indices": described((2, 1), "int16")}, INVALID, ("indices is int16", "int32 or int64")),
    (A2, {"updates": described((2, 4), "float32")}, INVALID, ("updates is float32", "float16")),
    (A2, {"updates": (3, 4)}, None, ("updates must be (2, 4)",)),
    (A2, {"indices": (2, 3)}, None, ("counts dims of var",)),
    (A2, {"indices": ()}, None, ("counts dims of var",)),
    ("Ascend910A", {}, None, ("no rules for Ascend910A",)),
]


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), ND_REFUSED, ids=str)
def test_scatter_nd_update_refuses(soc, changes, code, texts) -> None:
    given = {**ND, **changes}
    told(check_scatter_nd_update(scatter_call(soc, **given)), code, *texts)
    in_graph = NO_KERNEL if code == INVALID else code
    told(check_scatter_nd_update(scatter_call(soc, **given, is_graph=True)), in_graph, *texts)


def test_scatter_nd_update_of_nothing() -> None:
    cache = torch.zeros(8, 4).npu()
    torch_npu.npu_scatter_nd_update_(
        cache, torch.zeros(0, 1, dtype=I64).npu(), torch.zeros(0, 4).npu()
    )
    assert not cache.any()


# ---- Scatter ----

# shapes of var and updates, indices, axis, dtypes of var and indices
UPDATES = [
    ((2, 3, 10, 4), (2, 3, 1, 4), [2, 5], -2, F16, I64),
    ((2, 3, 10, 4), (2, 3, 4, 4), [6, 0], 2, BF16, I32),
    ((4, 10, 4), (2, 10, 3), [[3, 1], [0, 0]], -1, F32, I64),
    ((1, 10, 4), (1, 2, 4), 3, -2, I8, I64),
    ((5, 6, 2), (3, 2, 2), [0, 4, 1], 1, I32, I64),
]


@pytest.mark.parametrize(("var", "window", "indices", "axis", "dtype", "kind"), UPDATES, ids=str)
def test_scatter_update(var, window, indices, axis, dtype, kind) -> None:
    places = torch.tensor(indices, dtype=kind)
    cache, updates = values(*var, dtype=dtype), values(*window, dtype=dtype, seed=1)
    want = golden_cache.scatter_update(*map(as_numpy, (cache, places, updates)), axis)
    on_npu = cache.npu()
    assert_equal(torch_npu.scatter_update(on_npu, places.npu(), updates.npu(), axis), want)
    assert_equal(on_npu, as_numpy(cache))
    torch_npu.scatter_update_(on_npu, places.npu(), updates.npu(), axis)
    assert_equal(on_npu, want)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0, 9], "indices has 9, and for 2 values dim 1 of var has 10"),
        ([0, -1], "indices has -1"),
        ([[0, 0], [4, 0]], "indices has 4, and dim 0 of var has 4"),
    ],
    ids=["after", "before", "batch"],
)
def test_a_window_outside_writes_nothing(indices, text) -> None:
    cache = torch.zeros(4, 10, 3).npu()
    with refused(f"(?s)aclnnInplaceScatterUpdate.*{text}.*cann_host refuses"):
        torch_npu.scatter_update_(cache, torch.tensor(indices).npu(), torch.ones(2, 2, 3).npu(), -2)
    assert not cache.any()


UPDATE = {"var": (4, 3, 10, 4), "indices": (2,), "updates": (2, 3, 1, 4), "axis": -2}
# soc, what is changed, code in eager mode, texts
UPDATE_REFUSED = [
    (A2, {"var": described((4, 3, 10, 4), "int64")}, INVALID, ("var is int64", "int8")),
    (P310, {"var": described((4, 3, 10, 4), "bfloat16")}, INVALID, ("var is bfloat16",)),
    (A2, {"indices": described((2,), "int8")}, INVALID, ("indices is int8",)),
    (A2, {"updates": (0, 3, 1, 4), "indices": (0,)}, INVALID, ("cannot be empty",)),
    (A2, {"updates": (2, 3, 4)}, INVALID, ("equally many dims",)),
    (A2, {"indices": (2, 2, 1)}, INVALID, ("0 to 2 dims",)),
    (A2, {"indices": ()}, INVALID, ("a batch of 1",)),
    (A2, {"axis": 0}, TILING, ("axis is 0", "-3 to 3, and not 0")),
    (A2, {"axis": 4}, TILING, ("axis is 4",)),
    (A2, {"axis": -4}, TILING, ("axis is -4",)),
    (A2, {"indices": (3,)}, TILING, ("(2,) or (2, 2)",)),
    (A2, {"indices": (2, 3)}, TILING, ("(2,) or (2, 2)",)),
    (A2, {"updates": (2, 2, 1, 4)}, TILING, ("as large as var",)),
    (A2, {"updates": (5, 3, 1, 4), "indices": (5,)}, TILING, ("as large as var",)),
    (A2, {"updates": (2, 3, 11, 4)}, TILING, ("does not fit along axis -2",)),
    (A2, {"reduction": "add"}, TILING, ("reduce is 'add'",)),
]


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), UPDATE_REFUSED, ids=str)
def test_scatter_update_refuses(soc, changes, code, texts) -> None:
    given = {**UPDATE, **changes}
    told(check_scatter_update(scatter_call(soc, **given)), code, *texts)
    by_dtype = " is " in texts[0] and code == INVALID
    in_graph = NO_KERNEL if by_dtype else TILING
    told(check_scatter_update(scatter_call(soc, **given, is_graph=True)), in_graph, *texts)


# ---- ScatterElements, Assign ----

# shapes of data and updates, indices, axis, reduction
ELEMENTS = [
    ((3, 4), (2, 4), [[0, 1, 2, 0], [2, 2, 1, 1]], 0, "none"),
    ((3, 4), (3, 4), [[0, -1], [1, 3], [2, 0]], 1, "none"),
    ((3, 4), (3, 2), [[0, 0], [1, 1], [2, -4]], -1, "add"),
    ((3, 4), (3, 2), [[0, 1], [1, 3], [2, 0]], 1, "mul"),
]


@pytest.mark.parametrize(("data", "shape", "indices", "axis", "reduction"), ELEMENTS, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.int32], ids=str)
def test_scatter_elements(data, shape, indices, axis, reduction, dtype) -> None:
    x, updates = (values(*s, seed=i).to(dtype) for i, s in enumerate((data, shape)))
    places = torch.tensor(indices)
    want = golden_cache.scatter_elements(*map(as_numpy, (x, places, updates)), axis, reduction)
    given = {"data": x.clone(), "indices": places, "updates": updates}
    for type_ in ("ScatterElements", "ScatterElementsV2"):
        (got,) = run_op(find_op(type_), given, {"axis": axis, "reduction": reduction})
        assert_equal(got, want)
        assert torch.equal(given["data"], x)  # the result is a tensor of its own


ELEMENT = {"var": (3, 4), "indices": (2, 4), "updates": (2, 4)}
# soc, what is changed, code, texts
ELEMENTS_REFUSED = [
    (A2, {"var": described((3, 4), "complex64")}, NO_KERNEL, ("var is complex64",)),
    (A2, {"reduction": "max"}, TILING, ("reduction is 'max'", "none or add or mul")),
    (A2, {"indices": (2,)}, TILING, ("equally many dims",)),
    (A2, {"axis": 2}, TILING, ("axis is 2", "-2 to 1")),
    (A2, {"indices": (3, 4)}, TILING, ("must fit into updates",)),
    (A2, {"indices": (2, 5), "updates": (2, 5)}, TILING, ("into var except along axis",)),
    (A950, {"updates": (3, 4)}, TILING, ("the same shape",)),
]


@pytest.mark.parametrize(("soc", "changes", "code", "texts"), ELEMENTS_REFUSED, ids=str)
def test_scatter_elements_refuses(soc, changes, code, texts) -> None:
    call = scatter_call(soc, **{**ELEMENT, **changes}, is_graph=True)
    told(check_scatter_elements(call), code, *texts)


def test_scatter_elements_outside() -> None:
    given = {"data": torch.zeros(3), "indices": torch.tensor([3]), "updates": torch.ones(1)}
    with pytest.raises(GraphError, match="indices has 3, and dim 0 of dim 0 of data has 3"):
        run_op(find_op("ScatterElements"), given, {})


def test_assign_needs_the_same_shape() -> None:
    given = {"ref": torch.zeros(3), "value": torch.ones(2)}
    with pytest.raises(GraphError, match=r"ref is float32 \(3,\) and value float32 \(2,\)"):
        run_op(find_op("Assign"), given, {})
