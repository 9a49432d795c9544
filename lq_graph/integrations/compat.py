"""What differs between versions of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import cache_utils
from transformers.quantizers import auto

__all__ = [
    "NO_CACHE",
    "layer_kinds",
    "no_cache",
    "queries_of",
    "register_quantizer",
    "set_cast",
]

NO_CACHE = "dummy"  # a layer that has no cache, or reads another's


def layer_kinds(config: Any) -> list[str]:
    """What transformers' cache has for each layer, by transformers' names."""
    config = config.get_text_config(decoder=True)
    newer = getattr(cache_utils, "get_layer_types_and_kwargs", None)
    if newer is not None:
        return list(newer(config)[0])
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    shared = getattr(config, "num_kv_shared_layers", 0)  # the last ones; older caches end there
    return list(kinds[:-shared] if shared else kinds)


def no_cache() -> Any:
    """The layer of a cache for NO_CACHE."""
    return cache_utils.DummyLayer()


def queries_of(mask_arguments: dict[str, Any]) -> int:
    """The number of queries of a mask; older ones give the positions of the queries."""
    count = mask_arguments.get("q_length")
    return mask_arguments["cache_position"].shape[0] if count is None else int(count)


def register_quantizer(method: str, config: type[Any], quantizer: type[Any]) -> None:
    """Let transformers know a quant_method."""
    auto.register_quantization_config(method)(config)
    auto.register_quantizer(method)(quantizer)


def set_cast(model: Any, dtype: torch.dtype | None) -> None:
    """Set the dtype to which transformers 4 casts every float of a quantized model that it loads,
    float32 scales too; None for no cast. Newer ones cast to the dtype of the model's parameter."""
    if hasattr(model.config, "_pre_quantization_dtype"):
        model.config._pre_quantization_dtype = dtype
