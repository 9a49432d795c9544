"""The formats of checkpoints, and the format of a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .base import Contents, Format
from .compressed_tensors import COMPRESSED_TENSORS
from .files import CONFIG, list_folder, read_json, refuse
from .msmodelslim import DESCRIPTION, MSMODELSLIM
from .msmodelslim_words import Prefer

__all__ = ["FORMATS", "contents_of"]

FORMATS: dict[str, Format] = {format.name: format for format in (MSMODELSLIM, COMPRESSED_TENSORS)}


def contents_of(folder: Path, keys: Iterable[str], prefer: Prefer = "dynamic") -> Contents:
    """What the JSON of a folder says about its tensors.

    Args:
        folder: with the JSON.
        keys: names of the tensors in its files.
        prefer: how a layer that has the tensors of both kinds is loaded.

    Raises:
        CheckpointError: the JSON of no format or of both, or of a scheme that is not W8A8.
    """
    names = list_folder(folder)
    config = folder / CONFIG
    about = read_json(config) if CONFIG in names else {}
    quantization = about.get("quantization_config")
    if (found := MSMODELSLIM.description(folder, names)) is not None:
        file, description = found
        if COMPRESSED_TENSORS.is_method_of(quantization):
            refuse(
                config,
                "quantization_config",
                f"none beside {file.name}",
                COMPRESSED_TENSORS.name,
                "remove the one that is not of these weights",
            )
        return MSMODELSLIM.contents(file, description, set(keys), prefer)
    if "quantization_config" not in about:
        refuse(
            folder,
            None,
            f"{DESCRIPTION}*.json (msmodelslim) or config.json with quantization_config "
            "(compressed-tensors)",
            "neither",
        )
    return COMPRESSED_TENSORS.contents(config, quantization, keys)
