"""Tensors divided over several files of weights, as transformers divides them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from .files import INDEX, CheckpointError

__all__ = ["bytes_of_size", "index_of", "is_shard", "shards_of"]

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**i for i, letter in enumerate("KMGT", 1)},
}


def bytes_of_size(size: int | str) -> int:
    """A size in bytes, of a number or a text such as "5GB" or "500MiB".

    Raises:
        CheckpointError: it is neither, or below 1.
    """
    if isinstance(size, str) and (found := re.fullmatch(r"\s*(\d+)\s*([A-Za-z]+)\s*", size)):
        unit = _UNITS.get(found[2].upper())
        count = int(found[1]) * unit if unit else 0
    else:
        count = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if count < 1:
        raise CheckpointError(
            f"save_checkpoint: max_shard_size is {size!r}; it is a number of bytes above 0. What "
            'to do: pass a text such as "5GB" or "500MB", or a number.'
        )
    return count


def shards_of(tensors: Mapping[str, Tensor], size: int, stem: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, by the file's name.

    Args:
        tensors: in the order in which files are filled.
        size: bytes of a file's tensors at most, except for a tensor that is larger alone.
        stem: how the names of the files begin.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        count = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + count > size:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += count
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": s for i, s in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """The index of several files."""
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    return json.dumps(
        {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors)},
            "weight_map": {key: name for name, shard in shards.items() for key in sorted(shard)},
        },
        indent=2,
    ).encode()


def is_shard(name: str, stem: str) -> bool:
    """Whether a file of this name is one of weights, or their index, as `shards_of` names them."""
    return name == f"{stem}{INDEX}" or bool(
        re.fullmatch(re.escape(stem) + r"(-\d{5,}-of-\d{5,})?\.safetensors", name)
    )
