"""LoRA adapters of peft on QuantizedLinear layers.

    from peft import PeftConfig, PeftModel
    from lq_graph.integrations.peft import on_quantized

    config = on_quantized(PeftConfig.from_pretrained(folder))
    model = PeftModel.from_pretrained(model, folder, config=config)

peft knows no class that it has not named; a LoraConfig can name more.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor

from ..errors import LinearQuantValueError
from ..modules.quantized_linear import QuantizedLinear

__all__ = ["LoraQuantizedLinear", "on_quantized"]

_PLAIN = (True, False, "gaussian", "eva")  # of init_lora_weights: they leave the layer as it is


def on_quantized(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig put adapters on QuantizedLinear layers; returns it.

    The layer computes what it computed, and the adapter's product is added, as on an nn.Linear.
    This is for adapters that were trained on the float model. target_modules names the layers: for
    peft, "all-linear" means nn.Linear.

    Args:
        config: of peft.
    """
    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config


class LoraQuantizedLinear(lora.Linear):
    """A QuantizedLinear with adapters; what peft puts in its place.

    Raises:
        LinearQuantValueError: the config asks for a kind of LoRA that reads or changes the weight
            of the layer; the adapter is to be merged into it; or adapters before it are trained.
    """

    def __init__(self, base_layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        init = getattr(config, "init_lora_weights", kwargs.get("init_lora_weights", True))
        if init not in _PLAIN:
            raise _refusal(f"init_lora_weights={init!r} changes the weight of the layer", "True")
        super().__init__(base_layer, adapter_name, *args, **kwargs)

    def resolve_lora_variant(self, *args: Any, **kwargs: Any) -> Any:
        """None: plain LoRA."""
        variant = super().resolve_lora_variant(*args, **kwargs)
        if variant is not None:
            raise _refusal(f"{type(variant).__name__} reads the weight of the layer", "plain LoRA")
        return variant

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, and the adapters'."""
        if self.training and torch.is_grad_enabled() and x.requires_grad:
            raise _refusal(
                "no gradient passes through a quantized layer, so the adapters before it cannot be "
                "trained",
                "the float model for training, or model.eval()",
            )
        out: Tensor = super().forward(x, *args, **kwargs)
        return out

    def merge(self, *_: Any, **__: Any) -> None:
        """Refused."""
        raise _refusal("an adapter cannot be merged into int8 or int4 values", "the float model")

    def unmerge(self) -> None:
        """Nothing is merged."""


def _refusal(why: str, todo: str) -> LinearQuantValueError:
    return LinearQuantValueError(f"LoRA on a QuantizedLinear: {why}. What to do: use {todo}.")
