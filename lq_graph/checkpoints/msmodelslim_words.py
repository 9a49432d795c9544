"""The words of msmodelslim's description: what each of them becomes.

The description has a word for each tensor; the word of a layer's weight is that of the layer.

Source: msmodelslim 26.1 (core/quant_service/modelslim_v1/save/ascendv1.py and
pytorch/llm_ptq/llm_ptq_tools), and vllm-project/vllm-ascend (vllm_ascend/quantization).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..modules.supported import A4W4_DYNAMIC, A8W8_DYNAMIC, A8W8_STATIC, LayerKind
from .files import refuse

__all__ = [
    "MIX",
    "NO_EFFECT",
    "STATIC_ONLY",
    "Prefer",
    "check_inputs",
    "kind_of",
    "name_in_model",
]

Prefer = Literal["dynamic", "static"]
MIX = "W8A8_MIX"  # the tensors of a static layer and of a dynamic one
# the tensors that a dynamic layer of MIX does not use
STATIC_ONLY = ("input_scale", "input_offset", "deq_scale", "quant_bias")
_KINDS: dict[object, LayerKind | None] = {
    "W8A8": A8W8_STATIC,
    "W8A8_DYNAMIC": A8W8_DYNAMIC,
    "W4A4_DYNAMIC": A4W4_DYNAMIC,
    "FLOAT": None,
    # sparse weights, which are stored like others
    "W8A8S": A8W8_STATIC,
    "W16A16S": None,
}
# tensors of the attention; the layers do not depend on them
NO_EFFECT = {
    "C8": "it is for an int8 KV cache; the model's attention keeps its float cache",
    "FAQuant": "it is for int8 attention; the model's attention computes in float",
}
# what a word or a part of it means, and what to do; the first that fits
_QUANTIZE_AGAIN = "quantize again as W8A8, W8A8_DYNAMIC or W4A4_DYNAMIC, or use vllm-ascend"
_REFUSED = {
    "FLATQUANT": "a transform of each layer's input, by the matrices left_trans and right_trans",
    "SVD": "a float product beside the quantized one, of svd_lowrank_l1 and svd_lowrank_l2",
    "MXFP": "float8 or float4 weights with a scale for every 32 values",
    "FP8": "float8 weights",
    "TIMESTEP": "scales for each time step of a diffusion model",
    "W8A8SC": "compressed weights",
    "W16A16SC": "compressed weights",
    "W4A8": "int4 weights with int8 inputs",
    "W8A16": "int8 weights with float inputs",
    "W4A16": "int4 weights with float inputs",
    "NF4": "weights in NormalFloat4 with float inputs",
}


class _Input(NamedTuple):
    """How a tensor says that a layer's input is changed before it is quantized."""

    end: str  # of its name
    what: str
    todo: str


_UNCHANGED = "layers whose input is not changed"
_ROTATED = "an input that is rotated while the model runs (QuaRot)"
_NO_ROTATION = "quantize again with online: false (of quarot or adapt_rotation)"
_INPUTS = (
    _Input(".heads_rotation", _ROTATED, _NO_ROTATION),
    _Input(".kronecker_rotation_m", _ROTATED, _NO_ROTATION),
    _Input(
        ".div.mul_scale",
        "an input that is scaled while the model runs",
        "quantize again with a smoothing that changes only weights (no non-fusion subgraphs)",
    ),
)


def kind_of(file: Path, key: str, word: object, prefer: Prefer) -> LayerKind | None:
    """How a layer is quantized; None if it is float.

    Args:
        file: the description.
        key: name of the layer's weight.
        word: its word.
        prefer: how a layer that has the tensors of both kinds is loaded.

    Raises:
        CheckpointError: LinearQuant cannot run a layer of that word.
    """
    if word == MIX:
        return A8W8_STATIC if prefer == "static" else A8W8_DYNAMIC
    if not isinstance(word, str) or word not in _KINDS:
        found = repr(word)[:80]
        what = next((what for part, what in _REFUSED.items() if part in found), None)
        found += f": {what}, which LinearQuant does not have" if what else ""
        known = "W8A8, W8A8_DYNAMIC, W8A8_MIX, W8A8S, W4A4_DYNAMIC or FLOAT"
        refuse(file, key, known, found, _QUANTIZE_AGAIN)
    return _KINDS[word]


def check_inputs(file: Path, description: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse layers whose input is changed while the model runs.

    Args:
        file: the description.
        description: what is in it.
        keys: names of the tensors in the files.
    """
    for key in keys:
        for end, what, todo in _INPUTS:
            if key.endswith(end):
                refuse(file, key, _UNCHANGED, what, todo)
    rotated = _dict(_dict(description.get("metadata")).get("quarot"))
    for kind, about in rotated.items():  # also if the matrices are ignored
        if layers := _dict(about).get("layers"):
            found = f"{_ROTATED}: {kind} of {layers}"
            refuse(file, "metadata.quarot", _UNCHANGED, found, _NO_ROTATION)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def name_in_model(key: str) -> str:
    """The name in the model of a tensor in the files.

    Older versions save a norm with a bias as `norm.module.weight` and `norm.module.bias`, beside
    `norm.weight` and `norm.bias` or instead of them.
    """
    norm, _, part = key.rpartition(".module.")
    if part in ("weight", "bias") and "norm" in norm.rpartition(".")[2].lower():
        return f"{norm}.{part}"
    return key
