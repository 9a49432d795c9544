"""Tiny decoders of transformers with random weights, and how they write a text step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PROMPT, TOKENS, ROOM = 7, 4, 16  # tokens of the prompt, steps, positions of a cache
PADDED = 3  # tokens of the prompt's first row that are padding, on the left

_SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=128,
    max_position_embeddings=64,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Name: class, what is special about its attention. A window of 4 is less than the prompt.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, heads alone": ("Llama", dict(num_key_value_heads=4)),
    "qwen2": ("Qwen2", dict(head_dim=None)),  # biases
    "qwen3": ("Qwen3", {}),  # norms of queries and keys
    "mistral": ("Mistral", dict(sliding_window=4)),
    "gemma2": (
        "Gemma2",
        dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma2, no softcap": (
        "Gemma2",
        dict(
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            attn_logit_softcapping=None,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
}


def model_of(name: str, **changes: Any) -> Any:
    """A model of the table, float32 on the CPU, eager attention."""
    import transformers

    kind, special = MODELS[name]
    text = "Text" if kind == "Gemma3" else ""
    sizes = {k: v for k, v in {**_SIZES, **special, **changes}.items() if k != "head_dim" or v}
    config = getattr(transformers, f"{kind}{text}Config")(**sizes, attn_implementation="eager")
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as they come, all tokens are nearly equally likely
            parameter.mul_(4)
    return model


def prompt() -> tuple[Tensor, Tensor]:
    """Tokens and mask of two rows, the first with padding on the left."""
    ids = torch.randint(3, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[0, :PADDED] = 0
    return ids, mask


def cached(model: nn.Module, cache: Any, first: int, queries: int) -> dict[str, Any]:
    """The arguments of a step with a cache, by their names in this version of transformers.

    Args:
        model: on any device.
        cache: of the model.
        first: position of the first query.
        queries: how many.
    """
    names = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"cache" if "cache" in names else "past_key_values": cache}
    if "cache_position" in names:  # older: else it is read from the cache, which no graph can
        device = next(model.parameters()).device
        given["cache_position"] = torch.arange(first, first + queries, device=device)
    return given


@torch.no_grad()
def greedy(
    model: Any, cache: Any, *, later: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Write a text.

    Args:
        model: on any device.
        cache: empty.
        later: the model that takes the steps after the prompt.

    Returns:
        tokens (steps, 2), float32 logits (steps, 2, vocabulary).
    """
    device = next(model.parameters()).device
    ids, mask = prompt()
    room = torch.zeros(2, ROOM, dtype=torch.int64)
    room[:, :PROMPT] = mask
    written, logits = [], []
    for width in range(PROMPT, PROMPT + TOKENS):
        queries = ids.shape[1]
        seen = room if cache.is_compileable else room[:, :width]
        position = (room[:, :width].cumsum(-1) - 1).clamp(min=0)[:, -queries:]
        take = model if width == PROMPT or later is None else later
        out = take(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            position_ids=position.contiguous().to(device),
            use_cache=True,
            **cached(model, cache, width - queries, queries),
        )
        logits.append(out.logits[:, -1].float().cpu())
        written.append(logits[-1].argmax(-1))
        ids = written[-1][:, None].clone()
        room[:, width] = 1
    return torch.stack(written), torch.stack(logits)
