"""What compressed-tensors holds and LinearQuant cannot run: one sentence that names it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lq_graph
from lq_graph import CheckpointError, load_checkpoint
from support.checkpoint_files import BF16, F16, I8, I32, I64, K, Model, N
from support.compressed import (
    ASYMMETRIC,
    CHANNEL,
    CHANNEL4,
    STATIC,
    TOKEN,
    TOKEN4,
    Json,
    config,
    group,
    layer,
    save,
    scheme,
)
from support.injection import model_state


def floats(bits: int, strategy: str, **more: object) -> Json:
    return scheme(bits, strategy, type="float", **more)


def one(weights: Json | None, inputs: Json | None, **more: object) -> Json:
    return config(group(weights, inputs, **more))


def transformed(*locations: str) -> Json:
    applied = [{"targets": ["up"], "location": location} for location in locations]
    groups = {"R4": {"type": "hadamard", "apply": applied}}
    return config(group(CHANNEL, TOKEN), transform_config={"config_groups": groups})


PER_GROUP = scheme(4, "group", group_size=128)
AGAIN = "load the float model and call lq_graph.quantize"
CHANNELS, PER_TOKEN = "quantize again with strategy='channel'", "and strategy='token'"
SCHEMES = {  # the config, what it is, what to do
    "W4A16": (
        one(PER_GROUP, None, format="pack-quantized"),
        "found W4A16: int4 weights with a scale for each 128 columns and float activations",
        AGAIN,
    ),
    "W8A16": (one(CHANNEL, None), "found W8A16: int8 weights with a scale for each chan", AGAIN),
    "FP8": (
        one(floats(8, "channel"), floats(8, "token", dynamic=True)),
        "found FP8: float8 weights with a scale for each channel and float8 activations per token",
        AGAIN,
    ),
    "FP8 of blocks": (
        one(floats(8, "block"), floats(8, "group", dynamic=True)),
        "found FP8: float8 weights with a scale for each block",
        AGAIN,
    ),
    "NVFP4": (
        one(
            floats(4, "tensor_group", group_size=16),
            floats(4, "tensor_group", dynamic="local", group_size=16),
        ),
        "found NVFP4: float4 weights with a scale for each 16 columns",
        AGAIN,
    ),
    "MXFP4": (
        one(floats(4, "group", group_size=32, scale_dtype="torch.uint8"), None),
        "found MXFP4A16: ",
        AGAIN,
    ),
    "W4AFP8": (one(PER_GROUP, floats(8, "token", dynamic=True)), "found W4AFP8: int4 we", AGAIN),
    "W4A4 per group": (
        one(PER_GROUP, TOKEN4),
        "weights: expected one scale for each channel (strategy channel or tensor), found W4A4, "
        "int4 weights with a scale for each 128 columns",
        CHANNELS,
    ),
    "W8A8 per group": (one(scheme(8, "group", group_size=64), TOKEN), "each 64 columns", CHANNELS),
    "W8A8 of blocks": (one(scheme(8, "block"), TOKEN), "a scale for each block", CHANNELS),
    "group without a strategy": (
        one({**CHANNEL, "strategy": None, "group_size": 8}, TOKEN),
        "a scale for each 8 columns",
        CHANNELS,
    ),
    "dynamic weights": (one(scheme(8, "channel", dynamic=True), TOKEN), ".weights: ", CHANNELS),
    "W8A4": (one(CHANNEL, TOKEN4), "and weights of no more bits, found W8A4", AGAIN),
    "W8A16 in integers": (one(CHANNEL, scheme(16, "token", dynamic=True)), "W8A16", AGAIN),
    "bits of no number": (one({**CHANNEL, "num_bits": "8"}, TOKEN), "found W8A8", AGAIN),
    "asymmetric, dynamic": (
        one(CHANNEL, scheme(8, "token", dynamic=True, symmetric=False)),
        "expected symmetric dynamic activations, which DynamicQuant",
        "quantize again with symmetric=True, or with static activations",
    ),
    "dynamic, one scale": (
        one(CHANNEL, scheme(8, "tensor", dynamic=True)),
        "found int8 activations per tensor (dynamic true)",
        PER_TOKEN,
    ),
    "static, per token": (one(CHANNEL, scheme(8, "token")), "per token (dynamic false)", PER_TOKEN),
    "static, per group": (
        one(CHANNEL, scheme(8, "group", group_size=8)),
        "int8 activations per group (dynamic false)",
        PER_TOKEN,
    ),
    "W4A4 static": (one(CHANNEL4, scheme(4, "tensor")), "int4 activations that are", PER_TOKEN),
    "no weights": (one(None, TOKEN), "weights: expected a scheme for the weights", "remove the gr"),
    "outputs": (
        one(CHANNEL, TOKEN, output_activations=STATIC),
        "output_activations: expected none, or those of q_proj, k_proj and v_proj",
        "quantize again without output_activations",
    ),
    "packed": (
        one(CHANNEL4, TOKEN4, format="pack-quantized"),
        "format: expected int-quantized",
        "quantization_format='int-quantized'",
    ),
    "marlin": (
        config(group(CHANNEL, TOKEN, format=None), format="marlin-24"),
        "found marlin-24",
        "int-quantized",
    ),
    "another predefined scheme": (
        config() | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}},
        "the predefined scheme W8A8 or INT8, found FP8_DYNAMIC",
        AGAIN,
    ),
    "sparse": (
        config(group(CHANNEL, TOKEN), sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config.format: expected dense",
        "without sparse compression",
    ),
    "rotations of R4": (
        transformed("input", "weight_input"),
        "transform_config.config_groups.R4: expected transforms that are in the weights",
        "rotations=['R1', 'R2']",
    ),
    "rotations of R3": (transformed("q_attn", "k_cache"), "one at q_attn", "rotations=['R1', '"),
    "rotations of QuIP": (transformed("weight_output", "output"), "one at output", "rotations="),
    "a rotation without a place": (
        config(group(CHANNEL, TOKEN), transform_config={"config_groups": {"a": {"apply": [1]}}}),
        "one at None",
        "rotations=",
    ),
    "unclear transforms": (
        config(group(CHANNEL, TOKEN), transform_config={"a": 1}),
        "transform_config: expected none, or one with config_groups",
        "use the config.json that was saved",
    ),
    "weights of no object": (one(3, TOKEN), "weights: expected an object, found 3", "use the"),  # type: ignore[arg-type]
    "another method": (
        config(group(CHANNEL, TOKEN), quant_method="gptq"),
        "expected compressed-tensors with config_groups, found quant_method 'gptq'",
        "quantize the float model with lq_graph.quantize",
    ),
    "no method": (
        config(group(CHANNEL, TOKEN), quant_method=None),
        "expected compressed-tensors with config_groups",
        "quantize the float model",
    ),
    "no group": (
        config(group(CHANNEL, TOKEN, "re:.*down", "Embedding")),
        "a group whose targets contain up, found none",
        "add the layer to the targets",
    ),
}


def check_refused(model: nn.Module, folder, *messages: str) -> None:
    before = model_state(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, folder)
    text = str(caught.value)
    assert text.isprintable() and model_state(model) == before
    for message in (*messages, "What to do: "):
        assert message in text


@pytest.mark.parametrize(("about", "message", "todo"), SCHEMES.values(), ids=SCHEMES)
def test_schemes_that_are_refused(about, message, todo, tmp_path) -> None:
    save(tmp_path, {"up": layer(CHANNEL, TOKEN)}, about)
    check_refused(Model(BF16), tmp_path, message, todo)


def put(**parts: torch.Tensor):
    return lambda tensors: tensors.update({f"up.{k}": v for k, v in parts.items()})


def drop(part: str):
    return lambda tensors: tensors.pop(f"up.{part}")


def int8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=I8)


TENSORS = {  # weights, inputs, what is changed in the file, what is found
    "int4 values above 7": (
        CHANNEL4,
        TOKEN4,
        put(weight=torch.full((N, K), 8, dtype=I8)),
        "8 to 8",
    ),
    "int4 values below -8": (
        CHANNEL4,
        TOKEN4,
        put(weight=torch.full((N, K), -9, dtype=I8)),
        "up.weight: expected int4 values, -8 to 7, found -9 to -9",
    ),
    "float weights": (
        CHANNEL,
        TOKEN,
        put(weight=torch.ones(N, K).bfloat16()),
        "found bfloat16 (24, 40). What to do: save the model again with its weights quantized",
    ),
    "zero points of weights": (
        CHANNEL,
        TOKEN,
        put(weight_zero_point=torch.ones(N, 1, dtype=I8)),
        "up.weight_zero_point: expected zeros",
    ),
    "zero points of weights, asymmetric": (
        scheme(8, "channel", symmetric=False),
        TOKEN,
        put(weight_zero_point=torch.ones(N, 1, dtype=I8)),
        "up.weight_zero_point: expected zeros",
    ),
    "no zero points of weights": (
        scheme(8, "channel", symmetric=False),
        TOKEN,
        put(),
        "expected the tensor up.weight_zero_point, because the scheme is not symmetric",
    ),
    "no zero point": (CHANNEL, ASYMMETRIC, drop("input_zero_point"), "tensor up.input_zero_point"),
    "a zero point in a symmetric scheme": (
        CHANNEL,
        STATIC,
        put(input_zero_point=int8(3)),
        "up.input_zero_point: expected zeros",
    ),
    "a zero point of uint8": (
        CHANNEL,
        ASYMMETRIC,
        put(input_zero_point=torch.tensor([128], dtype=torch.uint8)),
        "up.input_zero_point: expected int8 or",
    ),
    "a zero point beyond int8": (
        CHANNEL,
        ASYMMETRIC,
        put(input_zero_point=torch.tensor([128], dtype=I32)),
        "up.input_zero_point: expected an integer of -128 to 127, found 128",
    ),
    "a zero point between integers": (
        CHANNEL,
        ASYMMETRIC,
        put(input_zero_point=torch.tensor([0.5])),
        "expected an integer of -128 to 127, found 0.5",
    ),
    "a zero point of nan": (
        CHANNEL,
        ASYMMETRIC,
        put(input_zero_point=torch.tensor([torch.nan])),
        "expected an integer of -128 to 127, found nan",
    ),
    "several zero points": (CHANNEL, ASYMMETRIC, put(input_zero_point=int8(1, 2)), "(1,), found"),
    "a bias that no int32 holds": (
        CHANNEL,
        ASYMMETRIC,
        put(bias=torch.full((N,), 1e9)),
        "for the int32 bias that a zero point takes",
    ),
    "a static layer without one": (CHANNEL, STATIC, drop("input_scale"), "no such tensor"),
    "scales of groups": (
        CHANNEL,
        TOKEN,
        put(weight_scale=torch.ones(N, 2)),
        "found float32 (24, 2)",
    ),
    "columns in another order": (
        CHANNEL,
        TOKEN,
        put(weight_g_idx=torch.arange(K, dtype=I32).flip(0)),
        "up.weight_g_idx: expected the 40 columns in their order",
    ),
    "an order of more columns": (
        CHANNEL,
        TOKEN,
        put(weight_g_idx=torch.arange(K + 1, dtype=I32)),
        "up.weight_g_idx",
    ),
    "another shape": (
        CHANNEL,
        TOKEN,
        put(weight_shape=torch.tensor([N, 2 * K], dtype=I64)),
        "up.weight_shape: expected [24, 40], the shape of the weight",
    ),
    "a packed weight": (
        CHANNEL4,
        TOKEN4,
        lambda t: t.update({"up.weight_packed": t.pop("up.weight").int()}),
        "up.weight: expected int8 (24, 40), found no such tensor",
    ),
}


@pytest.mark.parametrize(("weights", "inputs", "change", "found"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(weights, inputs, change, found, tmp_path) -> None:
    save(tmp_path, {"up": layer(weights, inputs)}, config(group(weights, inputs)))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    check_refused(Model(BF16), tmp_path, found)


@pytest.mark.parametrize("part", ["input_scale", "k_scale", "output_scale"])
def test_scales_that_the_config_does_not_know(part, tmp_path) -> None:
    tensors = layer(CHANNEL, TOKEN) | {part: torch.ones(1)}
    save(tmp_path, {"up": tensors}, config(group(CHANNEL, TOKEN)))
    with pytest.raises(CheckpointError, match=rf"up.{part}: expected a tensor the model has"):
        load_checkpoint(Model(BF16), tmp_path)


def test_sizes_that_int4_does_not_take(tmp_path) -> None:
    tensors = layer(CHANNEL4, TOKEN4, n=12, k=20)
    save_file({f"0.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    about = config(group(CHANNEL4, TOKEN4), ignore=[])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    model = nn.Sequential(nn.Linear(20, 12)).bfloat16()
    check_refused(
        model, tmp_path, "k = 20, n = 12: int4 needs multiples of 8", "leave the layer fl"
    )


def test_a_product_without_int4(tmp_path) -> None:
    save(tmp_path, {"up": layer(CHANNEL4, TOKEN4)}, config(group(CHANNEL4, TOKEN4)))
    lq_graph.set_product("310P")
    try:
        check_refused(Model(F16), tmp_path, "up: expected a layer that the product can run")
    finally:
        lq_graph.set_product(None)


def test_a_quantized_embedding(tmp_path) -> None:
    class Embedded(Model):
        def __init__(self) -> None:
            super().__init__(BF16)
            self.embed = nn.Embedding(N, K, dtype=BF16)

    about = config(group(CHANNEL, TOKEN), group(CHANNEL, None, "Embedding"))
    save(tmp_path, {"up": layer(CHANNEL, TOKEN), "embed": layer(CHANNEL, TOKEN, bias=False)}, about)
    todo = "quantize again and leave this layer float (ignore)"
    check_refused(Embedded(), tmp_path, "embed: expected quantized layers that", todo)


def test_two_configs_that_differ(tmp_path) -> None:
    save(tmp_path, {"up": layer(CHANNEL, TOKEN)}, config(group(CHANNEL, TOKEN)))
    file = tmp_path / "config.json"
    about = json.loads(file.read_text())
    about["text_config"] = {"quantization_config": config(group(CHANNEL4, TOKEN4))}
    file.write_text(json.dumps(about))
    check_refused(Model(BF16), tmp_path, "text_config.quantization_config: expected that of quanti")
