"""The formats of checkpoints, and the format of a folder."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path

from torch import nn

from .base import Contents, Format
from .compressed_config import config_in
from .compressed_tensors import COMPRESSED_TENSORS
from .files import CONFIG, list_folder, read_json, refuse, shown
from .msmodelslim import DESCRIPTION, MSMODELSLIM
from .msmodelslim_words import Prefer
from .names import ModelNames

__all__ = ["FORMATS", "contents_of", "words_of"]

FORMATS: dict[str, Format] = {format.name: format for format in (MSMODELSLIM, COMPRESSED_TENSORS)}


def contents_of(
    folder: Path,
    keys: Iterable[str],
    model: nn.Module | None = None,
    *,
    prefer: Prefer = "dynamic",
    left_out: Container[str] = (),
) -> Contents:
    """What the JSON of a folder says about its tensors.

    Args:
        folder: with the JSON.
        keys: names of the tensors in its files.
        model: the model to load into, which may have other names; None if it is not known.
        prefer: how a layer that has the tensors of both kinds is loaded.
        left_out: tensors of the files that are not in `keys`.

    Raises:
        CheckpointError: the JSON of no format or of both, or of a scheme that cannot be loaded.
    """
    names = list_folder(folder)
    file = folder / CONFIG
    config = config_in(read_json(file), file) if CONFIG in names else None
    known = None if model is None else ModelNames(model)
    if (found := MSMODELSLIM.description(folder, names)) is not None:
        about, description = found
        if config is not None and config.is_ours:
            refuse(
                file,
                config.place,
                f"none beside {about.name}",
                COMPRESSED_TENSORS.name,
                "remove the one that is not of these weights",
            )
        keys = list(keys)
        said = {key: word for key, word in description.items() if key not in left_out}
        contents = MSMODELSLIM.contents(about, said, dict.fromkeys(keys), prefer)
        return contents if known is None else _renamed(contents, keys, known)
    if config is None:
        refuse(
            folder,
            None,
            f"{DESCRIPTION}*.json (msmodelslim) or config.json with quantization_config "
            "(compressed-tensors)",
            "neither",
            "pass the folder that the tool wrote, with its JSON files; quantize a float model with "
            "lq_graph.quantize",
        )
    return COMPRESSED_TENSORS.contents(file, config, keys, known)


def words_of(folder: Path) -> tuple[str, str]:
    """The name of a folder's format, and what its JSON says of the whole model, in its own words;
    empty for nothing.

    Raises:
        CheckpointError: JSON that cannot be read.
    """
    names = list_folder(folder)
    if (found := MSMODELSLIM.description(folder, names)) is not None:
        word = found[1].get("model_quant_type")
        return MSMODELSLIM.name, shown(word, 60) if isinstance(word, str) else ""
    about = read_json(folder / CONFIG) if CONFIG in names else {}
    config = config_in(about, folder / CONFIG)
    given = config.value if config is not None and isinstance(config.value, dict) else {}
    words = [given[key] for key in ("format", "version") if isinstance(given.get(key), str)]
    return shown(given.get("quant_method", ""), 60), shown(" ".join(words), 60)


def _renamed(contents: Contents, keys: list[str], model: ModelNames) -> Contents:
    """The contents with the names that the tensors have in the model."""
    own = [contents.names.get(key, key) for key in keys]
    new_names = model.new_names(contents.kinds, own)
    if not new_names.modules:
        return contents
    new = new_names.tensors(own)
    names = {key: new.get(name, name) for key, name in zip(keys, own, strict=True)}
    return replace(
        contents,
        kinds={new_names.module(name): kind for name, kind in contents.kinds.items()},
        names={key: name for key, name in names.items() if name != key},
        left_out={new.get(key, key): why for key, why in contents.left_out.items()},
        must_be={new.get(key, key): wanted for key, wanted in contents.must_be.items()},
    )
