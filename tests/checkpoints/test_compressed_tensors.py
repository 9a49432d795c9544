"""Layers of compressed-tensors compute what the tensors of the files mean.

Two references in numpy: the operators' arithmetic, bit for bit; and the format's own definition in
float64, x = scale * (q - zero point), to the precision of the output's dtype.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lq_graph import LinearQuant, QuantizedLinear, load_checkpoint
from support.checkpoint_files import BF16, F16, F32, I8, I32, I64, K, Model, N, example_input
from support.compressed import (
    ASYMMETRIC,
    CHANNEL,
    CHANNEL4,
    STATIC,
    TENSOR,
    TOKEN,
    TOKEN4,
    Json,
    config,
    group,
    layer,
    save,
    scheme,
)
from support.compressed_golden import exact, meant

# scheme that is loaded, weights, inputs, zero point of the input
KINDS = {
    "W8A8 dynamic": ("A8W8 dynamic", CHANNEL, TOKEN, 0),
    "W8A8 static": ("A8W8 static", CHANNEL, STATIC, 0),
    "W4A4": ("A4W4 dynamic", CHANNEL4, TOKEN4, 0),
    "W4A8": ("A8W8 dynamic", CHANNEL4, TOKEN, 0),
    "W4A8 static": ("A8W8 static", CHANNEL4, STATIC, 0),
    "a scale for the weight": ("A8W8 static", TENSOR, STATIC, 0),
    "a scale for the weight, dynamic": ("A8W8 dynamic", TENSOR, TOKEN, 0),
    "int4, a scale for the weight": ("A4W4 dynamic", scheme(4, "tensor"), TOKEN4, 0),
    "asymmetric": ("A8W8 static", CHANNEL, ASYMMETRIC, -37),
    "asymmetric, at the end": ("A8W8 static", CHANNEL, ASYMMETRIC, -128),
    "asymmetric, positive": ("A8W8 static", TENSOR, ASYMMETRIC, 127),
    "asymmetric, zero": ("A8W8 static", CHANNEL, ASYMMETRIC, 0),
}
DTYPES = pytest.mark.parametrize("dtype", [F16, BF16])


@DTYPES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(("loaded", "weights", "inputs", "zero_point"), KINDS.values(), ids=KINDS)
def test_loads_what_the_files_say(
    loaded, weights, inputs, zero_point, bias, dtype, tmp_path
) -> None:
    tensors = layer(weights, inputs, bias=bias, zero_point=zero_point)
    save(tmp_path, {"up": tensors}, config(group(weights, inputs)))
    model = Model(dtype, bias)
    (report,) = load_checkpoint(model, tmp_path)
    assert (report.name, report.scheme, report.n, report.k) == ("up", loaded, N, K)
    x, int4 = example_input(dtype), loaded.startswith("A4")
    with torch.no_grad():
        out = model.up(x).float().numpy().reshape(-1, N)
    np.testing.assert_array_equal(out, exact(tensors, x, dtype, int4).astype(np.float32))
    want = meant(tensors, x, int4)
    step = (
        float(tensors["weight_scale"].max())
        * 128
        * float(tensors.get("input_scale", x.abs().max() / (7 if int4 else 127)))
    )
    # a value half way between two integers may be rounded the other way
    np.testing.assert_allclose(out, want, rtol=2**-7, atol=step + np.abs(want).max() * 2**-8)


@DTYPES
@pytest.mark.parametrize("inputs", [STATIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("weights", [CHANNEL, TENSOR], ids=["channel", "tensor"])
def test_a_scale_of_the_input_that_is_no_power_of_two(weights, inputs, dtype, tmp_path) -> None:
    tensors = layer(weights, inputs, zero_point=-5)
    tensors["input_scale"] = torch.tensor([0.0311]).to(BF16)
    save(tmp_path, {"up": tensors}, config(group(weights, inputs)))
    model = Model(dtype)
    load_checkpoint(model, tmp_path)
    x = example_input(dtype)
    with torch.no_grad():
        out = model.up(x).float().numpy().reshape(-1, N)
    np.testing.assert_array_equal(out, exact(tensors, x, dtype, False).astype(np.float32))


@DTYPES
@pytest.mark.parametrize("zero_point", [-128, -37, 127])
def test_a_zero_point_is_in_the_bias(zero_point, dtype, tmp_path) -> None:
    """The layer of a file with a zero point returns its float bias for an input of zeros."""
    tensors = layer(CHANNEL, ASYMMETRIC, zero_point=zero_point)
    save(tmp_path, {"up": tensors}, config(group(CHANNEL, ASYMMETRIC)))
    model = Model(dtype)
    load_checkpoint(model, tmp_path)
    assert model.up.linear.bias.dtype == I32 and model.up.input_offset.item() == zero_point
    bias = tensors["bias"].float()
    with torch.no_grad():
        out = model.up(torch.zeros(1, K, dtype=dtype))[0].float()
    step = tensors["weight_scale"].float().reshape(-1) * tensors["input_scale"].float()
    assert bool(((out - bias).abs() <= step * 0.5 + bias.abs() * 2**-7).all())
    assert torch.equal(model.up.bias.float(), bias.to(dtype).float())


# ---- what is in a folder beside them ----

CACHE = {"self_attn.k_scale": torch.ones(1), "self_attn.v_zero_point": torch.zeros(1)}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
BESIDE = {
    "zero points that are zero": (
        {"weight_zero_point": torch.zeros(N, 1, dtype=I8)},
        config(group(CHANNEL, TOKEN)),
        "it is zero",
    ),
    "an asymmetric scheme, zero points that are zero": (
        {"weight_zero_point": torch.zeros(N, 1, dtype=I8)},
        config(group(scheme(8, "channel", symmetric=False), TOKEN)),
        "it is zero",
    ),
    "columns in their order": (
        {"weight_g_idx": torch.arange(K, dtype=I32)},
        config(group(scheme(8, "channel", actorder="group"), TOKEN)),
        "it keeps the order of the columns",
    ),
    "no groups of columns": (
        {"weight_g_idx": torch.full((K,), -1, dtype=I32)},
        config(group(CHANNEL, TOKEN)),
        "it keeps the order of the columns",
    ),
    "the shape": (
        {"weight_shape": torch.tensor([N, K], dtype=I64)},
        config(group(CHANNEL, TOKEN)),
        "it is the shape of the weight",
    ),
}


@pytest.mark.parametrize(("more", "about", "why"), BESIDE.values(), ids=BESIDE)
def test_tensors_without_effect_are_left_out_and_told(more, about, why, tmp_path) -> None:
    plain = layer(CHANNEL, TOKEN)
    save(tmp_path, {"up": plain | more}, about)
    model = Model(BF16)
    report = load_checkpoint(model, tmp_path)
    assert report.left_out == {f"up.{part}": why for part in more}
    x = example_input(BF16)
    with torch.no_grad():
        out = model.up(x).float().numpy().reshape(-1, N)
    np.testing.assert_array_equal(out, exact(plain, x, BF16, False))


@pytest.mark.parametrize("dtype", [I8, F32])
def test_a_zero_point_of_zero_in_a_symmetric_scheme(dtype, tmp_path) -> None:
    tensors = layer(CHANNEL, STATIC) | {"input_zero_point": torch.zeros(1, dtype=dtype)}
    save(tmp_path, {"up": tensors}, config(group(CHANNEL, STATIC)))
    report = load_checkpoint(Model(BF16), tmp_path)
    assert report.left_out == {"up.input_zero_point": "it is zero"}


ATTENTION = group(None, KV, "LlamaAttention", format="dense")
QKV = {
    "cache": (config(group(CHANNEL, TOKEN), kv_cache_scheme=KV), {}, {}),
    "attention": (config(group(CHANNEL, TOKEN), ATTENTION), {"a.q_scale": torch.ones(1)}, {}),
    "older cache": (
        config(group(CHANNEL, TOKEN), kv_cache_scheme=KV),
        {"k_proj.output_scale": torch.ones(1)},
        {},
    ),
    "outputs": (
        config(group(CHANNEL, TOKEN, output_activations=STATIC)),
        {},
        {"output_scale": torch.ones(1), "output_zero_point": torch.zeros(1, dtype=I8)},
    ),
}


@pytest.mark.parametrize(("about", "beside", "parts"), QKV.values(), ids=QKV)
def test_the_attention_and_its_cache_stay_float(about, beside, parts, tmp_path) -> None:
    class Attention(Model):
        def __init__(self) -> None:
            super().__init__(BF16)
            self.k_proj = self.up
            del self.up

    save(tmp_path, {"up": {}, "k_proj": layer(CHANNEL, TOKEN) | parts}, about)
    file = tmp_path / "model.safetensors"
    from safetensors.torch import save_file

    more = {} if parts else CACHE | beside
    save_file(load_file(file) | more, file)
    report = load_checkpoint(Attention(), tmp_path)
    left = {*more, *(f"k_proj.{part}" for part in parts)}
    assert report.left_out == dict.fromkeys(left, "the attention and its cache stay float")


R1 = {
    "type": "hadamard",
    "apply": [
        {"targets": ["up"], "location": "weight_output", "inverse": False, "ignore": []},
        {"targets": ["head"], "location": "weight_input", "inverse": True, "ignore": []},
    ],
}
SPARSE = {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"}
ALIKE = {
    "rotations in the weights": config(
        group(CHANNEL, TOKEN), transform_config={"config_groups": {"R1": R1}}
    ),
    "no rotations": config(group(CHANNEL, TOKEN), transform_config={"config_groups": {}}),
    "frozen": config(group(CHANNEL, TOKEN), quantization_status="frozen"),
    "zeros that are stored": config(group(CHANNEL, TOKEN), sparsity_config=SPARSE),
    "mixed formats": config(group(CHANNEL, TOKEN), format="mixed-precision"),
    "a predefined scheme": config() | {"config_groups": {"W8A8": ["Linear"]}},
    "values left out": config(
        {
            "targets": ["Linear"],
            "weights": {"strategy": "channel"},
            "input_activations": {"strategy": "token", "dynamic": True},
        }
    ),
    "group_size for the strategy": config(
        group({**CHANNEL, "strategy": None, "group_size": -1}, TOKEN)
    ),
    "upper case": config(
        group({**CHANNEL, "strategy": "CHANNEL", "type": "INT"}, {**TOKEN, "strategy": "Token"})
    ),
    "no format": config(group(CHANNEL, TOKEN, format=None), format=None),
    "actorder": config(group({**CHANNEL, "actorder": "weight"}, TOKEN)),
    "names": config(group(CHANNEL, TOKEN, "up"), ignore=None),
}


@pytest.mark.parametrize("about", ALIKE.values(), ids=ALIKE)
def test_configs_that_mean_the_same(about, tmp_path) -> None:
    tensors = layer(CHANNEL, TOKEN)
    model = Model(BF16)
    report = load_checkpoint(model, save(tmp_path, {"up": tensors}, about))
    assert [loaded.scheme for loaded in report] == ["A8W8 dynamic"] and not report.left_out
    x = example_input(BF16)
    with torch.no_grad():
        out = model.up(x).float().numpy().reshape(-1, N)
    np.testing.assert_array_equal(out, exact(tensors, x, BF16, False))


ABOUT = config(group(CHANNEL, TOKEN))
OLD = {key: value for key, value in ABOUT.items() if key != "quant_method"}
PLACES = {
    "text_config": {"text_config": {"quantization_config": ABOUT}},
    "both": {"quantization_config": ABOUT, "text_config": {"quantization_config": ABOUT}},
    "older": {"compression_config": OLD},
    "older, inside": {"compression_config": {"quantization_config": OLD, "sparsity_config": {}}},
    "inside": {"quantization_config": {"quantization_config": ABOUT}},
}


@pytest.mark.parametrize("whole", PLACES.values(), ids=PLACES)
def test_places_of_the_config(whole: Json, tmp_path: Path) -> None:
    save(tmp_path, {"up": layer(CHANNEL, TOKEN)}, ABOUT)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert len(load_checkpoint(Model(BF16), tmp_path)) == 1


# ---- several groups ----

INT8, INT4 = (CHANNEL, TOKEN), (CHANNEL4, TOKEN4)
PRECEDENCE = {  # the targets of the int4 group; those of the int8 group; whether "up" is int4
    "exact before class": (["up"], ["Linear"], True),
    "exact before class, in any order": (["Linear"], ["up"], False),
    "pattern before class": (["re:.*u"], ["Linear"], True),
    "exact before pattern": (["up"], ["re:.*up"], True),
    "exact before pattern, in any order": (["re:.*up"], ["up"], False),
    "patterns by the alphabet": (["re:.*up"], ["re:u"], True),
    "the last of two equal ones": (["Linear"], ["Linear"], False),
    "a base of the class": (["Module"], ["re:down"], True),
    "classes by the alphabet": (["Linear"], ["Module"], True),
    "a pattern matches the beginning": (["re:u"], ["head"], True),
    "a name is the whole name": (["u"], ["Linear"], False),
}


@pytest.mark.parametrize(("int4", "int8", "wins"), PRECEDENCE.values(), ids=PRECEDENCE)
def test_the_target_that_decides(int4, int8, wins, tmp_path) -> None:
    about = config(group(*INT4, *int4), group(*INT8, *int8))
    save(tmp_path, {"up": layer(*INT4)}, about)
    (loaded,) = load_checkpoint(Model(BF16), tmp_path)
    assert loaded.scheme == ("A4W4 dynamic" if wins else "A8W8 dynamic")


def test_a_mixed_folder(tmp_path) -> None:
    about = config(group(*INT4, "re:.*up"), group(*INT8, "re:.*head"), ignore=[])
    layers = {"up": layer(*INT4), "head": layer(*INT8, n=8, k=N, seed=1)}
    model = Model(BF16)
    report = load_checkpoint(model, save(tmp_path, layers, about))
    assert {x.name: x.scheme for x in report} == {"up": "A4W4 dynamic", "head": "A8W8 dynamic"}
    assert isinstance(model.up, QuantizedLinear) and isinstance(model.up.linear, LinearQuant)
    assert model.up.linear.weight.dtype == I32 and model.head.linear.weight.dtype == I8
    x = example_input(BF16)
    with torch.no_grad():
        out = model.up(x).float().numpy().reshape(-1, N)
        assert model(x).isfinite().all()
    np.testing.assert_array_equal(out, exact(layers["up"], x, BF16, True))


def test_a_layer_may_be_loaded_again_and_over_another_kind(tmp_path) -> None:
    model = Model(BF16)
    for inputs, scheme_name in ((TOKEN4, "A4W4 dynamic"), (TOKEN, "A8W8 dynamic")):
        save(tmp_path, {"up": layer(CHANNEL4, inputs)}, config(group(CHANNEL4, inputs)))
        (loaded,) = load_checkpoint(model, tmp_path)
        assert loaded.scheme == scheme_name
