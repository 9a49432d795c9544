"""Where msmodelslim's description and the weights do not agree as other programs need it.

vllm-ascend looks up `<layer>.weight` in the description for every linear layer that it makes, for a
fused one (qkv_proj) those of its parts, and ends with KeyError if the key is not there.

Source: vllm-project/vllm-ascend, vllm_ascend/quantization/modelslim_config.py
(is_layer_skipped_ascend, get_linear_quant_type, maybe_update_config).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .choose import some
from .files import CONFIG, list_folder, read_json, shown
from .msmodelslim import DESCRIPTION, MSMODELSLIM

__all__ = ["notes_of"]

_FILE = f"{DESCRIPTION}.json"  # the one name that vllm-ascend reads
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def notes_of(folder: Path, keys: Collection[str]) -> Iterator[str]:
    """What does not agree, a sentence each.

    Args:
        folder: with the JSON.
        keys: names of the tensors of two dims in its files.
    """
    names = list_folder(folder)
    if (found := MSMODELSLIM.description(folder, names)) is None:
        return
    file, words = found
    if _FILE not in names:
        yield f"vllm-ascend reads {_FILE} and not {shown(file.name)}: copy it to that name"
    config = read_json(folder / CONFIG) if CONFIG in names else {}
    if isinstance(first := config.get("quantization_config"), dict) and first:
        yield (
            f"{CONFIG} has quantization_config, which vllm-ascend reads instead of {file.name}: "
            "remove it" + ("" if words.items() <= first.items() else "; it has other entries")
        )
    yield from _not_described(file, words, keys)
    yield from _mixed(words)


def _not_described(file: Path, words: Mapping[str, Any], keys: Collection[str]) -> Iterator[str]:
    """Weights of the files that the description lacks, and the other way round."""
    missing = [key for key in keys if key.endswith(".weight") and key not in words]
    if not missing:
        return
    example = missing[0]
    text = (
        f"{file.name} has no entry for {len(missing):,} of the weights, {some(missing)}: where "
        f"vllm-ascend makes such a layer, it ends with KeyError: {shown(repr(example))}"
    )
    end = ".".join(example.split(".")[-3:])
    alike = (key for key in words if key.endswith(end) or example.endswith(f".{key}"))
    near = next((key for key in alike if key not in keys), "")
    yield text + (f". It has {shown(near)}: the beginning of the names differs" if near else "")


def _mixed(words: Mapping[str, Any]) -> Iterator[str]:
    """Layers that vllm-ascend joins and that have different words."""
    for parts in _FUSED:
        end = f".{parts[0]}.weight"
        for key in words:
            if key.endswith(end):
                block = key.removesuffix(end)
                said = {str(words.get(f"{block}.{part}.weight", words[key])) for part in parts}
                if len(said) > 1:
                    yield (
                        f"{', '.join(parts)} of {shown(block)} are {' and '.join(sorted(said))}: "
                        "vllm-ascend joins them and takes only one word for all"
                    )
                    break
