"""Experts that are layers of their own in the files, and parts of one tensor in the model.

Since version 5, transformers keeps all experts of a block in one parameter of three dims. Files
have the layers of each expert, and LinearQuant is one layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

__all__ = ["MAKE_EACH", "fused_experts"]

_EXPERT = re.compile(r"(.+)\.experts\.\d+\.")
MAKE_EACH = (
    "make the model with a version of transformers that has an nn.Linear for each expert "
    "(4.57, say), or put such modules of the files' names in the place of that one"
)


def fused_experts(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The parameter of the model that holds a layer of the files beside other experts.

    Args:
        name: of a layer of the files that the model does not have.
        modules: of the model, by name.

    Returns:
        its name and shape; empty if the layer is not one of experts, or the model has none.
    """
    if not (found := _EXPERT.match(name)):
        return ""
    block = found[1]
    while block and block not in modules:  # the block may have another name in the model
        block = block.rpartition(".")[0]
    for inner, module in modules[block].named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                where = ".".join(filter(None, (block, inner, key)))
                return f"{where} {tuple(parameter.shape)}"
    return ""
