"""The small files of a checkpoint that save_checkpoint writes beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .about_model import MODEL_TYPE
from .base import Format
from .compressed_config import CONFIG_KEY
from .files import CONFIG, CheckpointError, read_json, shown

if TYPE_CHECKING:
    from .write import Saved

__all__ = ["small_files"]


def small_files(
    folder: Path, names: Iterable[str], format: Format, saved: Saved
) -> dict[str, bytes]:
    """The contents of the files that are new or change, by name. The one that says what the weights
    are comes last.

    Args:
        folder: of the checkpoint.
        names: of the files in it.
        format: of the checkpoint.
        saved: what it holds.

    Raises:
        CheckpointError: a file that is there is of another model.
    """
    found = {}
    for name, contents in saved.beside.items():
        if name not in names:
            found[name] = contents
        elif (folder / name).read_bytes() != contents and name not in saved.may_differ:
            raise CheckpointError(
                f"save_checkpoint: {shown(folder / name, 4096)} is another file than that of "
                "copy_from. What to do: remove it, or leave copy_from out to keep it."
            )
    old = read_json(folder / CONFIG) if CONFIG in names else {}
    config = _config(folder, old, saved.config)
    described = format.described(saved.keys, saved.layers, saved.floats)
    if format.json_file == CONFIG:
        config[CONFIG_KEY] = described
    elif CONFIG_KEY in config:
        raise CheckpointError(
            f"save_checkpoint: {shown(folder / CONFIG, 4096)} has {CONFIG_KEY}, which is not "
            f"that of an {format.name} checkpoint. What to do: remove the key, or save as "
            "compressed-tensors."
        )
    if config != old:
        found[CONFIG] = json.dumps(config, indent=2).encode()
    if format.json_file != CONFIG:
        found[format.json_file] = json.dumps(described, indent=2).encode()
    return found


def _config(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The contents of config.json: those that are there, or the model's."""
    if MODEL_TYPE not in old:
        return {**new, **old}
    if new.get(MODEL_TYPE, old[MODEL_TYPE]) != old[MODEL_TYPE]:
        raise CheckpointError(
            f"save_checkpoint: {shown(folder / CONFIG, 4096)} is of a {shown(old[MODEL_TYPE])}, "
            f"and the model is a {shown(new[MODEL_TYPE])}. What to do: save into another folder, "
            "or remove that file."
        )
    return dict(old)
