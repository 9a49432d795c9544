"""What of the files goes where in the model, from the JSON and the headers: no tensor is read.

load_checkpoint and inspect ask the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from ..rules.tables import dtype_name
from .base import Contents
from .biases import AddedBiases
from .check_layer import check_headers
from .choose import NamePattern, ignored_tensors, unneeded_tensors
from .files import CheckpointError, Refusals
from .folder import CheckpointFiles, is_file
from .formats import contents_of
from .layers import LayerToLoad, layers_to_load
from .msmodelslim_words import Prefer
from .state import RestOfModel, check_rest

__all__ = ["Found", "check_options", "find"]


def check_options(function: str, dtype: object, prefer: object) -> None:
    """Refuse options that do not fit."""
    if dtype not in (None, torch.float16, torch.bfloat16):
        given = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise CheckpointError(
            f"{function}: dtype is {given}. What to do: pass torch.float16 or torch.bfloat16, or "
            "leave it out."
        )
    if prefer not in get_args(Prefer):
        raise CheckpointError(
            f"{function}: prefer is {prefer!r}. What to do: pass 'dynamic' or 'static'."
        )


@dataclass(frozen=True)
class Found:
    """What of the files goes where.

    Attributes:
        contents: what the JSON says.
        layers: the quantized layers, each with its module.
        rest_of_model: the tensors of the model outside them.
        biases: biases that float modules of the model get.
        rest: keys of the files that are loaded by name.
        left_out: tensors of the files that are not loaded, with the reason.
        bytes_left_out: their sizes in the files.
    """

    contents: Contents
    layers: list[LayerToLoad]
    rest_of_model: RestOfModel
    biases: AddedBiases
    rest: Iterable[str]
    left_out: dict[str, str]
    bytes_left_out: dict[str, int]


def find(
    model: nn.Module,
    files: CheckpointFiles,
    dtype: torch.dtype | None,
    ignore: Sequence[NamePattern],
    prefer: Prefer,
    refusals: Refusals,
) -> Found:
    """Find what of the files goes where, and check what headers tell.

    Args:
        model: the model to load into.
        files: of the checkpoint; tensors get their names in the model, ignored ones are forgotten.
        dtype: of the quantized layers; None for the model's.
        ignore: patterns of tensors that are not loaded.
        prefer: how a layer that has the tensors of both kinds is loaded.
        refusals: of layers and tensors.

    Raises:
        CheckpointError: a pattern that cannot be used; JSON that cannot be read.
    """
    left_out = ignored_tensors(ignore, files)
    left_out |= unneeded_tensors(model, [key for key in files if key not in left_out])
    sizes = {key: files.bytes_of(key) for key in left_out}
    files.leave_out(left_out)
    folder = files.path.parent if is_file(files.path) else files.path
    contents = contents_of(folder, files, model, prefer=prefer, left_out=left_out)
    files.check_one_save()
    files.rename(contents.names)
    layers = layers_to_load(model, files, contents, refusals)
    for layer in layers:
        with refusals.each():
            check_headers(layer, dtype)
    rest_of_model = RestOfModel(model, {layer.module for layer in layers})
    used = {key for layer in layers for one in (layer, *layer.twins) for key in one.keys.values()}
    biases = AddedBiases(model, files, contents, refusals)
    no_effect = contents.not_loaded()
    sizes |= {key: files.bytes_of(key) for key in no_effect if key in files}
    left_out |= no_effect
    used |= biases.names | no_effect.keys()
    rest = check_rest(rest_of_model, files, used, left_out, refusals)
    return Found(contents, layers, rest_of_model, biases, rest, left_out, sizes)
