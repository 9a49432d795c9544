"""A step of the model that a config.json describes, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..rules.plan import Spec
from .cache import StaticCache
from .empty_model import empty_model

__all__ = ["ModelStep", "step_of_config"]


class ModelStep(nn.Module):
    """A model of transformers and its cache, for what takes tensors by position.

    Shape:
        int64 (batch, tokens) to logits (batch, tokens, vocabulary).
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model = model
        self.cache = StaticCache(cast(Any, model.config), max_cache_len=length)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens, past_key_values=self.cache)
        return cast(Tensor, out.logits)


def step_of_config(
    folder: str | Path, *, batch: int, context: int, prefill: bool = False
) -> tuple[ModelStep, list[Spec]]:
    """A step of a folder's model, on meta, with lq_graph's attention and cache; and its inputs.

    Args:
        folder: with a config.json, or that file.
        batch: sequences.
        context: tokens that the cache has room for.
        prefill: whether the step takes so many tokens of each sequence; else it takes one.

    Raises:
        LinearQuantValueError: transformers cannot make the model.
    """
    from . import transformers as _  # noqa: F401  (registers the attention)

    model = empty_model(folder).eval()
    if next(model.parameters()).dtype == torch.float32:
        model.bfloat16()
    cast(Any, model).set_attn_implementation("lq_graph")
    tokens = Spec(torch.int64, (batch, context if prefill else 1))
    return ModelStep(model, context), [tokens]
