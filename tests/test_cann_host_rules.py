"""What cann_host refuses, row by row, and that it says why with CANN's error code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cann_host.executor import GraphError, find_op, run_op
from cann_host.rules import (
    KERNELS,
    NZ,
    check_ascend_quant,
    check_dynamic_quant,
    check_quant_matmul,
    check_trans_quant_param,
    soc_family,
)

M, K, N = 16, 64, 32
SOCS = {
    "Atlas A2/A3": "Ascend910B2",
    "Atlas inference (310P)": "Ascend310P3",
    "Ascend 950": "Ascend950PR_9579",
}


def arguments(**changes: Any) -> dict[str, Any]:
    """A8W8 to int8 on A2, with changes."""
    return {
        "soc": "Ascend910B2",
        "x1_dtype": "int8",
        "x1_shape": (M, K),
        "x2_dtype": "int8",
        "x2_shape": (K, N),
        "scale_dtype": "int64",
        "scale_shape": (N,),
        "out_dtype": "int8",
        **changes,
    }


PERTOKEN = {"pertoken_dtype": "float32", "pertoken_shape": (M,)}


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kernel_is_accepted(kernel) -> None:
    base = arguments(
        soc=SOCS[kernel.family],
        x1_dtype=kernel.x,
        x2_dtype=kernel.x,
        x2_shape=(N, K),
        transpose_x2=True,
        out_dtype=kernel.out,
        **(PERTOKEN if kernel.pertoken else {}),
    )
    for scale in kernel.scale:
        for bias in (None, *kernel.bias):
            for x2_format in kernel.x2_formats:
                changes = {"scale_dtype": scale, "x2_format": x2_format}
                if bias:
                    changes |= {"bias_dtype": bias, "bias_shape": (N,)}
                assert check_quant_matmul(**{**base, **changes}) is None


# changes to an accepted call, and what the refusal says
REFUSED = {
    "mixed-dtypes": ({"x2_dtype": "int4"}, "x1 is int8 and x2 is int4"),
    "float-x": ({"x1_dtype": "float16", "x2_dtype": "float16"}, "x1 dtype float16"),
    "float32-scale-int8": ({"scale_dtype": "float32"}, "scale dtype float32"),
    "float32-scale-fp16": ({"scale_dtype": "float32", "out_dtype": "float16"}, "scale dtype"),
    "packed-scale-bf16": ({"out_dtype": "bfloat16"}, "scale dtype int64"),
    "packed-scale-int32": ({"out_dtype": "int32"}, "scale dtype int64"),
    "output": ({"out_dtype": "float32"}, "output dtype float32"),
    "offset-fp16": (
        {"out_dtype": "float16", "offset_dtype": "float32", "offset_shape": (N,)},
        "offset given",
    ),
    "offset-dtype": ({"offset_dtype": "int32", "offset_shape": (N,)}, "offset is int32"),
    "offset-length": ({"offset_dtype": "float32", "offset_shape": (N - 1,)}, "offset has shape"),
    "pertoken-int8": (PERTOKEN, "output dtype int8"),
    "pertoken-length": (
        {
            "out_dtype": "float16",
            "scale_dtype": "float32",
            "pertoken_dtype": "float32",
            "pertoken_shape": (1,),
        },
        "pertoken_scale has shape",
    ),
    "float-bias-int8": ({"bias_dtype": "float32", "bias_shape": (N,)}, "bias dtype float32"),
    "bias-length": ({"bias_dtype": "int32", "bias_shape": (1,)}, "bias has shape"),
    "bias-3d-without-batch": ({"bias_dtype": "int32", "bias_shape": (1, 1, N)}, "bias has shape"),
    "k-mismatch": ({"x2_shape": (K + 1, N)}, "k is 64 in x1"),
    "one-dim": ({"x1_shape": (K,)}, "2 to 6"),
    "seven-dims": ({"x1_shape": (1, 1, 1, 1, 1, M, K)}, "2 to 6"),
    "empty": ({"x1_shape": (0, K)}, "cannot be empty"),
    "batches": ({"x1_shape": (2, M, K), "x2_shape": (3, K, N)}, "batch dims"),
    "k-too-long": ({"x1_shape": (M, 65536), "x2_shape": (65536, N)}, "65535"),
    "n-too-long": ({"x2_shape": (K, 65536), "scale_shape": (1,)}, "65535"),
    "scale-length": ({"scale_shape": (N + 1,)}, "scale has shape"),
    "nz-narrow": ({"x2_shape": (K, 1), "scale_shape": (1,), "x2_format": NZ}, "neither may be 1"),
    "nz-storage": ({"x2_format": NZ, "x2_storage_shape": (2, 4, 16, 16)}, "storage shape"),
    "int4-int8": ({"x1_dtype": "int4", "x2_dtype": "int4"}, "output dtype int8"),
    "int4-odd": (
        {"x1_dtype": "int4", "x2_dtype": "int4", "out_dtype": "float16", "x2_shape": (K, 31)},
        "must be even",
    ),
    "int4-batched-weight": (
        {"x1_dtype": "int4", "x2_dtype": "int4", "out_dtype": "float16", "x2_shape": (1, K, N)},
        "must have 2",
    ),
    "310P-nd": ({"soc": "Ascend310P3"}, "x2 format ND"),
    "310P-bf16": ({"soc": "Ascend310P3", "out_dtype": "bfloat16"}, "output dtype bfloat16"),
    "310P-int4": ({"soc": "Ascend310P3", "x1_dtype": "int4", "x2_dtype": "int4"}, "x1 dtype int4"),
    "310P-untransposed": ({"soc": "Ascend310P3", "x2_format": NZ}, "transpose_x2=True"),
}


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], message: str, graph: bool) -> None:
    assert check_quant_matmul(**arguments()) is None
    text = check_quant_matmul(**arguments(**changes), graph=graph)
    assert text is not None
    assert message in text
    assert ("561002" if graph else "161002") in text


ON_950 = {"soc": "Ascend950PR_9579"}
INT4 = {"x1_dtype": "int4", "x2_dtype": "int4", "out_dtype": "float16"}
NARROW_NZ = {"x2_format": NZ, "x2_storage_shape": (10, 10, 16, 32)}


@pytest.mark.parametrize(
    ("changes", "eager", "graph"),
    [
        # what Ascend 950 takes and the older products do not
        ({**ON_950, "out_dtype": "bfloat16"}, True, True),
        ({"out_dtype": "bfloat16"}, False, False),
        ({**ON_950, "x1_shape": (M, 70000), "x2_shape": (70000, N)}, True, True),
        # empty: aclnn returns at once there, the tiling of a graph wants 1 or more
        ({**ON_950, "x1_shape": (0, K)}, True, False),
        ({**ON_950, "x2_shape": (K, 0), "scale_shape": (1,)}, True, False),
        ({**ON_950, "x1_shape": (M, 0), "x2_shape": (0, N)}, False, False),
        # int4: FRACTAL_NZ has kernels on Atlas A2, none on 950; its blocks are 64 wide
        (INT4 | {"x2_format": NZ}, True, True),
        (INT4 | {"x2_format": NZ} | ON_950, False, False),
        (INT4 | NARROW_NZ, False, False),
        # the tensor an eager call writes to
        ({"out_shape": (M, N)}, True, True),
        ({"out_shape": (M, 1, N)}, True, True),
        ({"out_shape": (1, M, N)}, False, False),
        ({"out_shape": (M, N + 1)}, False, False),
        ({"out_shape": (N,)}, False, False),
        ({"x1_shape": (2, M, K), "out_shape": (2, M, N)}, True, True),
        ({"x1_shape": (2, M, K), "out_shape": (1, M, N)}, False, False),
    ],
    ids=str,
)
def test_taken_or_not(changes: dict[str, Any], eager: bool, graph: bool) -> None:
    for in_graph, taken in ((False, eager), (True, graph)):
        text = check_quant_matmul(**arguments(**changes), graph=in_graph)
        assert (text is None) == taken, text


def test_v4_has_no_kernel_for_these_inputs_before_950() -> None:
    x = torch.zeros(4, 32, dtype=torch.int8)
    inputs = {"x1": x, "x2": x, "x2_scale": torch.ones(4)}
    with pytest.raises(GraphError, match=r"QuantBatchMatmulV4 has no kernel .* 561003"):
        run_op(find_op("QuantBatchMatmulV4"), inputs, {"dtype": 27, "transpose_x2": True})


def test_unknown_product_is_refused() -> None:
    assert soc_family("Ascend910_9391") == soc_family("Ascend910B4")
    text = check_quant_matmul(**arguments(soc="Ascend910A"))
    assert text is not None
    assert "no rules for this SoC" in text
    assert "561003" in text


def test_pertoken_lifts_the_limit_of_the_last_dim() -> None:
    changes = {"x1_shape": (M, 70000), "x2_shape": (70000, N), "out_dtype": "bfloat16"}
    assert check_quant_matmul(**arguments(**changes, scale_dtype="float32", **PERTOKEN)) is None


@pytest.mark.parametrize(
    ("scale", "offset", "refused"),
    [
        ((N,), None, None),
        ((1,), (1,), None),
        ((N,), (1,), None),
        ((1, N), (1, N), None),
        ((1,), (N,), "expand scale first"),
        ((N,), (N + 1,), "must agree"),
        ((2, N), None, "(n,) or (1, n)"),
    ],
    ids=str,
)
def test_trans_quant_param(scale, offset, refused) -> None:
    text = check_trans_quant_param(scale, offset)
    assert (text is None) if refused is None else (text is not None and refused in text)


# ---- quantized activations ----

A2, P310, A950 = SOCS.values()
EITHER = (False, True)

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
    (A2, "float16", (64,), "int8", EITHER, "1 dims; it must have 2 to 8"),
    (A2, "float16", (1,) * 9, "int8", EITHER, "9 dims"),
    (A2, "float16", (4, 7), "int4", EITHER, "last dim 7; for int4 it must be a multiple of 2"),
    (A2, "float16", (4, 12), "int32", (False,), "a multiple of 8"),
    (A2, "float16", (4, 0), "int8", (True,), "last dim cannot be 0"),
    ("Ascend310B1", "float16", (4, 64), "int8", EITHER, "no rules for Ascend310B1"),
]


def check_text(text: str | None, graph: bool, message: str | None) -> None:
    if message is None:
        assert text is None
    else:
        assert text is not None
        assert message in text
        assert ("CANN error 561002, tiling" if graph else "CANN error 161002, invalid") in text


@pytest.mark.parametrize(("soc", "x", "shape", "y", "ways", "message"), DYNAMIC_QUANT)
def test_dynamic_quant(soc, x, shape, y, ways, message) -> None:
    for graph in ways:
        check_text(check_dynamic_quant(soc, x, shape, y, graph=graph), graph, message)


SMOOTH = [
    # soc, smooth_scales and group_index of float16 (2, 4, 64), what the refusal says
    (A2, ("float16", (64,)), None, None),
    (A2, ("float16", (3, 64)), ("int32", (3,)), None),
    (P310, ("float16", (64,)), None, None),
    (A2, ("float16", (1,)), None, "smooth_scales is float16 (1,); it must be float16 (64,)"),
    (A2, ("float32", (64,)), None, "it must be float16 (64,)"),
    (A2, ("float16", (64,)), ("int32", (3,)), "it must be float16 (3, 64)"),
    (A2, ("float16", (3, 64)), ("int64", (3,)), "group_index is int64 (3,)"),
    (A2, ("float16", (0, 64)), ("int32", (0,)), "it must be int32, 1 to 1024 of them"),
    (A2, None, ("int32", (3,)), "group_index is given without smooth_scales"),
    (P310, ("float16", (3, 64)), ("int32", (3,)), "or on 310P"),
]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("soc", "smooth", "groups", "message"), SMOOTH)
def test_dynamic_quant_with_smooth_scales(soc, smooth, groups, message, graph) -> None:
    text = check_dynamic_quant(soc, "float16", (2, 4, 64), "int8", smooth, groups, graph)
    check_text(text, graph, message)


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
    "310P-rows": ({"soc": P310, "scale_shape": (4,), "axis": -2}, EITHER, "on 310P the last"),
    "int8-x": ({"x": "int8"}, EITHER, "x is int8"),
    "int32-in-a-graph": ({"y": "int32"}, (True,), "y is int32"),
    "offset-dtype": ({"offset": "float32", "offset_shape": (64,)}, EITHER, "they must agree"),
    "offset-length": ({"offset": "float16", "offset_shape": (1,)}, EITHER, "they must agree"),
    "length": ({"scale_shape": (63,)}, EITHER, "it must have 1 or 64 values"),
    "scalar": ({"scale_shape": ()}, EITHER, "it must have 1 or 64 values"),
    "two-dims": ({"scale_shape": (1, 64)}, EITHER, "it must have 1 or 64 values"),
    "other-dim": (
        {"x_shape": (2, 64, 64), "scale_shape": (1, 64, 1)},
        EITHER,
        "it must have 1 or 64 values",
    ),
    "axis-first": ({"axis": 0, "scale_shape": (2,)}, EITHER, "one of the last two"),
    "axis-beyond": ({"axis": 3}, EITHER, "one of the last two"),
    "axis-before": ({"x_shape": (64,), "axis": -2}, EITHER, "one of the last two"),
    "nine-dims": ({"x_shape": (1,) * 8 + (64,)}, EITHER, "9 dims"),
    "scalar-x": ({"x_shape": (), "scale_shape": (1,)}, EITHER, "0 dims"),
    "odd-int4": ({"x_shape": (2, 7), "scale_shape": (1,), "y": "int4"}, EITHER, "multiple of 2"),
}


@pytest.mark.parametrize(("changes", "ways", "message"), ASCEND_QUANT.values(), ids=ASCEND_QUANT)
def test_ascend_quant(changes, ways, message) -> None:
    for graph in ways:
        check_text(check_ascend_quant(**{**BASE, **changes}, graph=graph), graph, message)
