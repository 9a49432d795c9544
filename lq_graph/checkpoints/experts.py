"""Experts that have tensors of their own in the files, and are parts of one tensor in the model.

Since version 5, transformers keeps all experts of a block in one parameter of three dims. Files
have the layers of each expert, and LinearQuant is one layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .files import refuse

__all__ = ["check_experts"]

_EXPERT = re.compile(r"(.+)\.experts\.[0-9]+\.")
_MAKE_EACH = (
    "make the model with a version of transformers that has an nn.Linear for each expert "
    "(4.57, say), or put such modules of the files' names in the place of that one"
)


def check_experts(file: Path, name: str, tensors: Mapping[str, object]) -> None:
    """Refuse a layer or a tensor of the files that the model holds in one tensor with others.

    Args:
        file: where it is.
        name: of the layer or tensor, which the model does not have.
        tensors: of the model, by name.
    """
    if not (found := _EXPERT.match(name)):
        return
    block = f"{found[1]}."
    while block and not any(key.startswith(block) for key in tensors):
        # the block may have another name in the model
        block = block[:-1].rpartition(".")[0]
        block = f"{block}." if block else ""
    for key, tensor in tensors.items():
        if key.startswith(block) and isinstance(tensor, Tensor) and tensor.dim() == 3:
            what = f"all experts in one tensor, {key} {tuple(tensor.shape)}"
            refuse(file, name, "an nn.Linear for each expert in the model", what, _MAKE_EACH)
