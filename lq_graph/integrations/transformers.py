"""Attention and cache for models of transformers on an NPU.

    from lq_graph.integrations.transformers import StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lq_graph").npu()
    cache = StaticCache(model.config, max_cache_len=1024)
    model.generate(**inputs, past_key_values=cache)

The import registers "lq_graph" with transformers.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import attention, attention_mask
from .cache import StaticCache

__all__ = ["NAME", "StaticCache", "register"]

NAME = "lq_graph"  # of attn_implementation


def register() -> None:
    """Let models take attn_implementation="lq_graph". The import of this module has called it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


register()
