"""Attention and cache for models of transformers on an NPU, and quantized models that transformers
loads and saves.

    from lq_graph.integrations.transformers import StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lq_graph").npu()
    cache = StaticCache(model.config, max_cache_len=1024)
    model.generate(**inputs, past_key_values=cache)

The import registers "lq_graph" with transformers, as attention and as quantization method. So
from_pretrained loads what save_pretrained wrote for a quantized model.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from . import quantizer
from .attention import attention, attention_mask
from .cache import StaticCache
from .folders import from_pretrained
from .quantizer import attach

__all__ = ["NAME", "StaticCache", "attach", "from_pretrained", "register"]

NAME = "lq_graph"  # of attn_implementation


def register() -> None:
    """Let models take attn_implementation="lq_graph" and quantization_config=lq_graph.Config(...).
    The import of this module has called it."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    quantizer.register()


register()
