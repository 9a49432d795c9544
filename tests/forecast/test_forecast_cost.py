"""The time of one kernel, by hand: bytes, operations and a launch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import lq_graph.forecast
from lq_graph import LinearQuantValueError
from lq_graph.forecast import kernel_cost
from lq_graph.forecast.cost import communication_cost
from lq_graph.rules.chips import CHIPS, chip_of
from lq_graph.rules.tables import PRODUCTS

FITTED: dict[str, Any] = json.loads(
    (Path(lq_graph.forecast.__file__).parent / "fitted.json").read_text()
)
LAUNCHES, RATES, GAP = FITTED["launches"], FITTED["rates"], FITTED["gap"]
HBM = 1.6e12  # of an A3 die


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def test_an_int8_product_by_hand() -> None:
    """m 1, k 4096, n 6144: 96 blocks of 64 columns are 4 rounds of 24 cores, all full."""
    k, n = 4096, 6144
    cost = kernel_cost(
        "QuantBatchMatmulV3",
        [("int8", (1, k)), ("int8", (k, n)), ("float32", (n,)), ("float32", (1,))],
        [("bfloat16", (1, n))],
    )
    assert cost.bytes == k + k * n + 4 * n + 4 + 2 * n
    assert cost.operations == 2 * k * n
    rate = RATES["int8 product"]
    assert cost.memory_seconds == near(k * n / (HBM * rate["bandwidth"]))
    assert cost.compute_seconds == near(2 * 16 * k * n / (752e12 * rate["compute"]))
    assert cost.launch_seconds == near(LAUNCHES["QuantBatchMatmul int8"] + GAP)
    parts = cost.memory_seconds + cost.compute_seconds + cost.launch_seconds
    assert cost.seconds == near(parts)
    assert (cost.bound, cost.assumed) == ("bandwidth", False)


@pytest.mark.parametrize(
    ("dtype", "n", "columns"),
    [
        # dtype, n, the columns that are paid for: rounds x 24 cores x 64 bytes
        ("int8", 2112, 2 * 24 * 64),  # 33 blocks: 2 rounds, the second one of 9 blocks
        ("int8", 1536, 24 * 64),
        ("bfloat16", 768, 24 * 32),
        ("bfloat16", 800, 2 * 24 * 32),
        ("int4", 3072, 24 * 128),
        ("int4", 3073, 2 * 24 * 128),
    ],
)
def test_blocks_that_do_not_fill_the_cores(dtype: str, n: int, columns: int) -> None:
    k, size = 1024, {"int8": 1, "bfloat16": 2, "int4": 0.5}[dtype]
    op, family = ("MatMulV3", "bf16") if dtype == "bfloat16" else ("QuantBatchMatmulV3", "int8")
    cost = kernel_cost(op, [(dtype, (1, k)), (dtype, (n, k))], [("bfloat16", (1, n))])
    bandwidth = HBM * RATES[f"{family} product"]["bandwidth"]
    assert cost.memory_seconds == near(columns * k * size / bandwidth)


@pytest.mark.parametrize(
    ("m", "rows"), [(1, 16), (16, 16), (17, 32), (128, 128), (129, 256), (4096, 4096)]
)
def test_rows_that_fill_up_a_tile(m: int, rows: int) -> None:
    k, n = 1024, 1536
    cost = kernel_cost("MatMulV2", [("bf16", (m, k)), ("bf16", (k, n))], [(torch.bfloat16, (m, n))])
    assert cost.operations == 2 * m * k * n
    rate = 353.9e12 * RATES["bf16 product"]["compute"]
    assert cost.compute_seconds == near(2 * rows * k * n / rate)


def test_layouts_and_views_do_not_matter() -> None:
    """A graph's product writes into a view, and its weight may be either way round."""
    plain = kernel_cost("MatMulV2", [("bf16", (4, 512)), ("bf16", (512, 256))],
                        [("bf16", (4, 256))])  # fmt: skip
    viewed = kernel_cost("BatchMatMul", [("bf16", (2, 2, 512)), ("bf16", (256, 512))],
                         [("bf16", (2, 2, 2, 128))])  # fmt: skip
    assert plain == viewed
    batched = kernel_cost("BatchMatMulV2", [("bf16", (9, 4, 64)), ("bf16", (9, 64, 32))],
                          [("bf16", (9, 4, 32))])  # fmt: skip
    assert batched.operations == 9 * 2 * 4 * 64 * 32
    assert batched.bytes == 9 * 2 * (4 * 64 + 64 * 32 + 4 * 32)


def test_vector_kernels_by_hand() -> None:
    m, k = 3, 512
    x, y = ("float16", (m, k)), ("int8", (m, k))
    cost = kernel_cost("DynamicQuant", [x], [y, ("float32", (m,))])
    moved = 2 * m * k + m * k + 4 * m
    assert cost.bytes == moved
    assert cost.memory_seconds == near(moved / (HBM * RATES["quantization"]["bandwidth"]))
    to_int4 = kernel_cost("DynamicQuant", [x], [("int4", (m, k)), ("float32", (m,))])
    assert to_int4.bytes == 2 * m * k + m * k / 2 + 4 * m
    assert to_int4.launch_seconds == near(LAUNCHES["DynamicQuant int4"] + GAP)
    unknown = kernel_cost("NobodyKnows", [x], [x])
    assert unknown.assumed and unknown.error >= 0.5
    assert unknown.launch_seconds == near(LAUNCHES["elementwise"] + GAP)


