"""save_checkpoint: writes a model with QuantizedLinear layers as a W8A8 checkpoint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels import unpack_scale
from ..modules.quantized_linear import QuantizedLinear
from ..modules.split import SPLIT
from ..modules.transaction import keeps_grad_mode, uninterrupted
from ..rules.tables import dtype_name
from .about_model import GENERATION, config_of, files_beside, folder_to_copy
from .base import Format, State
from .biases import norm_with_bias
from .files import DTYPES, MAX_NAME, CheckpointError, check_model, expanded, shown
from .formats import FORMATS
from .shards import bytes_of_size
from .tensors import fits, memory_of
from .write import Saved, write_checkpoint

__all__ = ["save_checkpoint"]

_ROUTER = re.compile("Router|Gating|Gate(?![a-z])")  # as compressed-tensors recognizes them


@keeps_grad_mode
def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    format: str = "msmodelslim",
    *,
    copy_from: str | Path | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model with QuantizedLinear layers as a checkpoint that `load_checkpoint` reads, and
    that transformers, vllm and vllm-ascend read as far as they run its scheme.

    Both formats can hold every layer that `quantize` makes with float output, and load_checkpoint
    reads it back bit for bit. A static layer from elsewhere is saved if the format restores it bit
    for bit. Tensors that share memory are written once; a model that ties them loads them as one.

    A model of transformers is saved with its config.json and generation_config.json. In a
    config.json that is there only quantization_config changes.

    Atomic: if a step fails, or on Ctrl-C, the folder is unchanged. The files are complete under
    temporary names before the first one is put in place. A load_checkpoint in another process gets
    the old checkpoint or the new one at any time; another program does too, or finds no checkpoint
    for a moment.

    Args:
        model: on CPU or NPU.
        folder: created if it does not exist; ~ is the home folder. It may hold a checkpoint of the
            same format, whose weights are replaced, but no other weights.
        format: "msmodelslim" or "compressed-tensors".
        copy_from: the folder of the float model, or any other: its tokenizer, settings, chat
            templates and code (json, txt, jinja, model, tiktoken, py) are copied, and no weights. A
            file that is there already is not replaced.
        max_shard_size: bytes of a file of weights at most, as a number or a text such as "5GB";
            a model of more gets several files and an index.

    Warns:
        UserWarning: the model has no QuantizedLinear.

    Raises:
        CheckpointError: another format; a layer that the format cannot hold (a static layer whose
            tensors would not restore it, int8 output, split over devices); a tensor on meta
            or of a kind that safetensors cannot hold; a folder with other weights, or into which
            another process saves; an error of the file system.

    Source: vllm-project/vllm-ascend for msmodelslim's format, vllm-project/compressed-tensors for
    the other.
    """
    if format not in FORMATS:
        raise CheckpointError(
            f"save_checkpoint: format is {format!r}; allowed are "
            f"{' and '.join(map(repr, FORMATS))}. What to do: pass one of these."
        )
    check_model("save_checkpoint", model)
    with torch.no_grad():
        try:
            size, source = bytes_of_size(max_shard_size), folder_to_copy(copy_from)
            saved = _contents(model, FORMATS[format], source, size)
            if not saved.layers:
                warnings.warn(
                    "save_checkpoint: the model has no QuantizedLinear; the checkpoint holds its "
                    "float tensors only. What to do: lq_graph.quantize it first.",
                    stacklevel=3,
                )
            with uninterrupted() as pause:
                write_checkpoint(expanded(folder), FORMATS[format], saved, pause)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            place = getattr(error, "filename", None) or folder
            what = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"save_checkpoint: {shown(place, 4096)}: {what}. The folder is unchanged. What to "
                "do: make room or give the right to write there, or save into another folder."
            ) from error


def _contents(model: nn.Module, format: Format, copy_from: Path | None, shard_size: int) -> Saved:
    """What a checkpoint of a model holds, tied tensors once."""
    if not format.adds_biases and (name := norm_with_bias(model)):
        raise CheckpointError(
            f"save_checkpoint: {name} has a bias, which its class does not have, and readers of "
            f"{format.name} would leave it out. What to do: save it as msmodelslim."
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    states = {}
    for name, layer in layers.items():
        _check_layer(name, layer)
        states[name] = layer.state_dict()
        for key, tensor in states[name].items():
            _check_tensor(f"{name}.{key}", tensor)
        _check_scales(name, layer, states[name])
    tensors = {
        f"{name}.{part}": tensor
        for name, parts in _parts(layers, states, format).items()
        for part, tensor in parts.items()
    }
    # a layer may be under several names
    prefixes = tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
    )
    others = []
    for key, value in model.state_dict().items():
        if not isinstance(key, str) or not key.startswith(prefixes):
            _check_tensor(key, value)
            tensors[key] = value
            others.append(key)
    return Saved(
        _once(tensors, [f"{name}.weight" for name in layers], _tied(model, others)),
        list(tensors),
        layers,
        _floats(model, layers),
        config_of(model, copy_from),
        files_beside(model, copy_from),
        frozenset({GENERATION}),
        shard_size,
    )


def _tied(model: nn.Module, keys: list[str]) -> list[str]:
    """Names of tensors of which those that share memory are written once, under the first name.

    A model of transformers says which of its tensors it ties to others; these are the last. It
    would not find another one that is left out.
    """
    declared = getattr(model, "all_tied_weights_keys", None)
    if isinstance(declared, dict):
        return [key for key in keys if key in {*declared.values()}] + [
            key for key in keys if key in declared
        ]
    patterns = getattr(model, "_tied_weights_keys", None) or ()
    return sorted(keys, key=lambda key: any(re.search(pattern, key) for pattern in patterns))


