"""What `interop.py` makes with the real tools: one table of cases. The Pythons of the tools import
it too, so it imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLMCOMPRESSOR, MSMODELSLIM = "llmcompressor", "msmodelslim"

VOCABULARY, TOKENS, TEXTS = 256, 32, 16  # of a model; of a text; calibration texts
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # the logits hang on every layer
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # the name in transformers, and its own sizes
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 32, **EXPERTS}),
}


@dataclass(frozen=True)
class Case:
    """A folder that a tool makes.

    Attributes:
        name: of the folder, and of the row.
        tool: LLMCOMPRESSOR or MSMODELSLIM.
        recipe: llmcompressor: modifiers by name with their arguments, in order. msmodelslim: the
            file of --config_path.
        model: of MODELS.
        refused: a regular expression of the sentence with which load_checkpoint refuses the folder,
            or "" if it loads.
        model_type: msmodelslim's.
        options: of load_checkpoint.
        quick: whether the tests run it.
    """

    name: str
    tool: str
    recipe: Any
    model: str = "llama"
    refused: str = ""
    model_type: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    quick: bool = False


# ---- llmcompressor ----


def _bits(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, **more}


CHANNEL = _bits(8, strategy="channel", dynamic=False)
TOKEN = _bits(8, strategy="token", dynamic=True)
TENSOR = _bits(8, strategy="tensor", dynamic=False)
CHANNEL4, TOKEN4 = CHANNEL | {"num_bits": 4}, TOKEN | {"num_bits": 4}
GATE_UP, REST = ["re:.*(gate|up)_proj"], ["re:.*self_attn.*_proj", "re:.*down_proj"]


def _group(
    weights: Any, inputs: Any, targets: tuple[str, ...] | list[str] = ("Linear",)
) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "input_activations": inputs}


def _quantization(*groups: Any, kind: str = "QuantizationModifier", **more: Any) -> tuple[Any, ...]:
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    return kind, {"config_groups": named, "ignore": ["lm_head"], **more}


DYNAMIC = _quantization(_group(CHANNEL, TOKEN))


def _llmcompressor(name: str, *recipe: Any, **more: Any) -> Case:
    return Case(name, LLMCOMPRESSOR, recipe, **more)


def _preset(scheme: str) -> Any:
    return "QuantizationModifier", {"scheme": scheme, "targets": ["Linear"], "ignore": ["lm_head"]}


def _spin(*rotations: str) -> Any:
    return "SpinQuantModifier", {"rotations": list(rotations), "transform_type": "hadamard"}


KV_CACHE = {**TENSOR, "type": "float"}
OF_LLMCOMPRESSOR = [
    _llmcompressor("w8a8_dynamic", DYNAMIC, quick=True),
    _llmcompressor("w8a8_static", _quantization(_group(CHANNEL, TENSOR)), quick=True),
    _llmcompressor(
        "w8a8_static_asymmetric",
        _quantization(_group(CHANNEL, TENSOR | {"symmetric": False})),
        quick=True,
    ),
    _llmcompressor("w8a8_tensor_weights", _quantization(_group(TENSOR, TENSOR)), quick=True),
    _llmcompressor("smoothquant", ("SmoothQuantModifier", {"smoothing_strength": 0.8}), DYNAMIC),
    _llmcompressor("gptq", _quantization(_group(CHANNEL, TOKEN), kind="GPTQModifier")),
    _llmcompressor(
        "gptq_actorder",
        _quantization(_group(CHANNEL, TOKEN), kind="GPTQModifier", actorder="weight"),
    ),
    _llmcompressor("w4a4", _quantization(_group(CHANNEL4, TOKEN4)), quick=True),
    _llmcompressor(
        "w4a4_w8a8_groups",
        ("SmoothQuantModifier", {"smoothing_strength": 0.8}),
        _quantization(_group(CHANNEL4, TOKEN4, GATE_UP), _group(CHANNEL, TOKEN, REST)),
        quick=True,
    ),
    _llmcompressor(
        "w4a4_w8a8_overlap",
        _quantization(_group(CHANNEL, TOKEN), _group(CHANNEL4, TOKEN4, GATE_UP)),
    ),
    _llmcompressor("spinquant_r1_r2", _spin("R1", "R2"), DYNAMIC, quick=True),
    _llmcompressor(
        "spinquant_r4",
        _spin("R1", "R2", "R4"),
        DYNAMIC,
        refused="R4: expected transforms that are in the weights",
    ),
    _llmcompressor(
        "kv_cache", _quantization(_group(CHANNEL, TOKEN), kv_cache_scheme=KV_CACHE), quick=True
    ),
    _llmcompressor(
        "moe", DYNAMIC, model="qwen3_moe", refused="expected an nn.Linear for each expert"
    ),
    _llmcompressor("w4a16", _preset("W4A16"), refused="found W4A16", quick=True),
    _llmcompressor("w8a16", _preset("W8A16"), refused="found W8A16"),
    _llmcompressor("fp8", _preset("FP8_DYNAMIC"), refused="found FP8", quick=True),
    _llmcompressor(
        "w8a8_asymmetric_tokens",
        _quantization(_group(CHANNEL, TOKEN | {"symmetric": False})),
        refused="expected symmetric dynamic activations",
    ),
]

# ---- msmodelslim ----

LINES = "calibration.json"  # `interop_make.py` puts its place there


def _old(
    model_type: str, *, anti: str = "", kv: bool = False, mix: Any = None, **calib: Any
) -> Any:
    """The configuration of its first API."""
    spec: dict[str, Any] = {
        "calib_cfg": {
            "w_bit": 8,
            "a_bit": 8,
            "mm_tensor": False,
            "disable_names": ["lm_head"],
            **calib,
        },
        "calib_dataset": LINES,
    }
    if anti:
        spec["anti_cfg"] = {"anti_method": anti}
    if mix:
        spec["calib_params"] = {"disable_level": "L0", "mix_cfg": mix}
    label = {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": kv}
    metadata = {
        "config_id": "interop",
        "score": 90,
        "verified_model_types": [model_type],
        "label": label,
    }
    return {"apiversion": "modelslim_v0", "metadata": metadata, "spec": spec}


def _new(model_type: str, *process: Any, bits: int = 8, a_bits: int = 8, kv: bool = False) -> Any:
    """The configuration of its second API."""
    label = {"w_bit": bits, "a_bit": a_bits, "is_sparse": False, "kv_cache": kv}
    metadata = {
        "config_id": "interop",
        "score": 90,
        "verified_model_types": [model_type],
        "label": label,
    }
    save = [{"type": "ascendv1_saver", "part_file_size": 4}]
    spec = {"process": list(process), "dataset": LINES, "save": save}
    return {"apiversion": "modelslim_v1", "metadata": metadata, "spec": spec}


def _linear(weight: str = "int8", act: str = "int8", scope: str = "per_token", **more: Any) -> Any:
    def one(scope: str, dtype: str, symmetric: bool) -> Any:
        return {"scope": scope, "dtype": dtype, "symmetric": symmetric, "method": "minmax"}

    qconfig = {"weight": one("per_channel", weight, True)}
    if act:
        qconfig["act"] = one(scope, act, scope == "per_token")
    return {
        "type": "linear_quant",
        "qconfig": qconfig,
        "include": ["*"],
        "exclude": ["*lm_head"],
    } | more


CACHE8 = {
    "type": "dynamic_cache",
    "qconfig": {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"},
    "include": ["*"],
}


def _rounded(bits: int, *include: str) -> Any:
    extra = {"symmetric": True, "dtype": f"int{bits}", "ext": {"scale_dtype": "bfloat16"}}
    weight = {"scope": "per_channel", "method": "autoround", **extra}
    act = {"scope": "per_token", "method": "minmax", **extra}
    return {"qconfig": {"weight": weight, "act": act}, "include": list(include)}


ROTATED = {
    "type": "adapt_rotation",
    "stage": 2,
    "online": False,
    "block_size": -1,
    "max_tp_size": 1,
}
ROUNDED = {
    "type": "autoround_quant",
    "iters": 2,
    "enable_round_tuning": True,
    "strategies": [
        _rounded(8, "*self_attn*", "*.down_proj"),
        _rounded(4, "*.up_proj", "*.gate_proj"),
    ],
}
QWEN2, QWEN3, MOE = "Qwen2.5-7B-Instruct", "Qwen3-32B", "Qwen3-30B"
MIX = _old(QWEN3, anti="m4", pdmix=True)  # the default of Qwen3


def _msmodelslim(name: str, model_type: str, recipe: Any, **more: Any) -> Case:
    model = {QWEN2: "qwen2", QWEN3: "qwen3", MOE: "qwen3_moe"}[model_type]
    return Case(f"ms_{name}", MSMODELSLIM, recipe, model, model_type=model_type, **more)


OF_MSMODELSLIM = [
    _msmodelslim("w8a8", QWEN2, _old(QWEN2), quick=True),
    _msmodelslim("w8a8_m4", QWEN2, _old(QWEN2, anti="m4"), quick=True),
    _msmodelslim("w8a8_m1", QWEN2, _old(QWEN2, anti="m1")),
    _msmodelslim("w8a8_m2", QWEN2, _old(QWEN2, anti="m2")),
    _msmodelslim("w8a8_dynamic", QWEN3, _new(QWEN3, _linear()), quick=True),
    _msmodelslim("w8a8_dynamic_m4", QWEN2, _old(QWEN2, anti="m4", is_dynamic=True)),
    _msmodelslim("w8a8_dynamic_quarot", QWEN3, _new(QWEN3, {"type": "quarot"}, _linear())),
    _msmodelslim("w8a8_static", QWEN3, _new(QWEN3, _linear(scope="per_tensor"))),
    _msmodelslim("w8a8_mix", QWEN3, MIX, quick=True),
    _msmodelslim("w8a8_mix_static", QWEN3, MIX, options=(("prefer", "static"),)),
    _msmodelslim(
        "w4a4_dynamic", QWEN3, _new(QWEN3, ROTATED, ROUNDED, bits=4, a_bits=4), quick=True
    ),
    _msmodelslim("w8a16", QWEN3, _new(QWEN3, _linear(act=""), a_bits=16), refused="found 'W8A16'"),
    _msmodelslim("w8a8_c8", QWEN3, _new(QWEN3, _linear(), CACHE8, kv=True)),  # C8 is left out
    _msmodelslim(
        "moe",
        MOE,
        _old(
            MOE,
            disable_names=["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
            mix={"*.mlp.*": "w8a8_dynamic", "*": "w8a8"},
        ),
        refused="expected an nn.Linear for each expert",
    ),
]

CASES = {case.name: case for case in [*OF_LLMCOMPRESSOR, *OF_MSMODELSLIM]}
