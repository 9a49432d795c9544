"""The model that a config.json describes, without memory: on meta."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import transformers
from torch import nn

from ..checkpoints.files import expanded
from ..errors import LinearQuantValueError

__all__ = ["empty_model"]


def empty_model(folder: str | Path) -> nn.Module:
    """The model of a folder's config.json, on meta. Nothing is read but the config.

    Args:
        folder: on this machine.

    Raises:
        LinearQuantValueError: transformers cannot make it.
    """
    place = expanded(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(str(place), local_files_only=True)
        names = config.architectures or []
        kind = next((getattr(transformers, name, None) for name in names), None)
        with torch.device("meta"):
            if kind is not None:
                return cast(nn.Module, kind._from_config(config))
            return cast(nn.Module, transformers.AutoModelForCausalLM.from_config(config))
    except Exception as error:  # a config may have anything
        first = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        todo = "make the model in Python, and call lq_graph.inspect(folder, model)"
        if isinstance(error, OSError | ImportError) and ".so" in first:  # of torch_npu
            todo = "if there is no CANN, begin with python -m cann_host -m lq_graph inspect"
        raise LinearQuantValueError(
            f"{place}: transformers cannot make the model of its config.json: {first}. What to do: "
            f"{todo}."
        ) from None
