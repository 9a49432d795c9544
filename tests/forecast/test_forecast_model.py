"""Models: sizes from a config.json, memory and bytes by hand, steps, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lq_graph
from lq_graph import LinearQuantValueError
from lq_graph.forecast.decoders import PUBLIC, read_decoder
from lq_graph.forecast.kernels import FUSIONS, Shape
from lq_graph.forecast.memory import RUNTIME, memory_of, nz_bytes
from lq_graph.forecast.model import step_of
from lq_graph.rules.chips import chip_of

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}

# ---- sizes ----


@pytest.mark.parametrize(
    ("change", "head", "kv_heads", "tied", "norms"),
    [
        ({}, 32, 2, False, False),
        ({"num_key_value_heads": None}, 32, 4, False, False),
        ({"head_dim": 64}, 64, 2, False, False),
        ({"model_type": "mistral", "head_dim": None}, 32, 2, False, False),
        ({"model_type": "qwen2", "tie_word_embeddings": True}, 32, 2, True, False),
        ({"model_type": "qwen3"}, 128, 2, False, True),
    ],
)
def test_a_config_of_each_kind(
    change: dict[str, Any], head: int, kv_heads: int, tied: bool, norms: bool, tmp_path: Path
) -> None:
    config = {**CONFIG, **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_decoder(tmp_path)
    assert (found.head, found.kv_heads, found.tied) == (head, kv_heads, tied)
    assert (found.hidden, found.layers, found.has_norms) == (128, 3, norms)
    assert found.name == tmp_path.name
    same = read_decoder(tmp_path / "config.json"), read_decoder(config)
    assert {one.parameters for one in same} == {found.parameters}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        # as their cards say them
        ("llama-3.2-1b", 1.24),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.6),
        ("mistral-7b-v0.3", 7.25),
        ("qwen2.5-0.5b", 0.49),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-32b", 32.8),
        ("qwen2.5-72b", 72.7),
        ("qwen3-0.6b", 0.60),
        ("qwen3-1.7b", 1.72),
        ("qwen3-4b", 4.02),
        ("qwen3-8b", 8.19),
        ("qwen3-14b", 14.8),
        ("qwen3-32b", 32.8),
    ],
)
def test_public_sizes(name: str, billions: float) -> None:
    found = read_decoder(name.upper()).parameters / 1e9
    assert found == pytest.approx(billions, rel=0.01)


def test_every_public_model_is_in_the_table_above() -> None:
    (mark,) = test_public_sizes.pytestmark
    assert {name for name, _ in mark.args[1]} == set(PUBLIC)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'; allowed are dense decoders .* llama, mist"),
        ({"model_type": None}, "model_type None"),
        ({"num_experts": 8}, "num_experts: a mixture of experts; allowed"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: multi-head latent attention"),
        ({"text_config": {"a": 1}}, "text_config: a model of text and images"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; allowed is silu"),
        ({"hidden_size": "128"}, "hidden_size '128'; it has to be a whole number"),
        ({"vocab_size": None}, "vocab_size None"),
        ({"num_key_value_heads": 3}, "4 heads, which 3 kv heads do not divide"),
        ({"hidden_size": 130}, "hidden_size 130, which 4 heads do not divide, and no head_dim"),
        ({"attention_bias": True}, "attention_bias: a bias in the products of the attention"),
        ({"mlp_bias": True}, "mlp_bias: a bias in the MLP"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(LinearQuantValueError, match=match) as refused:
        read_decoder({**CONFIG, **change})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "is not JSON"), ("[]", "holds no object"), (None, "there is no .*qwen3-8b")],
)
def test_files_that_are_no_config(text: str | None, match: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LinearQuantValueError, match=match):
        read_decoder(file)


@pytest.mark.parametrize(
    ("kind", "given", "kv_heads"),
    [
        # defaults of transformers 5; null is as many as heads
        ("mistral", {}, 8),
        ("qwen2", {}, 32),
        ("qwen3", {}, 32),
        ("llama", {}, 64),
        ("mistral", {"num_key_value_heads": None}, 64),
    ],
)
def test_kv_heads_that_a_config_leaves_out(kind: str, given: dict[str, Any], kv_heads: int) -> None:
    config = {**CONFIG, "model_type": kind, "num_attention_heads": 64, "hidden_size": 4096}
    del config["num_key_value_heads"]
    assert read_decoder({**config, **given}).kv_heads == kv_heads


@pytest.mark.parametrize(
    "sizes", [{"batch": 1.5}, {"context": True}, {"tp": "2"}, {"tp": 2.0}, {"prompt": -1}]
)
def test_sizes_are_whole_numbers(sizes: dict[str, Any]) -> None:
    (name,) = sizes
    with pytest.raises(LinearQuantValueError, match=f"{name} is .*whole number from 1"):
        lq_graph.forecast_model("qwen3-0.6b", **sizes)


# ---- memory ----


def test_memory_by_hand() -> None:
    """Qwen3-8B, W8A8, batch 3 of 1000 positions, a prompt of 500 tokens."""
    h, inner, layers, vocab, q, kv = 4096, 12288, 36, 151_936, 32 * 128, 8 * 128
    int8 = h * (q + 2 * kv) + q * h + 2 * h * inner + inner * h
    scales = 4 * ((q + 2 * kv) + h + 2 * inner + h)
    norms = 2 * (2 * h + 2 * 128)
    found = memory_of(PUBLIC["qwen3-8b"], "w8a8", 3, 1000, 500)
    assert found.weights == layers * (int8 + scales + norms) + 2 * (2 * vocab * h + h)
    assert found.padding == 0  # all sizes are multiples of the tiles
    assert found.per_sequence == 2 * 2 * kv * 1000 * layers
    assert found.cache == 3 * found.per_sequence
    rows = 500  # of one prompt: residual bf16; x1 int8; gate and up int32; the product's input int8
    workspace = 2 * rows * h + rows * h + 4 * rows * 2 * inner + rows * inner
    workspace += rows * 1000  # the mask, bool
    assert found.workspace == -(-workspace // 512) * 512
    total = found.weights + found.cache + found.workspace + RUNTIME
    assert found.total == total
    gib64 = 64 * 2**30
    assert found.sequences_that_fit(gib64) == (gib64 - (total - found.cache)) // found.per_sequence


def test_the_mask_of_a_long_prompt() -> None:
    """100,000 tokens, bool: 10 GB beside the layers; while it is inverted, there are two."""
    model, m, gib = PUBLIC["qwen3-8b"], 100_000, 2**30
    layers = 2 * m * 4096 + 2 * m * 4096 + 2 * m * 2 * 12288 + 2 * m * 12288  # bf16
    found = memory_of(model, "bf16", 1, m, m).workspace
    assert found / gib == pytest.approx((2 * m * 4096 + 2 * m * m) / gib, rel=1e-6)
    m //= 10
    found = memory_of(model, "bf16", 1, m, m).workspace
    assert found / gib == pytest.approx((layers / 10 + m * m) / gib, rel=1e-6)


@pytest.mark.parametrize(
    ("k", "n", "bits", "expected"),
    [
        (32, 16, 8, 512),
        (33, 16, 8, 1024),  # k to 64
        (32, 17, 8, 1024),  # n to 32
        (64, 16, 4, 512),
        (65, 16, 4, 1024),
    ],
)
def test_fractal_nz_pads(k: int, n: int, bits: int, expected: int) -> None:
    assert nz_bytes(k, n, bits) == expected


def test_padding_of_odd_sizes_and_shared_weights() -> None:
    """intermediate 344: k of down_proj is padded to 352 bytes, n of gate and up is 8 over 336."""
    model = read_decoder(CONFIG)
    found = memory_of(model, "w8a8", 1, 16, 16)
    assert found.padding == 3 * (2 * 128 * (352 - 344) + 128 * (352 - 344))
    assert memory_of(model, "bf16", 1, 16, 16).padding == 0
    halves = memory_of(PUBLIC["qwen3-32b"], "bf16", 1, 4096, 4096, tp=2)
    whole = memory_of(PUBLIC["qwen3-32b"], "bf16", 1, 4096, 4096)
    assert halves.cache * 2 == whole.cache
    assert 0.5 < halves.weights / whole.weights < 0.52  # the embedding is whole on each


# ---- steps ----


def test_a_step_is_the_sum_of_its_kernels() -> None:
    step = step_of(PUBLIC["qwen3-8b"], Shape(1, 1, 230), "w8a8", chip_of("A3"))
    assert step.seconds == pytest.approx(
        sum(one.cost.seconds * one.kernel.times for one in step.kernels)
    )
    assert sum(step.shares.values()) == pytest.approx(1)
    assert step.launches == 35 + 36 * 13 + 31
    read = sum(one.cost.bytes * one.times for one in step.kernels if "proj" in one.kernel.role)
    int8 = 36 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288)
    assert read == pytest.approx(int8, rel=0.01)


@pytest.mark.parametrize("product", ["A2", "A3", "A3-560T"])
def test_fewer_bits_and_more_devices_take_less_time(product: str) -> None:
    chip, model = chip_of(product), PUBLIC["qwen3-32b"]

    def seconds(quant: str, tp: int = 1, context: int = 1000) -> float:
        return step_of(model, Shape(1, 1, context, tp), quant, chip).seconds

    assert seconds("bf16") > seconds("w8a8") > seconds("w4a4")
    assert seconds("w8a8") > seconds("w8a8", 2) > seconds("w8a8", 4)
    assert seconds("w8a8", context=10_000) > seconds("w8a8")


def test_errors_grow_where_nothing_was_measured() -> None:
    model, shape = PUBLIC["qwen3-8b"], Shape(1, 1, 4096)

    def error(quant: str, product: str) -> float:
        return step_of(model, shape, quant, chip_of(product)).error

    assert 0.05 < error("bf16", "A3") < error("bf16", "A2") < error("bf16", "950") < 0.5
    assert error("w8a8", "A3") < error("w4a4", "A3")


def test_forecast_model() -> None:
    found = lq_graph.forecast_model("qwen3-8b", batch=2, context=1000, prompt=200)
    bf16, w8a8, w4a4 = found.forecasts
    assert [one.quant for one in found.forecasts] == ["bf16", "w8a8", "w4a4"]
    assert bf16.decode and w8a8.decode and w4a4.decode and w8a8.prefill
    expected = step_of(PUBLIC["qwen3-8b"], Shape(2, 1, 1000), "w8a8", chip_of("A3"))
    assert w8a8.decode == expected
    assert w8a8.prefill == step_of(PUBLIC["qwen3-8b"], Shape(1, 200, 200), "w8a8", chip_of("A3"))
    saved = {one.fusion: one for one in w8a8.savings}
    assert set(saved) == {*FUSIONS, "all"}
    # the first layer's norm, which has no sum before it, is counted with the 55 and the 31
    assert saved["all"].kernels == (36 * 79 - 11 + 55) - (36 * 14 - 1 + 31)
    assert all(one.seconds > 0 and one.kernels > 0 for one in w8a8.savings)
    told = found.as_json()
    assert json.loads(json.dumps(told)) == told
    assert told["forecasts"][1]["tokens_per_second"] == 2 / w8a8.decode.seconds


@pytest.mark.parametrize(
    ("product", "refused"),
    [
        ("950", {"w4a4": "no int4"}),
        ("310P", {"w4a4": "no int4", "w8a8": "no dynamic quantization"}),
    ],
)
def test_what_a_chip_does_not_compute_is_said(product: str, refused: dict[str, str]) -> None:
    found = lq_graph.forecast_model("qwen3-0.6b", product)
    for one in found.forecasts:
        assert refused.get(one.quant, "") in one.refused
        assert (one.decode is None) == (one.quant in refused)
    assert "no public measurement" in " ".join(str(found).split())


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("A2-313T", "A2-313T"),
        ("a2-313t", "A2-313T"),
        ("Ascend910B3", "A2-313T"),
        ("ascend910b3", "A2-313T"),
        ("Ascend910B2", "A2-376T"),
    ],
)
def test_a_chip_has_the_name_of_its_soc_too(name: str, chip: str) -> None:
    assert chip_of(name).name == chip


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"product": "A9"}, "product 'A9' is not known; allowed are 310P, A2, A3, 950, and the"),
        ({"batch": 0}, "batch is 0"),
        ({"context": -1}, "context is -1"),
        ({"quants": ("w8a16",)}, "'w8a16' is not known; allowed are bf16, w8a8, w4a4"),
        ({"tp": 3}, "3 devices cannot share the 32 heads of qwen3-8b"),
        ({"tp": 16, "product": "A2"}, "16 devices of A2-376T; its links join 8"),
        ({"profile": "nowhere.csv"}, "nowhere.csv cannot be read"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(LinearQuantValueError, match=match):
        lq_graph.forecast_model("qwen3-8b", **options)
