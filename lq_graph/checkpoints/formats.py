"""The formats of W8A8 checkpoints, and the format of a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .base import Format
from .compressed_tensors import COMPRESSED_TENSORS
from .files import CONFIG, list_folder, read_json, refuse
from .msmodelslim import DESCRIPTION, MSMODELSLIM

__all__ = ["FORMATS", "format_and_schemes"]

FORMATS: dict[str, Format] = {format.name: format for format in (MSMODELSLIM, COMPRESSED_TENSORS)}


def format_and_schemes(folder: Path, keys: Iterable[str]) -> tuple[Format, dict[str, bool]]:
    """The format of a folder, and for each quantized layer whether it is dynamic.

    Args:
        folder: with the JSON.
        keys: names of the tensors in its files.

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
        return MSMODELSLIM, dict(MSMODELSLIM.schemes(file, description))
    if "quantization_config" not in about:
        refuse(
            folder,
            None,
            f"{DESCRIPTION}*.json (msmodelslim) or config.json with quantization_config "
            "(compressed-tensors)",
            "neither",
        )
    return COMPRESSED_TENSORS, dict(COMPRESSED_TENSORS.schemes(config, quantization, keys))