def test_writes_and_gathers_count_what_they_touch() -> None:
    new, cache = ("float16", (1, 2, 128)), ("float16", (1, 4096, 2, 128))
    slots = ("int64", (1,))
    both = kernel_cost("ScatterPaKvCache", [new, cache, slots, new, cache], [cache, cache])
    assert both.bytes == 2 * 2 * (2 * 2 * 128)
    one = kernel_cost("Scatter", [cache, slots, new], [cache])
    assert one.bytes == both.bytes / 2
    table = kernel_cost("GatherV2", [("float16", (1000, 64)), ("int64", (3,))],
                        [("float16", (3, 64))])  # fmt: skip
    assert table.bytes == 2 * 2 * 3 * 64


def test_attention_by_hand() -> None:
    heads, kv, d, positions = 32, 8, 128, 4096

    def cost(s: int, **options: Any) -> Any:
        query, cache = ("bf16", (1, s, heads, d)), ("bf16", (1, positions, kv, d))
        return kernel_cost("FusedInferAttentionScore", [query, cache, cache], [query], **options)

    decode = cost(1)
    assert decode.bytes == 2 * (2 * heads * d + 2 * positions * kv * d)
    assert decode.operations == 4 * heads * d * positions
    assert decode.compute_seconds == 0
    bandwidth = HBM * RATES["attention"]["bandwidth"]
    assert decode.memory_seconds == near(decode.bytes / bandwidth)
    # 8 pairs of a sequence and a kv head on 24 cores: split from 2048 positions on, else 16 wait
    query, short = ("bf16", (1, 1, heads, d)), ("bf16", (1, 240, kv, d))
    waits = kernel_cost("FusedInferAttentionScore", [query, short, short], [query])
    assert waits.memory_seconds == near(waits.bytes * 24 / 8 / bandwidth)
    # 5 sequences are 40 pairs, 2 rounds
    query, cache = ("bf16", (5, 1, heads, d)), ("bf16", (5, positions, kv, d))
    rounds = kernel_cost("FusedInferAttentionScore", [query, cache, cache], [query])
    assert rounds.memory_seconds == near(rounds.bytes * 48 / 40 / bandwidth)
    prefill = cost(positions)
    # query i reads i + 1 positions
    assert prefill.operations == near(4 * heads * d * positions * (positions + 1) / 2)
    other = ("bf16", (1, heads, 1, d)), ("bf16", (1, kv, positions, d))
    inputs, outputs = [other[0], other[1], other[1]], [other[0]]
    same = kernel_cost("FusedInferAttentionScore", inputs, outputs,
                       attributes={"input_layout": b"BNSD"})  # fmt: skip
    assert same == decode


def test_collectives_by_hand() -> None:
    launch, link = FITTED["collective"], FITTED["link"]
    gather = communication_cost("allGather", 10_000, 8)
    assert gather.bytes == 7 * 10_000
    assert gather.seconds == near(launch + GAP + 70_000 / (196e9 * link))
    assert gather.bound == "communication"
    # two dies of a card have a link of their own
    pair = communication_cost("allReduce", 8192, 2)
    assert pair.seconds == near(launch + GAP + 8192 / (224e9 * link))
    assert pair.assumed and not gather.assumed
    # a large one goes in two steps, of 15/16 of the message each
    large = communication_cost("allReduce", 10**8, 16)
    assert large.seconds == near(2 * launch + GAP + 2 * 15 / 16 * 10**8 / (196e9 * link))
    # the eight cards of A2 have a link to each other: two use one of seven
    mesh = communication_cost("allReduce", 10**6, 2, "A2")
    assert mesh.memory_seconds == near(10**6 / (196e9 / 7 * link))
    with pytest.raises(LinearQuantValueError, match="16 devices of A2-376T; its links join 8"):
        communication_cost("allReduce", 10**6, 16, "A2")


def test_another_chip_has_other_peaks_and_a_larger_error() -> None:
    def cost(product: str) -> Any:
        x, w = ("int8", (1, 4096)), ("int8", (4096, 6144))
        return kernel_cost("QuantBatchMatmulV3", [x, w], [("bf16", (1, 6144))], product)

    here, smaller = cost("A3"), cost("310P")
    assert smaller.memory_seconds > 7 * here.memory_seconds
    assert smaller.error == near(math.hypot(here.error, 0.5))
    assert cost("A3-560T").error > here.error
    # 96 blocks on 20 cores: 5 rounds, the last one of 16 blocks
    assert cost("A3-560T").memory_seconds == near(here.memory_seconds * 100 / 96)


def test_products_have_a_chip_with_a_source() -> None:
    for product in PRODUCTS:
        assert chip_of(product.key).product == product.key
    for chip in CHIPS:
        assert chip_of(chip.name.lower()) is chip and chip.source
        assert chip.bytes_per_second > 1e11 and chip.int8_ops > chip.bf16_ops


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("MatMul", [("bf16", (1, 8)), ("bf16", (8, 8))], [("bf16", (1, 8))], "A4"), "A4"),
        (("Add", [("bf17", (1,))], [("bf16", (1,))]), "bf17 is not a dtype"),
        (("Add", [("bf16", (-1,))], [("bf16", (1,))]), r"the sizes \[-1\] are not all known"),
        (("MatMul", [("bf16", None), ("bf16", (8, 8))], [("bf16", (1, 8))]), "is not known"),
        (
            ("QuantBatchMatmulV3", [("int4", (1, 8)), ("int4", (8, 8))], [("bf16", (1, 8))], "950"),
            "the matrix unit of 950PR has no int4",
        ),
    ],
)  # fmt: skip
def test_refusals(arguments: Any, match: str) -> None:
    with pytest.raises(LinearQuantValueError, match=match):
        kernel_cost(*arguments)
