"""The sizes of a decoder, from a config.json or a short name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LinearQuantValueError

__all__ = ["KINDS", "PUBLIC", "Decoder", "public_models", "read_decoder"]

# model_type of config.json: whether q and k have norms, and q, k and v a bias
KINDS: dict[str, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (False, True),
    "qwen3": (True, False),
}
_OTHER = {  # keys that only other architectures have, and what they are
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "moe_intermediate_size": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "text_config": "a model of text and images",
    "attention_bias": "a bias in the products of the attention",
    "mlp_bias": "a bias in the MLP",
}
# what transformers takes where a config.json lacks num_key_value_heads; else the heads
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


@dataclass(frozen=True)
class Decoder:
    """A dense decoder with RMSNorm, rotary embedding, grouped attention and SwiGLU.

    Attributes:
        name: the short name, or the folder's.
        kind: a key of KINDS.
        hidden, intermediate, layers, heads, kv_heads, head, vocab: sizes.
        tied: whether the head is the embedding's weight.
        source: where the sizes are from.
    """

    name: str
    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    tied: bool
    source: str

    @property
    def has_norms(self) -> bool:
        """Whether queries and keys have norms of their own."""
        return KINDS[self.kind][0]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(k, n) of each Linear of a layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """All weights and biases."""
        bias = (self.heads + 2 * self.kv_heads) * self.head if KINDS[self.kind][1] else 0
        norms = 2 * self.hidden + (2 * self.head if self.has_norms else 0)
        layer = sum(k * n for k, n in self.linears.values()) + bias + norms
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + tables + self.hidden


def _public(name: str, kind: str, *sizes: int, tied: bool = False, of: str) -> Decoder:
    hidden, intermediate, layers, heads, kv_heads, head, vocab = sizes
    return Decoder(
        name, kind, hidden, intermediate, layers, heads, kv_heads, head, vocab, tied,
        f"config.json of {of} at huggingface.co",
    )  # fmt: skip


# fmt: off
PUBLIC: dict[str, Decoder] = {one.name: one for one in (
    # hidden, intermediate, layers, heads, kv heads, head, vocab
    _public("llama-3.2-1b", "llama", 2048, 8192, 16, 32, 8, 64, 128256, tied=True,
            of="meta-llama/Llama-3.2-1B"),
    _public("llama-3.1-8b", "llama", 4096, 14336, 32, 32, 8, 128, 128256,
            of="meta-llama/Llama-3.1-8B"),
    _public("llama-3.1-70b", "llama", 8192, 28672, 80, 64, 8, 128, 128256,
            of="meta-llama/Llama-3.1-70B"),
    _public("mistral-7b-v0.3", "mistral", 4096, 14336, 32, 32, 8, 128, 32768,
            of="mistralai/Mistral-7B-v0.3"),
    _public("qwen2.5-0.5b", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, tied=True,
            of="Qwen/Qwen2.5-0.5B"),
    _public("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 128, 152064, of="Qwen/Qwen2.5-7B"),
    _public("qwen2.5-32b", "qwen2", 5120, 27648, 64, 40, 8, 128, 152064, of="Qwen/Qwen2.5-32B"),
    _public("qwen2.5-72b", "qwen2", 8192, 29568, 80, 64, 8, 128, 152064, of="Qwen/Qwen2.5-72B"),
    _public("qwen3-0.6b", "qwen3", 1024, 3072, 28, 16, 8, 128, 151936, tied=True,
            of="Qwen/Qwen3-0.6B"),
    _public("qwen3-1.7b", "qwen3", 2048, 6144, 28, 16, 8, 128, 151936, tied=True,
            of="Qwen/Qwen3-1.7B"),
    _public("qwen3-4b", "qwen3", 2560, 9728, 36, 32, 8, 128, 151936, tied=True,
            of="Qwen/Qwen3-4B"),
    _public("qwen3-8b", "qwen3", 4096, 12288, 36, 32, 8, 128, 151936, of="Qwen/Qwen3-8B"),
    _public("qwen3-14b", "qwen3", 5120, 17408, 40, 40, 8, 128, 151936, of="Qwen/Qwen3-14B"),
    _public("qwen3-32b", "qwen3", 5120, 25600, 64, 64, 8, 128, 151936, of="Qwen/Qwen3-32B"),
)}
# fmt: on


def public_models() -> tuple[str, ...]:
    """The short names."""
    return tuple(PUBLIC)


def read_decoder(model: str | Path | Mapping[str, Any]) -> Decoder:
    """The decoder of a short name of PUBLIC, a folder with a config.json, such a file, or what it
    holds.

    Raises:
        LinearQuantValueError: it is none of these, or an architecture that the forecast does not
            know; the text says what is allowed.
    """
    if isinstance(model, Mapping):
        return _from_config(model, "(config)", "the config given")
    known = PUBLIC.get(str(model).lower())
    path = Path(model).expanduser()
    if known is not None and not path.exists():
        return known
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise LinearQuantValueError(
            f"forecast: there is no {file}; write a folder with a config.json, such a file, or one "
            f"of {', '.join(PUBLIC)}"
        )
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise LinearQuantValueError(f"forecast: {file} is not JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise LinearQuantValueError(f"forecast: {file} is not a config.json: it holds no object")
    folder = file.absolute().parent.name if file.name == "config.json" else file.stem
    return _from_config(config, folder, str(file))


def _from_config(config: Mapping[str, Any], name: str, source: str) -> Decoder:
    kind = config.get("model_type")
    allowed = f"allowed are dense decoders of model_type {', '.join(KINDS)}"
    for key, what in _OTHER.items():
        if config.get(key):
            raise LinearQuantValueError(f"forecast: {source} has {key}: {what}; {allowed}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise LinearQuantValueError(f"forecast: {source} is of model_type {kind!r}; {allowed}")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise LinearQuantValueError(
            f"forecast: {source} has hidden_act {activation!r}; allowed is silu"
        )

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LinearQuantValueError(
                f"forecast: {source} has {key} {value!r}; it has to be a whole number from 1"
            )
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    # defaults of transformers, where a config.json leaves a key out
    missing = "num_key_value_heads" not in config
    kv_heads = size("num_key_value_heads", _KV_HEADS.get(kind, heads) if missing else heads)
    if heads % kv_heads:
        raise LinearQuantValueError(
            f"forecast: {source} has {heads} heads, which {kv_heads} kv heads do not divide"
        )
    if kind != "qwen3" and config.get("head_dim") is None and hidden % heads:
        raise LinearQuantValueError(
            f"forecast: {source} has hidden_size {hidden}, which {heads} heads do not divide, and "
            "no head_dim"
        )
    return Decoder(
        name,
        kind,
        hidden,
        size("intermediate_size"),
        size("num_hidden_layers"),
        heads,
        kv_heads,
        size("head_dim", 128 if kind == "qwen3" else hidden // heads),
        size("vocab_size"),
        config.get("tie_word_embeddings") is True,
        source,
    )
