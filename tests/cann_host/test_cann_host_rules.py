"""The refusals of cann_host, row by row, with reason and CANN's error code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cann_host.graph.executor import GraphError, find_op, run_op
from cann_host.rules import (
    KERNELS,
    ND,
    NZ,
    AscendQuantCall,
    DynamicQuantCall,
    QuantizeCall,
    QuantMatmulCall,
    Refusal,
    RmsNormCall,
    TensorDesc,
    TransQuantParamCall,
    ascend_quant_axis,
    check_ascend_quant,
    check_definition,
    check_dynamic_quant,
    check_layer_norm,
    check_quant_matmul,
    check_quantize,
    check_rms_norm,
    check_trans_quant_param,
    dynamic_quant_ignores,
    dynamic_quant_scale_shape,
    packed_words,
    soc_family,
    trans_quant_param_shape,
)

M, K, N = 16, 64, 32
SOCS = {
    "Atlas A2/A3": "Ascend910B2",
    "Atlas inference (310P)": "Ascend310P3",
    "Ascend 950": "Ascend950PR_9579",
}


# A8W8 to int8 on A2. Tests change fields of the call, and of its tensors as "x1.dtype".
BASE_CALL = QuantMatmulCall(
    soc="Ascend910B2",
    x1=TensorDesc("int8", (M, K)),
    x2=TensorDesc("int8", (K, N)),
    scale=TensorDesc("int64", (N,)),
    out_dtype="int8",
)


def call_with(**changes: Any) -> QuantMatmulCall:
    """BASE_CALL with changes; those of a tensor after those of the call."""
    call = BASE_CALL._replace(**{k: v for k, v in changes.items() if "." not in k})
    for key, value in changes.items():
        name, _, field = key.partition(".")
        if field:
            call = call._replace(**{name: getattr(call, name)._replace(**{field: value})})
    return call


def check(**changes: Any) -> Refusal | None:
    return check_quant_matmul(call_with(**changes))


def assert_answer(refusal: Refusal | None, answer: int | str | None) -> None:
    """None: taken. A number: CANN's code. A text: part of a refusal that is cann_host's own."""
    if answer is None:
        assert refusal is None
        return
    assert refusal is not None
    if isinstance(answer, int):
        assert refusal.code == answer
        assert f"CANN error {answer}" in str(refusal)
    else:
        assert refusal.code is None
        assert answer in str(refusal) and "CANN error" not in str(refusal)


PERTOKEN = {"pertoken_scale": TensorDesc("float32", (M,))}


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kernel_is_accepted(kernel) -> None:
    base = {
        "soc": SOCS[kernel.family],
        "x1.dtype": kernel.x,
        "x2": TensorDesc(kernel.x, (N, K), is_transposed=True),
        "out_dtype": kernel.out,
        **(PERTOKEN if kernel.pertoken else {}),
    }
    in_graph = None
    if kernel.family == "Atlas inference (310P)" and kernel.pertoken:
        in_graph = "cann_host has the eager call"
    for scale in kernel.scale:
        for bias in (None, *kernel.bias):
            for x2_format in kernel.x2_formats:
                changes = {**base, "scale.dtype": scale, "x2.format": x2_format}
                if bias:
                    changes["bias"] = TensorDesc(bias, (N,))
                # as torch_npu calls them
                assert check(**changes, entry="nz" if x2_format == NZ else "v5") is None
                assert_answer(check(**changes, entry="graph"), in_graph)


TAKEN, PARAMETER, TILED, NO_KERNEL = None, 161002, 561002, 561003

# changes to an accepted call, and what the refusal says
REFUSED = {
    "mixed-dtypes": ({"x1.dtype": "int4", "x2.dtype": "int8"}, "x1 is int4 and x2 is int8"),
    "float-x": ({"x1.dtype": "float16", "x2.dtype": "float16"}, "x1 dtype float16"),
    "float32-scale-int8": ({"scale.dtype": "float32"}, "scale dtype float32"),
    "float32-scale-fp16": ({"scale.dtype": "float32", "out_dtype": "float16"}, "scale dtype"),
    "packed-scale-bf16": ({"out_dtype": "bfloat16"}, "scale dtype int64"),
    "packed-scale-int32": ({"out_dtype": "int32"}, "scale dtype int64"),
    "output": ({"out_dtype": "float32"}, "output dtype float32"),
    "pertoken-int8": (PERTOKEN, "output dtype int8"),
    "pertoken-length": (
        {
            "out_dtype": "float16",
            "scale.dtype": "float32",
            "pertoken_scale": TensorDesc("float32", (1,)),
        },
        "pertoken_scale has shape",
    ),
    "float-bias-int8": ({"bias": TensorDesc("float32", (N,))}, "bias dtype float32"),
    "bias-length": ({"bias": TensorDesc("int32", (1,))}, "bias has shape"),
    "bias-3d-without-batch": ({"bias": TensorDesc("int32", (1, 1, N))}, "bias has shape"),
    "k-mismatch": ({"x2.shape": (K + 1, N)}, "k is 64 in x1"),
    "one-dim": ({"x1.shape": (K,)}, "2 to 6"),
    "seven-dims": ({"x1.shape": (1, 1, 1, 1, 1, M, K)}, "2 to 6"),
    "empty": ({"x1.shape": (0, K)}, "cannot be empty"),
    "batches": ({"x1.shape": (2, M, K), "x2.shape": (3, K, N)}, "batch dims"),
    "scale-length": ({"scale.shape": (N + 1,)}, "scale has shape"),
    "scale-3d": ({"scale.shape": (1, 1, N)}, "scale has shape"),
    "nz-narrow": ({"x2.shape": (K, 1), "scale.shape": (1,), "x2.format": NZ}, "neither may be 1"),
    "nz-storage": ({"x2.format": NZ, "x2.storage_shape": (2, 4, 16, 16)}, "storage shape"),
    "int4-int8": ({"x1.dtype": "int4", "x2.dtype": "int4"}, "output dtype int8"),
    "int4-odd": (
        {"x1.dtype": "int4", "x2.dtype": "int4", "out_dtype": "float16", "x2.shape": (K, 31)},
        "must be even",
    ),
    "int4-batched-weight": (
        {"x1.dtype": "int4", "x2.dtype": "int4", "out_dtype": "float16", "x2.shape": (1, K, N)},
        "must have 2",
    ),
    "310P-bf16": ({"soc": "Ascend310P3", "out_dtype": "bfloat16"}, "output dtype bfloat16"),
    "950-2d-scale": ({"soc": "Ascend950PR_9579", "scale.shape": (1, N)}, "scale has shape"),
    "310P-int4": ({"soc": "Ascend310P3", "x1.dtype": "int4", "x2.dtype": "int4"}, "x1 dtype int4"),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], message: str, graph: bool) -> None:
    assert check() is None
    refusal = check(**changes, entry="graph" if graph else "v5")
    assert_answer(refusal, TILED if graph else PARAMETER)
    assert message in str(refusal)


ON_950 = {"soc": "Ascend950PR_9579"}
INT4 = {"x1.dtype": "int4", "x2.dtype": "int4", "out_dtype": "float16"}
NARROW_NZ = {"x2.format": NZ, "x2.storage_shape": (10, 10, 16, 32)}


@pytest.mark.parametrize(
    ("changes", "eager", "graph"),
    [
        # what Ascend 950 takes and the older products do not
        ({**ON_950, "out_dtype": "bfloat16"}, True, True),
        ({"out_dtype": "bfloat16"}, False, False),
        ({**ON_950, "x1.shape": (M, 70000), "x2.shape": (70000, N)}, True, True),
        # empty: aclnn returns at once there, the tiling of a graph wants 1 or more
        ({**ON_950, "x1.shape": (0, K)}, True, False),
        ({**ON_950, "x2.shape": (K, 0), "scale.shape": (1,)}, True, False),
        ({**ON_950, "x1.shape": (M, 0), "x2.shape": (0, N)}, False, False),
        # int4: FRACTAL_NZ has kernels on Atlas A2, none on 950; its blocks are 64 wide
        (INT4 | {"x2.format": NZ, "entry": "nz"}, True, True),
        (INT4 | {"x2.format": NZ} | ON_950, False, False),
        (INT4 | NARROW_NZ | {"entry": "nz"}, False, False),
        # the tensor an eager call writes to
        ({"out_shape": (M, N)}, True, True),
        ({"out_shape": (M, 1, N)}, True, True),
        ({"out_shape": (1, M, N)}, False, False),
        ({"out_shape": (M, N + 1)}, False, False),
        ({"out_shape": (N,)}, False, False),
        ({"x1.shape": (2, M, K), "out_shape": (2, M, N)}, True, True),
        ({"x1.shape": (2, M, K), "out_shape": (1, M, N)}, False, False),
    ],
    ids=str,
)
def test_taken_or_not(changes: dict[str, Any], eager: bool, graph: bool) -> None:
    assert (check(**changes) is None) == eager
    assert (check(**{**changes, "entry": "graph"}) is None) == graph


BF16 = {"out_dtype": "bfloat16", "scale.dtype": "float32"}
OFFSET = {"offset": TensorDesc("float32", (N,))}
OTHER = {"offset": TensorDesc("float32", (N - 1,))}
ON_310P = {"soc": "Ascend310P3", "x2.format": NZ, "x2.shape": (N, K), "x2.is_transposed": True}
FP16_PT = {"out_dtype": "float16", "scale.dtype": "float32", **PERTOKEN}
LONG = {"x1.shape": (M, 65536), "x2.shape": (65536, N)}
OURS = "cann_host's own refusal"

# changes; what aclnnQuantMatmulV5, aclnnQuantMatmulWeightNz (x2 in FRACTAL_NZ) and a graph say
ENTRIES = {
    # before 950 the tiling of a graph never reads offset; V5 looks at it for int8 x only where it
    # says so, WeightNz wants int8 results
    "offset": (OFFSET, TAKEN, TAKEN, TAKEN),
    "offset-fp16": (OFFSET | {"out_dtype": "float16"}, PARAMETER, PARAMETER, TAKEN),
    "offset-bf16": (OFFSET | BF16, PARAMETER, PARAMETER, TAKEN),
    "offset-int32": (OFFSET | BF16 | {"out_dtype": "int32"}, TAKEN, PARAMETER, TAKEN),
    "offset-pertoken": (OFFSET | FP16_PT, TAKEN, PARAMETER, TAKEN),
    "offset-length": (OTHER, PARAMETER, PARAMETER, TAKEN),
    "offset-dtype": (OFFSET | {"offset.dtype": "int32"}, PARAMETER, PARAMETER, NO_KERNEL),
    "offset-dtype-int32": (
        OFFSET | BF16 | {"out_dtype": "int32", "offset.dtype": "float16"},
        NO_KERNEL,
        PARAMETER,
        NO_KERNEL,
    ),
    "310P-offset-fp16": (
        ON_310P | OFFSET | {"out_dtype": "float16"},
        PARAMETER,
        PARAMETER,
        TAKEN,
    ),
    "310P-offset-length": (ON_310P | OTHER, PARAMETER, PARAMETER, TAKEN),
    "950-offset": (ON_950 | OFFSET, TAKEN, TAKEN, TAKEN),
    "950-offset-fp16": (ON_950 | OFFSET | {"out_dtype": "float16"}, PARAMETER, PARAMETER, TILED),
    "950-offset-length": (ON_950 | OTHER, PARAMETER, PARAMETER, TILED),
    "950-offset-pertoken": (ON_950 | OFFSET | FP16_PT, PARAMETER, PARAMETER, TILED),
    # scales of two dims
    "scale-1n": ({"scale.shape": (1, N)}, PARAMETER, TAKEN, TAKEN),
    "scale-n1": ({"scale.shape": (N, 1)}, PARAMETER, TAKEN, TAKEN),
    "scale-11": ({"scale.shape": (1, 1)}, PARAMETER, TAKEN, TAKEN),
    "scale-1m": ({"scale.shape": (1, N + 1)}, PARAMETER, OURS, OURS),
    "scale-2n": ({"scale.shape": (2, N)}, PARAMETER, PARAMETER, TILED),
    "scale-1n-batched": (
        {"scale.shape": (1, N), "x1.shape": (2, M, K), "x2.shape": (2, K, N)},
        PARAMETER,
        PARAMETER,
        TAKEN,
    ),
    "950-scale-1n": (ON_950 | {"scale.shape": (1, N)}, PARAMETER, PARAMETER, TILED),
    # the limit of the last dims is V5's tiling's, WeightNz's own
    "k-too-long": (LONG, TILED, PARAMETER, TILED),
    "n-too-long": ({"x2.shape": (K, 65536), "scale.shape": (1,)}, TILED, PARAMETER, TILED),
    # int4 in FRACTAL_NZ: V5 takes ND only
    "int4-nz": (INT4 | {"x2.format": NZ}, PARAMETER, TAKEN, TAKEN),
    # an eager call on 310P brings an ND weight to FRACTAL_NZ itself, and turns both
    "310P-nd": (ON_310P | {"x2.format": ND}, TAKEN, None, TILED),
    "310P-nd-untransposed": (
        ON_310P | {"x2.format": ND, "x2.shape": (K, N), "x2.is_transposed": False},
        TAKEN,
        None,
        TILED,
    ),
    "310P-nd-narrow": (
        ON_310P | {"x2.format": ND, "x2.shape": (1, K), "scale.shape": (1,)},
        PARAMETER,
        None,
        TILED,
    ),
    "310P-x1-transposed": (
        ON_310P | {"x1.shape": (K, M), "x1.is_transposed": True},
        TAKEN,
        TAKEN,
        TILED,
    ),
    "310P-untransposed": (
        ON_310P | {"x2.shape": (K, N), "x2.is_transposed": False},
        TILED,
        TILED,
        TILED,
    ),
    "310P-pertoken": (ON_310P | FP16_PT, TAKEN, TAKEN, "cann_host has the eager call"),
    "310P-pertoken-bf16-bias": (
        ON_310P | FP16_PT | {"bias": TensorDesc("float32", (N,))},
        PARAMETER,
        PARAMETER,
        TILED,
    ),
    "310P-pertoken-batches": (
        ON_310P | FP16_PT | {"x1.shape": (2, M, K)},
        TILED,
        TILED,
        "cann_host has the eager call",
    ),
}


@pytest.mark.parametrize("entry", ["v5", "nz", "graph"])
@pytest.mark.parametrize("row", ENTRIES.values(), ids=ENTRIES)
def test_each_way_in_has_its_own_checks(row, entry: str) -> None:
    changes, *answers = row
    answer = dict(zip(("v5", "nz", "graph"), answers, strict=True))[entry]
    if entry == "nz" and changes.get("x2.format") == ND:
        pytest.skip("aclnnQuantMatmulWeightNz takes no ND")
    if entry == "nz":
        changes = {**changes, "x2.format": NZ}
    assert_answer(check(**{**changes, "entry": entry}), answer)


BLOCKS = {"scale.shape": (1, N), "pertoken_scale.shape": (M, 1)}
NOT_HERE = {
    # changes; whether a graph says it in CANN's name
    "A8W4": ({"x2.dtype": "int4"}, True),
    "blocks": (BF16 | PERTOKEN | BLOCKS, True),
    "950-float8": (ON_950 | {"x1.dtype": "float8_e5m2", "x2.dtype": "float8_e5m2"}, False),
    "950-blocks": (ON_950 | BF16 | PERTOKEN | BLOCKS, False),
}


@pytest.mark.parametrize(("changes", "graph"), NOT_HERE.values(), ids=NOT_HERE)
def test_dtypes_that_only_cann_multiplies(changes, graph: bool) -> None:
    assert_answer(check(**changes), "cann_host")
    assert_answer(check(**changes, entry="graph"), TILED if graph else "cann_host")


def test_float8_is_refused_by_cann_where_it_has_none() -> None:
    refusal = check(**{"x1.dtype": "float8_e5m2", "x2.dtype": "float8_e5m2"})
    assert_answer(refusal, PARAMETER)
    assert "x1 dtype float8_e5m2" in str(refusal)


def test_weight_nz_takes_no_nd_weight() -> None:
    refusal = check(entry="nz")
    assert_answer(refusal, PARAMETER)
    assert "x2 has format ND; it must be FRACTAL_NZ" in str(refusal)


def test_v4_has_no_kernel_for_these_inputs_before_950() -> None:
    x = torch.zeros(4, 32, dtype=torch.int8)
    inputs = {"x1": x, "x2": x, "x2_scale": torch.ones(4)}
    with pytest.raises(GraphError, match=r"QuantBatchMatmulV4 has no kernel .* 561003"):
        run_op(find_op("QuantBatchMatmulV4"), inputs, {"dtype": 27, "transpose_x2": True})


def test_unknown_product_is_refused() -> None:
    assert soc_family("Ascend910_9391") == soc_family("Ascend910B4")
    refusal = check(soc="Ascend910A")
    assert_answer(refusal, NO_KERNEL)
    assert "no rules for this SoC" in str(refusal)


def test_pertoken_lifts_the_limit_of_the_last_dim() -> None:
    changes = {"x1.shape": (M, 70000), "x2.shape": (70000, N)}
    assert check(**changes, **BF16, **PERTOKEN) is None


# ---- TransQuantParamV2 ----

A2, P310, A950 = SOCS.values()
OLDER = (A2, P310, "Ascend910_9391")
EITHER = (False, True)
F32 = "float32"

# SoCs, scale, offset, round_mode; what an eager call and a graph say
TRANS_QUANT_PARAM = [
    ((*OLDER, A950), (F32, (N,)), None, 0, TAKEN, TAKEN),
    ((*OLDER, A950), (F32, (1,)), (F32, (N,)), 1, TAKEN, TAKEN),
    ((*OLDER, A950), (F32, (N,)), (F32, (1, 1)), 0, TAKEN, TAKEN),
    ((*OLDER, A950), (F32, (1, N)), (F32, (1, N)), 0, TAKEN, TAKEN),
    # only aclnn compares lengths, of an offset of one dim with scale's first
    ((*OLDER, A950), (F32, (N,)), (F32, (N + 1,)), 0, PARAMETER, TAKEN),
    ((*OLDER, A950), (F32, (N,)), (F32, (1, N + 1)), 0, TAKEN, TAKEN),
    (OLDER, (F32, (2, N)), None, 0, PARAMETER, TILED),
    ((A950,), (F32, (2, N)), None, 0, TAKEN, TAKEN),
    ((A950,), (F32, (2, 1, N)), None, 0, PARAMETER, TAKEN),
    (OLDER, (F32, ()), None, 0, PARAMETER, TILED),
    (OLDER, (F32, (0,)), None, 0, PARAMETER, TILED),
    ((*OLDER, A950), (F32, (N,)), (F32, (2, N)), 0, PARAMETER, TAKEN),
    ((*OLDER, A950), (F32, (N,)), None, 2, PARAMETER, TILED),
    ((*OLDER, A950), ("float16", (N,)), None, 0, PARAMETER, NO_KERNEL),
    ((*OLDER, A950), (F32, (N,)), ("int32", (N,)), 0, PARAMETER, NO_KERNEL),
]


def desc(tensor: tuple[str, tuple[int, ...]] | None) -> TensorDesc | None:
    return None if tensor is None else TensorDesc(*tensor)


@pytest.mark.parametrize(
    ("socs", "scale", "offset", "round_mode", "eager", "graph"), TRANS_QUANT_PARAM, ids=str
)
def test_trans_quant_param(socs, scale, offset, round_mode, eager, graph) -> None:
    for soc in socs:
        for in_graph, answer in ((False, eager), (True, graph)):
            call = TransQuantParamCall(soc, desc(scale), desc(offset), round_mode, in_graph)
            assert_answer(check_trans_quant_param(call), answer)


# scale, offset; the shape InferShape declares before 950 and on it
DECLARED = [
    ((N,), None, (N,), (N,)),
    ((1,), (N,), (1,), (N,)),
    ((N,), (1,), (N,), (N,)),
    ((1,), (1, N), (1, N), (1, N)),
    ((N,), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (N,), (1, 1), (1, 1)),
    ((1, 1), (1, N), (1, 1), (1, 1)),
    ((1, N), (1,), (1, N), (1, N)),
    ((4,), (8,), (4,), (8,)),
    ((8,), (4,), (8,), (8,)),
]


@pytest.mark.parametrize(("scale", "offset", "older", "newest"), DECLARED, ids=str)
def test_trans_quant_param_declares(scale, offset, older, newest) -> None:
    for soc in OLDER:
        assert trans_quant_param_shape(soc, scale, offset) == older
    assert trans_quant_param_shape(A950, scale, offset) == newest


# scale, offset, room; words written past the room, or what is missing
WORDS = [
    ((N,), None, (N,), 0),
    ((1,), (N,), (N,), 0),
    ((N,), (0,), (N,), 0),
    ((1,), (N,), (1,), N - 1),
    ((N,), (1, 1), (1, 1), N - 1),
    ((1, 1), (1, N), (1, 1), N - 1),
    ((4,), (8,), (4,), 4),
    ((4,), (8,), (8,), "scale has 4 values and 8 are read"),
    ((8,), (4,), (8,), "offset has 4 values and 8 are read"),
    ((4,), None, (8,), "4 words for a result of shape (8,)"),
]


@pytest.mark.parametrize(("scale", "offset", "room", "beyond"), WORDS, ids=str)
def test_words_that_are_written(scale, offset, room, beyond) -> None:
    found = packed_words(scale, offset, room)
    if type(beyond) is str:
        assert found.overrun is None
        assert_answer(found.refusal, beyond)
        assert "cann_host" in str(found.refusal)
    elif beyond == 0:
        assert found == type(found)()
    else:
        assert found.refusal is None and found.overrun is not None
        assert f"{beyond} overwrite other memory" in found.overrun
        assert "Expand scale to offset's length" in found.overrun
        assert ("word 0 for every column" in found.overrun) == (room in ((1,), (1, 1)))
        assert "cann_host's caution" in found.overrun and "CANN error" not in found.overrun


# ---- quantized activations ----

# SoC, dtype of x, shape of x, dtype of y, eager and graph, what the refusal says; None: accepted
DYNAMIC_QUANT = [
    (A2, "float16", (4, 64), "int8", EITHER, None),
    (A2, "bfloat16", (2,) * 8, "int8", EITHER, None),
    (A2, "bfloat16", (4, 6), "int4", EITHER, None),
    (A2, "float16", (4, 64), "int32", (False,), None),
    (A950, "bfloat16", (4, 64), "int32", (False,), None),
    (P310, "float16", (4, 64), "int8", EITHER, None),
    (A2, "float16", (4, 0), "int8", (False,), None),
    (A2, "float32", (4, 64), "int8", EITHER, "x is float32"),
    (P310, "bfloat16", (4, 64), "int8", EITHER, "x is bfloat16; Ascend310P3 allows float16"),
    (P310, "float16", (4, 64), "int4", EITHER, "y is int4; Ascend310P3 allows int8"),
    (P310, "float16", (4, 64), "int32", EITHER, "y is int32"),
    (A2, "float16", (4, 64), "int32", (True,), "y is int32; Ascend910B2 allows int8 or int4"),
    (A2, "float16", (4, 64), "float16", EITHER, "y is float16"),
    (A2, "float16", (64,), "int8", EITHER, "1 dims; it must have 2 "),
    (A2, "float16", (1,) * 9, "int8", (False,), "9 dims"),
    (A2, "float16", (1,) * 9, "int8", (True,), None),
    (A950, "float16", (4, 0), "int8", EITHER, None),
    (P310, "float16", (0, 48), "int8", (False,), None),
    (P310, "float16", (64,), "int8", (True,), None),
    (P310, "float16", (64,), "int8", (False,), "1 dims"),
    (A2, "float16", (4, 7), "int4", EITHER, "last dim 7; for int4 it must be a multiple of 2"),
    (A2, "float16", (4, 12), "int32", (False,), "a multiple of 8"),
    (A2, "float16", (4, 0), "int8", (True,), "last dim cannot be 0"),
]


def dynamic(soc: str, x: str, shape: tuple[int, ...], y: str, **changes: Any) -> Refusal | None:
    return check_dynamic_quant(DynamicQuantCall(soc, TensorDesc(x, shape), y, **changes))


@pytest.mark.parametrize("graph", EITHER)
def test_rows_of_310p_are_multiples_of_32(graph: bool) -> None:
    refusal = dynamic(P310, "float16", (4, 48), "int8", is_graph=graph)
    assert "a multiple of 32 (CANN error 561002, tiling)" in str(refusal)
    long = dynamic(P310, "float16", (4, 4128), "int8", is_graph=graph, is_symmetric=False)
    assert_answer(long, "never writes one")
    assert dynamic(P310, "float16", (4, 4128), "int8", is_graph=graph) is None


@pytest.mark.parametrize("graph", EITHER)
def test_a_call_that_only_cann_takes_is_cann_hosts_own_refusal(graph: bool) -> None:
    for refusal in (
        dynamic("Ascend310B1", "float16", (4, 64), "int8", is_graph=graph),
        dynamic(A950, "float16", (4, 64), "float8_e5m2", is_graph=graph),
        ascend(soc=A950, y="float8_e4m3fn", graph=graph),
    ):
        assert_answer(refusal, "cann_host")


# SoC, quant_mode, dst_type_max, groups given; shape of scale for x (2, 4, 64), eager and graph
MODES = [
    (A950, "pertoken", 0.0, False, (2, 4), TAKEN, TAKEN),
    (A950, "pertensor", 0.0, False, (1,), TAKEN, TAKEN),
    (A950, "perchannel", 0.0, False, (2, 64), TAKEN, TAKEN),
    (A950, "perchannel", 0.0, True, (2, 64), PARAMETER, TILED),
    (A950, "pertoken", 32768.0, False, (2, 4), TAKEN, TAKEN),
    (A950, "pertoken", 40000.0, False, (2, 4), TILED, TILED),
    (A950, "each", 0.0, False, (2, 4), PARAMETER, TILED),
    (A2, "pertensor", 0.0, False, (1,), TAKEN, TILED),  # eagerly V4 refuses before: see aclnn
]


@pytest.mark.parametrize(("soc", "mode", "most", "grouped", "scale", "eager", "graph"), MODES)
def test_dynamic_quant_modes(soc, mode, most, grouped, scale, eager, graph) -> None:
    assert dynamic_quant_scale_shape((2, 4, 64), mode) == scale
    groups = TensorDesc("int32", (3,)) if grouped else None
    changes = {"group_index": groups, "mode": mode, "dst_type_max": most}
    for in_graph, answer in ((False, eager), (True, graph)):
        assert_answer(
            dynamic(soc, "float16", (2, 4, 64), "int8", is_graph=in_graph, **changes), answer
        )


def check_text(refusal: Refusal | None, graph: bool, message: str | None) -> None:
    if message is None:
        assert refusal is None
    else:
        text = str(refusal)
        assert message in text
        assert ("CANN error 561002, tiling" if graph else "CANN error 161002, invalid") in text


@pytest.mark.parametrize(("soc", "x", "shape", "y", "ways", "message"), DYNAMIC_QUANT)
def test_dynamic_quant(soc, x, shape, y, ways, message) -> None:
    for graph in ways:
        check_text(dynamic(soc, x, shape, y, is_graph=graph), graph, message)


# soc, smooth_scales and group_index of float16 (2, 4, 64); what an eager call and a graph say
SMOOTH = [
    (A2, ("float16", (64,)), None, TAKEN, TAKEN),
    (A2, ("float16", (3, 64)), ("int32", (3,)), TAKEN, TAKEN),
    (A2, ("float16", (64,)), ("int32", (0,)), TAKEN, TAKEN),
    (A950, ("float16", (64,)), ("int32", (0,)), TILED, TILED),
    (A2, ("float16", (1,)), None, PARAMETER, TILED),
    (A2, ("float32", (64,)), None, PARAMETER, TILED),
    (A2, ("float16", (64,)), ("int32", (3,)), TILED, TILED),
    (A2, ("float16", (3, 32)), ("int32", (3,)), TILED, TILED),
    (A2, ("float16", (3, 64)), ("int64", (3,)), TILED, TILED),
    (A2, ("float16", (3, 64)), ("float32", (3,)), PARAMETER, TILED),
    (A2, ("float16", (3, 64)), ("int32", (1, 3)), PARAMETER, TAKEN),
    (A2, ("float16", (1025, 64)), ("int32", (1025,)), TILED, TILED),
    # without smooth_scales it is not checked
    (A2, None, ("int32", (3,)), TAKEN, TAKEN),
    (A2, None, ("int64", (3,)), NO_KERNEL, NO_KERNEL),
    # on 310P the kernel reads neither
    (P310, ("float16", (64,)), None, TAKEN, TAKEN),
    (P310, ("float16", (3, 64)), ("int32", (3,)), TAKEN, TAKEN),
    (P310, ("float16", (1,)), None, PARAMETER, TAKEN),
]


@pytest.mark.parametrize(("soc", "smooth", "groups", "eager", "graph"), SMOOTH, ids=str)
def test_dynamic_quant_with_smooth_scales(soc, smooth, groups, eager, graph) -> None:
    changes = {"smooth_scales": desc(smooth), "group_index": desc(groups)}
    for in_graph, answer in ((False, eager), (True, graph)):
        assert_answer(
            dynamic(soc, "float16", (2, 4, 64), "int8", is_graph=in_graph, **changes), answer
        )


def test_inputs_without_an_effect_are_named() -> None:
    assert dynamic_quant_ignores(A2, True, True) is None
    assert "smooth_scales has no effect on Ascend310P3" in str(
        dynamic_quant_ignores(P310, True, True)
    )
    for soc in SOCS.values():
        assert "group_index has no effect" in str(dynamic_quant_ignores(soc, False, True))


# changes to float16 (2, 4, 64), scale and offset (64,) to int8 on A2; ways; what the refusal says
BASE: dict[str, Any] = {
    "soc": A2,
    "x": "float16",
    "x_shape": (2, 4, 64),
    "scale": "float16",
    "scale_shape": (64,),
    "offset": None,
    "offset_shape": None,
    "y": "int8",
    "axis": -1,
}


def ascend(*, graph: bool, **changes: Any) -> Refusal | None:
    given = {**BASE, **changes}
    tensors = {
        name: None if given[name] is None else TensorDesc(given[name], given[f"{name}_shape"])
        for name in ("x", "scale", "offset")
    }
    call = AscendQuantCall(
        given["soc"], **tensors, y_dtype=given["y"], axis=given["axis"], is_graph=graph
    )
    return check_ascend_quant(call)


F32_X = {"x": "float32", "scale": "float32"}
BF16_ALL = {"x": "bfloat16", "scale": "bfloat16"}
ASCEND_QUANT = {
    "base": ({}, EITHER, None),
    "one": ({"scale_shape": (1,)}, EITHER, None),
    "offset": ({"offset": "float16", "offset_shape": (64,)}, EITHER, None),
    "wide": ({"scale_shape": (1, 1, 64)}, EITHER, None),
    "wide-one": ({"scale_shape": (1, 1, 1)}, EITHER, None),
    "rows": ({"scale_shape": (4,), "axis": -2}, EITHER, None),
    "rows-wide": ({"scale_shape": (1, 4, 1), "axis": 1}, EITHER, None),
    "one-dim-x": ({"x_shape": (64,)}, EITHER, None),
    "float32": (F32_X, EITHER, None),
    "bfloat16": (BF16_ALL, EITHER, None),
    "float32-casts": ({**F32_X, "scale": "float16"}, (False,), None),
    "int4": ({"y": "int4"}, EITHER, None),
    "int32": ({"y": "int32"}, (False,), None),
    "310P": ({"soc": P310}, EITHER, None),
    "310P-float32": ({"soc": P310, **F32_X}, EITHER, None),
    "950": ({"soc": A950, **BF16_ALL}, EITHER, None),
    "950-int32": ({"soc": A950, "y": "int32"}, (False,), None),
    "no-cast-in-a-graph": ({**F32_X, "scale": "float16"}, (True,), "they must be of one dtype"),
    "float32-scale": ({"scale": "float32"}, EITHER, "scale is float32 and x float16"),
    "int-scale": ({"x": "float32", "scale": "int32"}, EITHER, "scale is int32"),
    "float64-scale": ({"x": "float32", "scale": "float64"}, EITHER, "scale is float64"),
    "310P-bfloat16": ({"soc": P310, **BF16_ALL}, EITHER, "x is bfloat16"),
    "310P-scale": ({"soc": P310, "x": "float32", "scale": "bfloat16"}, EITHER, "scale is bfloat16"),
    "310P-int4": ({"soc": P310, "y": "int4"}, EITHER, "y is int4"),
    "310P-rows": ({"soc": P310, "scale_shape": (4,), "axis": -2}, (False,), "on 310P the last"),
    "310P-rows-graph": ({"soc": P310, "scale_shape": (4,), "axis": -2}, (True,), "1 or 64 values"),
    "310P-axis-graph": ({"soc": P310, "axis": -2}, (True,), None),
    "int8-x": ({"x": "int8"}, EITHER, "x is int8"),
    "int32-in-a-graph": ({"y": "int32"}, (True,), "y is int32"),
    "offset-dtype": ({"offset": "float32", "offset_shape": (64,)}, EITHER, "they must agree"),
    "offset-length": ({"offset": "float16", "offset_shape": (1,)}, EITHER, "they must agree"),
    "length": ({"scale_shape": (63,)}, EITHER, "it must have 1 or 64 values"),
    "scalar": ({"scale_shape": ()}, (False,), "it must have 1 or 64 values"),
    "scalar-graph": ({"scale_shape": ()}, (True,), None),
    "two-dims": ({"scale_shape": (1, 64)}, EITHER, "it must have 1 or 64 values"),
    "other-dim": (
        {"x_shape": (2, 64, 64), "scale_shape": (1, 64, 1)},
        EITHER,
        "it must have 1 or 64 values",
    ),
    "axis-first": ({"axis": 0, "scale_shape": (2,)}, EITHER, "one of the last two"),
    "axis-beyond": ({"axis": 3}, EITHER, "one of the last two"),
    "axis-before": ({"x_shape": (64,), "axis": -2}, EITHER, "one of the last two"),
    "nine-dims": ({"x_shape": (1,) * 8 + (64,)}, (False,), "9 dims"),
    "nine-dims-graph": ({"x_shape": (1,) * 8 + (64,)}, (True,), None),
    "scalar-x": ({"x_shape": (), "scale_shape": (1,)}, (False,), "0 dims"),
    "scalar-x-graph": ({"x_shape": (), "scale_shape": (1,)}, (True,), None),
    "950-empty": ({"soc": A950, "x_shape": (0, 64)}, (False,), None),
    "950-empty-graph": ({"soc": A950, "x_shape": (0, 64)}, (True,), "it cannot be empty"),
    "odd-int4": ({"x_shape": (2, 7), "scale_shape": (1,), "y": "int4"}, EITHER, "multiple of 2"),
}


@pytest.mark.parametrize(("changes", "ways", "message"), ASCEND_QUANT.values(), ids=ASCEND_QUANT)
def test_ascend_quant(changes, ways, message) -> None:
    for graph in ways:
        check_text(ascend(**changes, graph=graph), graph, message)


def test_the_axis_of_a_graph_on_310p_is_the_last() -> None:
    assert ascend_quant_axis(P310, -2) == -1
    assert ascend_quant_axis(A2, -2) == ascend_quant_axis(A950, -2) == -2


# ---- aclnnQuantize ----

X3 = (4, 64)
QUANTIZE = [
    # SoCs, dtypes of x, scales, zero_points, out; None accepts
    ((A2, A950, P310), "float32", "float32", "int32", "int8", None),
    ((A2, A950, P310), "float16", "float16", None, "uint8", None),
    ((A2, A950, P310), "float32", "float16", "uint8", "int32", None),
    ((A2, A950), "bfloat16", "bfloat16", "bfloat16", "int8", None),
    ((A2, A950), "bfloat16", "bfloat16", None, "int8", None),
    ((A2, A950), "bfloat16", "float32", "int32", "int8", None),
    ((A950,), "float32", "float32", "float32", "int8", None),
    ((A950,), "float16", "float32", "int8", "float8_e5m2", None),
    ((A2, P310), "float32", "float32", "float32", "int8", "zero_points is float32"),
    ((A2, A950), "float32", "bfloat16", None, "int8", "if one of these is bfloat16 all must be"),
    ((A2, A950), "bfloat16", "bfloat16", "int32", "int8", "all must be"),
    ((A2, A950), "bfloat16", "float32", "bfloat16", "int8", "all must be"),
    ((P310,), "bfloat16", "bfloat16", None, "int8", "x is bfloat16"),
    ((P310,), "float32", "bfloat16", None, "int8", "scales is bfloat16"),
    ((P310,), "float32", "float32", "bfloat16", "int8", "zero_points is bfloat16"),
    ((A2, A950, P310), "float64", "float32", None, "int8", "x is float64"),
    ((A2, A950, P310), "float32", "float64", None, "int8", "scales is float64"),
    ((A2, A950, P310), "float32", "float32", "int64", "int8", "zero_points is int64"),
    ((A2, A950, P310), "float32", "float32", None, "int16", "out is int16"),
    ((A2, P310), "float32", "float32", None, "float8_e5m2", "out is float8_e5m2"),
]


@pytest.mark.parametrize(("socs", "x", "scales", "points", "out", "message"), QUANTIZE, ids=str)
def test_quantize_dtypes(socs, x, scales, points, out, message) -> None:
    for soc in socs:
        zero_points = None if points is None else TensorDesc(points, (64,))
        tensors = (TensorDesc(x, X3), TensorDesc(scales, (64,)), zero_points, TensorDesc(out, X3))
        check_text(check_quantize(QuantizeCall(soc, *tensors, axis=1)), False, message)


# shape of x, of scales, of zero_points, of out, axis
QUANTIZE_SHAPES = [
    (X3, (64,), (64,), X3, 1, None),
    (X3, (64,), (64,), X3, -1, None),
    (X3, (4,), (4,), X3, 0, None),
    (X3, (1,), (1,), X3, 7, None),  # axis is not looked at
    ((), (1,), None, (), 0, None),
    (X3, (64,), (1,), X3, 1, "zero_points has shape (1,); it must be (64,)"),
    (X3, (1,), (64,), X3, 1, "zero_points has shape (64,); it must be (1,)"),
    (X3, (1, 64), None, X3, 1, "it must have one dim"),
    (X3, (), None, X3, 1, "it must have one dim"),
    (X3, (63,), None, X3, 1, "1 or 64 values"),
    (X3, (64,), None, X3, 2, "axis is 2 and x has 2 dims"),
    (X3, (64,), None, (4, 63), 1, "out has shape (4, 63)"),
    ((1,) * 9, (1,), None, (1,) * 9, 0, "9 dims"),
]


@pytest.mark.parametrize(
    ("x", "scales", "points", "out", "axis", "message"), QUANTIZE_SHAPES, ids=str
)
def test_quantize_shapes(x, scales, points, out, axis, message) -> None:
    for soc in SOCS.values():
        zero_points = None if points is None else TensorDesc("int32", points)
        tensors = (TensorDesc(F32, x), TensorDesc(F32, scales), zero_points)
        call = QuantizeCall(soc, *tensors, TensorDesc("int8", out), axis)
        check_text(check_quantize(call), False, message)


# ---- norms ----

NORM = (2, 4, 64)
# SoCs, dtype of x and of gamma; what RmsNorm and AddRmsNorm say: a kernel or none
NORM_DTYPES = [
    ((A2, A950, P310), "float16", "float16", True, True),
    ((A2, A950, P310), "float32", "float32", True, True),
    ((A2, A950), "bfloat16", "bfloat16", True, True),
    ((A2, A950), "float16", "float32", True, False),
    ((A2, A950), "bfloat16", "float32", True, False),
    ((P310,), "float16", "float32", False, False),
    ((P310,), "bfloat16", "bfloat16", False, False),
    ((A2, A950, P310), "float32", "float16", False, False),
    ((A2, A950, P310), "float64", "float64", False, False),
    ((A2, A950, P310), "int32", "int32", False, False),
]


@pytest.mark.parametrize("graph", EITHER)
@pytest.mark.parametrize(("socs", "x", "gamma", "alone", "added"), NORM_DTYPES, ids=str)
def test_norm_dtypes(socs, x, gamma, alone, added, graph) -> None:
    for soc in socs:
        first, last = TensorDesc(x, NORM), TensorDesc(gamma, (64,))
        for x2, taken in ((None, alone), (first, added)):
            call = RmsNormCall(soc, first, last, 1e-6, x2, graph)
            assert_answer(
                check_rms_norm(call), TAKEN if taken else NO_KERNEL if graph else PARAMETER
            )


# shape of x, of gamma, epsilon; RmsNorm eagerly and in a graph, AddRmsNorm eagerly and in a graph
NORM_SHAPES = [
    (NORM, (64,), 0.0, TAKEN, TAKEN, TAKEN, TAKEN),
    (NORM, (4, 64), 1.0, TAKEN, TAKEN, TAKEN, TAKEN),
    (NORM, NORM, 1.0, TAKEN, TAKEN, TAKEN, TAKEN),
    (NORM, (63,), 1.0, TILED, TILED, TILED, TILED),
    (NORM, (2, 4), 1.0, TILED, TILED, TILED, TILED),
    ((64,), (1, 64), 1.0, TILED, TILED, TILED, TILED),
    (NORM, (), 1.0, TILED, TILED, PARAMETER, TILED),
    ((1,) * 9, (1,), 1.0, TILED, TILED, PARAMETER, TILED),
    (NORM, (64,), -1.0, TILED, TILED, TILED, TILED),
    ((2, 0, 64), (64,), 1.0, TAKEN, TILED, TAKEN, TILED),
    ((2, 0), (0,), 1.0, TILED, TILED, TAKEN, TILED),
]


@pytest.mark.parametrize(("x", "gamma", "epsilon", "one", "two", "three", "four"), NORM_SHAPES)
def test_norm_shapes(x, gamma, epsilon, one, two, three, four) -> None:
    first, last = TensorDesc("float16", x), TensorDesc("float16", gamma)
    for soc in SOCS.values():
        for x2, graph, answer in (
            (None, False, one),
            (None, True, two),
            (first, False, three),
            (first, True, four),
        ):
            assert_answer(check_rms_norm(RmsNormCall(soc, first, last, epsilon, x2, graph)), answer)


@pytest.mark.parametrize("graph", EITHER)
def test_what_is_added_is_like_x1(graph: bool) -> None:
    x1, gamma = TensorDesc("float16", NORM), TensorDesc("float16", (64,))
    for x2, code in (
        (TensorDesc("float32", NORM), NO_KERNEL if graph else PARAMETER),
        (TensorDesc("float16", (1, 4, 64)), TILED if graph else PARAMETER),
    ):
        assert_answer(check_rms_norm(RmsNormCall(A2, x1, gamma, 1e-6, x2, graph)), code)


# type, SoC, dtype of x, whether there is a kernel or none is known of
DEFINED = [
    ("SwiGlu", P310, "bfloat16", False),
    ("SwiGlu", P310, "float16", True),
    ("SwiGlu", A2, "bfloat16", True),
    ("SwiGlu", A2, "float64", False),
    ("LayerNormV4", P310, "float32", False),
    ("LayerNormV4", A950, "float32", True),
    ("Relu", A950, "int32", True),
    ("Relu", A950, "float64", False),
    ("GeluV2", A950, "int32", False),
    ("GeluV2", A2, "int32", True),  # its definition is not public
    ("Add", A950, "float64", True),
]


@pytest.mark.parametrize(("type_", "soc", "x", "known"), DEFINED)
def test_definitions(type_, soc, x, known) -> None:
    assert_answer(check_definition(type_, soc, x), TAKEN if known else NO_KERNEL)


def test_layer_norm_parameters() -> None:
    assert check_layer_norm("float16", ["float32", "float32"], 3, 1) is None
    assert check_layer_norm("bfloat16", ["bfloat16"], 3, 3) is None
    assert check_layer_norm("float16", [], 3, 1) is None
    assert_answer(check_layer_norm("float32", ["float16", "float16"], 3, 1), NO_KERNEL)
    assert_answer(check_layer_norm("float16", ["float16", "float32"], 3, 1), NO_KERNEL)
    assert_answer(check_layer_norm("float16", [], 1, 2), TILED)
