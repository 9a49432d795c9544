"""Public architectures of transformers, as tiny configurations with head sizes that models have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["ARCHITECTURES", "SIZES", "Architecture"]

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,  # else the prepared head would make the embedding FRACTAL_NZ
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_KINDS = ["full_attention", "sliding_attention"] * 2
_SLIDING = {"sliding_window": 8, "layer_types": _KINDS}
_MLA = {
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 2}
# all experts for each token: in eight bits, a token between two experts may choose the other one
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
}


@dataclass(frozen=True)
class Architecture:
    """A model of transformers with random weights.

    Attributes:
        note: what is special beside Llama.
        special: of the configuration, beside SIZES.
        layers: of the larger of the two models whose difference is a layer: 3 where the second
            layer has another mask than the first.
        multiplier: of the embeddings, which the random weights take back.
        is_decoder: whether it has a cache.
    """

    note: str = ""
    special: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    multiplier: float = 1
    is_decoder: bool = True


def _encoder(note: str, **special: Any) -> Architecture:
    return Architecture(note, special, is_decoder=False)


# by transformers' model_type
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture("", {"sliding_window": None}),
    "qwen2": Architecture("biases of q, k, v"),
    "qwen3": Architecture("norms of q and k"),
    "phi3": Architecture("one layer for q, k, v; one for gate and up"),
    "smollm3": Architecture("every second layer without rotation", {"no_rope_layers": [1, 0]}),
    "seed_oss": Architecture("biases of q, k, v"),
    "granite": Architecture(
        "multipliers",
        {
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.03,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
        },
        multiplier=12,
    ),
    "hunyuan_v1_dense": Architecture("norms of q and k after the rotation"),
    "gemma": Architecture("weights of norms are 1 + weight; gelu", multiplier=16),
    "gemma2": Architecture(
        "as Gemma; norms before and after; soft caps; sliding window",
        {**_SLIDING, "query_pre_attn_scalar": 64},
        layers=3,
        multiplier=16,
    ),
    "gemma3_text": Architecture(
        "as Gemma 2; norms of q and k; no soft caps",
        {**_SLIDING, "query_pre_attn_scalar": 64},
        layers=3,
        multiplier=16,
    ),
    "olmo2": Architecture("norms after attention and MLP, and of all q and k"),
    "exaone4": Architecture("norms after; norms of q and k; sliding window", _SLIDING, layers=3),
    "glm": Architecture("half of each head rotates, in pairs"),
    "glm4": Architecture("as GLM; norms before and after"),
    "ernie4_5": Architecture("pairs rotate"),
    "helium": Architecture("pairs rotate"),
    "cohere": Architecture("LayerNorm; pairs rotate; attention beside MLP", {"logit_scale": 0.5}),
    "cohere2": Architecture(
        "as Cohere; sliding window", {**_SLIDING, "logit_scale": 0.5}, layers=3
    ),
    "olmo": Architecture("LayerNorm without weights"),
    "stablelm": Architecture(
        "LayerNorm; a quarter of each head rotates", {"partial_rotary_factor": 0.25}
    ),
    "starcoder2": Architecture("LayerNorm; biases; gelu", {"sliding_window": None}),
    "nemotron": Architecture("LayerNorm of 1 + weight; squared ReLU; half of each head rotates"),
    "phi": Architecture("LayerNorm; gelu; half of each head rotates; attention beside MLP"),
    "gpt_neox": Architecture(
        "LayerNorm; gelu; a quarter of each head rotates", {"rotary_pct": 0.25}
    ),
    "gptj": Architecture(
        "LayerNorm; gelu; half of each head rotates, in pairs", {"rotary_dim": 32, "n_inner": 512}
    ),
    "gpt2": Architecture("LayerNorm; gelu; Conv1D, which is not nn.Linear", {"n_inner": 512}),
    "opt": Architecture("LayerNorm; ReLU", {"ffn_dim": 512, "word_embed_proj_dim": 256}),
    "bloom": Architecture("LayerNorm; gelu; ALiBi; an attention of its own"),
    "falcon": Architecture(
        "LayerNorm; gelu; an attention of its own",
        {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 512},
    ),
    "mixtral": Architecture("experts", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": Architecture(
        "experts, and a shared one",
        {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 256},
    ),
    "qwen3_moe": Architecture("experts; norms of q and k", {**_EXPERTS, "num_experts": 4}),
    "deepseek_v2": Architecture("MLA; experts", {**_MLA, **_EXPERTS, **_ROUTED}),
    "deepseek_v3": Architecture("MLA; experts", {**_MLA, **_EXPERTS, **_ROUTED}),
    "minicpm3": Architecture("MLA", _MLA),
    "bert": _encoder("encoder; LayerNorm; gelu", type_vocab_size=2),
    "roberta": _encoder("encoder; LayerNorm; gelu", type_vocab_size=1),
    "modernbert": _encoder("encoder; LayerNorm; gelu; sliding window", local_attention=8),
}