def _floats(model: nn.Module, layers: dict[str, QuantizedLinear]) -> list[str]:
    """Names of the linear layers that stay float. Some readers take the router of experts for one,
    which is another class in transformers."""
    inside = tuple(f"{name}." for name in layers)
    return [
        name
        for name, module in model.named_modules()
        if not name.startswith(inside)
        and (isinstance(module, nn.Linear) or _ROUTER.search(type(module).__name__))
    ]


def _once(tensors: dict[str, Tensor], *groups: Iterable[str]) -> dict[str, Tensor]:
    """Leave out a tensor that shares its memory with an earlier one of the same group of names."""
    left_out: set[str] = set()
    for group in groups:
        seen: set[object] = set()
        for key in group:
            place = memory_of(tensors[key])
            if place in seen:
                left_out.add(key)
            seen.add(place)
    return {key: tensor for key, tensor in tensors.items() if key not in left_out}


def _check_tensor(key: object, value: object) -> None:
    """Refuse a tensor that safetensors cannot hold."""
    if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_NAME:
        what, todo = "has a name that files cannot hold", "rename it"
    elif key == "__metadata__":
        what, todo = "has a name that the files use themselves", "rename it"
    elif type(value) not in (Tensor, nn.Parameter):
        what, todo = f"is a {type(value).__name__}", "save it by itself, with torch.save"
    else:
        assert isinstance(value, Tensor)
        if value.is_meta:
            what, todo = "is on meta and has no values", "load the model first"
        elif value.layout != torch.strided:
            what, todo = f"has layout {value.layout}", "save its to_dense()"
        elif value.dtype not in DTYPES.values():
            what, todo = f"is {dtype_name(value.dtype)}", "convert it"
        else:
            return
    raise CheckpointError(
        f"save_checkpoint: {shown(key)} {what}, which a file cannot hold. What to do: "
        f"{todo}. Nothing was written."
    )


def _check_layer(name: str, layer: QuantizedLinear) -> None:
    """Refuse a layer that the formats cannot hold. They hold whole layers with int8 weights and
    float outputs."""
    if SPLIT in vars(layer.linear):
        raise CheckpointError(
            f"save_checkpoint: {name} is split over devices, and this process has a part of it. "
            "What to do: save before the model is split, or save model.state_dict(), whose "
            "DTensors torch.distributed.checkpoint writes."
        )
    if not name:
        what, todo = "the model itself is a layer", "put it in an nn.Sequential"
    elif layer.linear.weight.dim() != 2:
        what, todo = f"{name} has a weight of several matrices", "make a layer of each"
    elif layer.linear.output_dtype not in (torch.float16, torch.bfloat16):
        what, todo = f"{name} gives int8", "quantize with A8W8Static(int8_between=False)"
    elif layer.input_dtype != layer.linear.output_dtype:
        given, out = dtype_name(layer.input_dtype), dtype_name(layer.linear.output_dtype)
        what, todo = f"{name} takes {given} and gives {out}", "quantize without output_dtype"
    else:
        return
    raise CheckpointError(
        f"save_checkpoint: {what}, which the formats cannot hold. What to do: {todo}, "
        "or save model.state_dict()."
    )


def _check_scales(name: str, layer: QuantizedLinear, state: State) -> None:
    """Refuse values that load_checkpoint would refuse."""
    for key in ("linear.scale", "input_scale"):
        scale = state.get(key)
        if scale is None:
            continue
        if scale.dtype == torch.int64:
            scale = unpack_scale(scale)[0]
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise CheckpointError(
                f"save_checkpoint: {name}.{key} holds NaN, infinity, 0 or less; a scale is finite "
                "and above 0. What to do: quantize the layer again."
            )
    dtype = layer.input_dtype
    per_weight = "linear.scale" if layer.dynamic else "weight_scale"
    for key, factor in (("linear.bias", 1), ("float_bias", 1), (per_weight, 127)):
        values = state.get(key)
        if values is None or not values.is_floating_point():
            continue
        if not fits(values.double() * factor, dtype):
            raise CheckpointError(
                f"save_checkpoint: {name}.{key} holds NaN, infinity or values that give a bias "
                f"or a weight beyond {dtype_name(dtype)}, the layer's dtype. What to do: quantize "
                "the layer again."
            )


def _parts(
    layers: dict[str, QuantizedLinear], states: dict[str, State], format: Format
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer as a format publishes them.

    Raises:
        CheckpointError: the format cannot hold a static layer, or another format holds it more
            exactly.
    """

    @cache
    def exact_elsewhere() -> str:
        """The name of another format that restores every static layer bit for bit; empty if there
        is none."""
        static = [name for name, layer in layers.items() if not layer.dynamic]
        for other in FORMATS.values():
            if other is not format:
                written = (other.static_parts(layers[name], states[name]) for name in static)
                if not any(parts.inexact or parts.lost for parts in written):
                    return other.name
        return ""

    found = {}
    for name, layer in layers.items():
        if layer.dynamic:
            found[name] = format.dynamic_parts(states[name])
            continue
        found[name], inexact, lost = format.static_parts(layer, states[name])
        # the kernel does not read the lost data, so this is enough if no format holds everything
        if inexact or (lost and exact_elsewhere()):
            other = exact_elsewhere()
            todo = f"save it as {other}" if other else "save model.state_dict()"
            raise CheckpointError(
                f"save_checkpoint: {name} is static, and {format.name} cannot hold it exactly: "
                f"{inexact or lost}. What to do: {todo}."
            )
    return found
