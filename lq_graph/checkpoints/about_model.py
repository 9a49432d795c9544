"""What a folder holds of a model besides its weights: configuration, tokenizer, code.

A model of transformers has these in `config` and `generation_config`. They are known here by the
methods they have, without an import.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..modules.quantized_linear import QuantizedLinear
from ..rules.tables import dtype_name
from .compressed_config import CONFIG_KEY
from .files import CONFIG, INDEX, CheckpointError, expanded, list_folder, read_json, shown

__all__ = ["GENERATION", "MODEL_TYPE", "config_of", "files_beside", "folder_to_copy"]

GENERATION = "generation_config.json"
MODEL_TYPE = "model_type"  # of transformers
# of files that a folder has beside weights: settings, tokenizers, chat templates, code
_ENDS = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")
# JSON about weights, which is not copied
_ABOUT_WEIGHTS = ("quant_model_description", "quantize_config", "quant_config")


def config_of(model: nn.Module, copy_from: Path | None) -> dict[str, Any]:
    """The contents of config.json without the quantization: of the model if it has one, else of
    the folder; {} for none.

    Raises:
        CheckpointError: the folder is that of another kind of model.
    """
    own = found = _json_of(getattr(model, "config", None))
    if copy_from is not None and CONFIG in list_folder(copy_from):
        theirs = read_json(copy_from / CONFIG)
        found = theirs if own is None else own
        mine, other = found.get(MODEL_TYPE), theirs.get(MODEL_TYPE)
        if mine != other:
            raise CheckpointError(
                f"save_checkpoint: copy_from is {shown(copy_from, 4096)}, the folder of a "
                f"{shown(other)}, and the model is a {shown(mine)}. What to do: pass the folder of "
                "the float model, or leave copy_from out."
            )
    if found is None:
        return {}
    for config in (found, found.get("text_config")):
        if isinstance(config, dict):
            config.pop(CONFIG_KEY, None)
    if own is not None:
        found["architectures"] = [type(model).__name__]
        key = "torch_dtype" if "torch_dtype" in found else "dtype"
        if (dtype := _float_dtype(model)) is not None:
            found[key] = dtype_name(dtype)
    return found


def _json_of(config: object) -> dict[str, Any] | None:
    """A configuration as JSON; None if it is not one of transformers."""
    text = getattr(config, "to_json_string", None)
    if text is None:
        return None
    found = json.loads(text())
    return found if isinstance(found, dict) else None


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    """The float dtype that a model computes in."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if layers:
        return layers[0].input_dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def files_beside(model: nn.Module, copy_from: Path | None) -> dict[str, bytes]:
    """The contents of the other files: the settings of the model's generation, and the tokenizer's
    files and code from a folder.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in list_folder(copy_from) if copy_from is not None else []:
        about_weights = name.startswith(_ABOUT_WEIGHTS) or name.endswith((INDEX, ".index.json"))
        if name == CONFIG or name.startswith(".") or about_weights or not name.endswith(_ENDS):
            continue
        assert copy_from is not None
        if (copy_from / name).is_file():
            found[name] = (copy_from / name).read_bytes()
    generation = _json_of(getattr(model, "generation_config", None))
    if generation is not None:
        found.setdefault(GENERATION, json.dumps(generation, indent=2).encode())
    return found


def folder_to_copy(copy_from: str | os.PathLike[str] | None) -> Path | None:
    """The folder whose files are copied.

    Raises:
        CheckpointError: it is no folder.
    """
    if copy_from is None:
        return None
    path = expanded(Path(copy_from))
    if not path.is_dir():
        raise CheckpointError(
            f"save_checkpoint: copy_from is {shown(path, 4096)}, which is no folder. What to do: "
            "pass the folder of the float model, or leave copy_from out."
        )
    return path
