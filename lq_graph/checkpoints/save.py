"""save_checkpoint: a model with QuantizedLinear layers as a W8A8 checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..kernels import unpack_scale
from ..modules.linear_quant import SPLIT
from ..modules.quantized_linear import QuantizedLinear
from ..modules.transaction import keeps_grad_mode, uninterrupted
from ..ops import trans_quant_param
from ..rules.tables import dtype_name
from .build import build
from .files import (
    DTYPES,
    MAX_NAME,
    CheckpointError,
    expanded,
    shown,
)
from .formats import (
    FILES,
)
from .load import check_model
from .tensors import fits, memory_of
from .write import write_checkpoint

__all__ = ["FORMATS", "save_checkpoint"]

FORMATS = tuple(FILES)


@keeps_grad_mode
def save_checkpoint(model: nn.Module, folder: str | Path, format: str = "msmodelslim") -> None:
    """Write a model with QuantizedLinear layers as a checkpoint that `load_checkpoint` reads.

    A dynamic layer goes into either format. A static one goes into msmodelslim if its bias is the
    int32 one that quant_bias holds, as quantize() makes it, and into compressed-tensors if its
    weight_scale and float bias give the layer back bit for bit. Tensors that share memory are
    written once, and are one again in a model that ties them.

    The folder afterwards is this checkpoint, or what it was: files are complete under temporary
    names before the first one is put in place, an error or Ctrl-C takes everything back, and
    load_checkpoint in another process finds the old checkpoint or the new one at any time. Of a
    config.json that is there only quantization_config changes.

    Args:
        model: CPU or NPU.
        folder: made if it is not there; ~ is the home folder. It may hold a checkpoint of the same
            names, which is replaced, but no other weights.
        format: "msmodelslim" or "compressed-tensors".

    Warns:
        UserWarning: no layer is a QuantizedLinear.

    Raises:
        CheckpointError: another format; a static layer the format cannot hold, an int4 layer, one
            with int8 output, or one that is split over devices; a tensor that is on meta or of a
            kind safetensors has no place for; a folder with other weights, or one that another
            process saves into; anything the disk refuses.
    """
    if format not in FORMATS:
        raise CheckpointError(
            f"save_checkpoint: format is {format!r}; allowed are "
            f"{' and '.join(map(repr, FORMATS))}."
        )
    check_model("save_checkpoint", model)
    with torch.no_grad():
        tensors, layers = _contents(model, format)
        if not layers:
            warnings.warn(
                "save_checkpoint: the model has no QuantizedLinear; the checkpoint holds its float "
                "tensors only. What to do: lq_graph.quantize it first.",
                stacklevel=3,
            )
        try:
            with uninterrupted() as pause:
                write_checkpoint(expanded(folder), format, tensors, layers, pause)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            place = getattr(error, "filename", None) or folder
            what = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"save_checkpoint: {shown(place, 4096)}: {what}. The folder is as it was."
            ) from error


def _contents(
    model: nn.Module, format: str
) -> tuple[dict[str, Tensor], dict[str, QuantizedLinear]]:
    """The tensors of a checkpoint, those that are one once, and its quantized layers."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    states = {}
    for name, layer in layers.items():
        _check_w8a8(name, layer)
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
    return _once(tensors, [f"{name}.weight" for name in layers], others), layers


def _once(tensors: dict[str, Tensor], *groups: Iterable[str]) -> dict[str, Tensor]:
    """Leave out, within each group of names, a tensor that shares its memory with one before."""
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
    """Refuse what safetensors has no place for."""
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
        f"save_checkpoint: {shown(key)} {what}, which the formats have no place for. What to do: "
        f"{todo}. Nothing was written."
    )


def _check_w8a8(name: str, layer: QuantizedLinear) -> None:
    """The formats hold whole layers, int8 weights and float outputs."""
    if SPLIT in vars(layer.linear):
        raise CheckpointError(
            f"save_checkpoint: {name} is split over devices, and this process has a part of it. "
            "What to do: save before the model is split, or save model.state_dict(), whose "
            "DTensors torch.distributed.checkpoint writes."
        )
    if not name:
        what, todo = "the model itself is a layer", "put it in an nn.Sequential"
    elif layer.linear.weight.dtype != torch.int8:
        what, todo = f"{name} is int4", "quantize it with A8W8Dynamic or A8W8Static"
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
        f"save_checkpoint: {what}, which the formats have no place for. What to do: {todo}, "
        "or save model.state_dict()."
    )


def _check_scales(name: str, layer: QuantizedLinear, state: dict[str, Tensor]) -> None:
    """What load_checkpoint would refuse is not written."""
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
                f"save_checkpoint: {name}.{key} holds NaN, infinity or values of which a bias or "
                f"a weight is beyond {dtype_name(dtype)}, the layer's dtype. What to do: "
                "quantize the layer again."
            )


def _parts(
    layers: dict[str, QuantizedLinear], states: dict[str, dict[str, Tensor]], format: str
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer as a format publishes them."""

    @cache
    def held_by(format: str) -> bool:
        """Whether a format gives every static layer back bit for bit."""
        return not any(
            why or lost
            for name, layer in layers.items()
            if not layer.dynamic
            for _, why, lost in [_STATIC[format](layer, states[name])]
        )

    found = {}
    (other,) = (name for name in FORMATS if name != format)
    for name, layer in layers.items():
        if layer.dynamic:
            found[name] = _dynamic_parts(states[name], format)
            continue
        found[name], why, lost = _STATIC[format](layer, states[name])
        # what is lost the kernel does not read: that is enough where no format has all
        if why or (lost and held_by(other)):
            todo = f"save it as {other}" if held_by(other) else "save model.state_dict()"
            raise CheckpointError(
                f"save_checkpoint: {name} is static and holds {other}'s tensors, from which those "
                f"of {format} cannot be had exactly: {why or lost}. What to do: {todo}."
            )
    return found


def _dynamic_parts(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    weight, scale = state["linear.weight"], _per_channel(state)
    parts = {"weight": weight, "weight_scale": scale.unsqueeze(-1)}
    if format == "msmodelslim":
        parts["weight_offset"] = torch.zeros_like(parts["weight_scale"])
    if "linear.bias" in state:
        parts["bias"] = state["linear.bias"]
    return parts


def _per_channel(state: dict[str, Tensor]) -> Tensor:
    """The scale of a layer, (n,); a layer may have one value for all."""
    return state["linear.scale"].expand(state["linear.weight"].shape[0])


def _static_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {"weight": state["linear.weight"], "input_scale": state["input_scale"]}
    if "weight_scale" in state:
        parts["weight_scale"] = state["weight_scale"].unsqueeze(-1)
    if "float_bias" in state:
        parts["bias"] = state["float_bias"]
    return parts


# a static layer's tensors in a format; why they do not give the layer back, and what they lose that
# it does not compute with; both empty if they do and lose nothing
_Static = tuple[dict[str, Tensor], str, str]


def _msmodelslim(layer: QuantizedLinear, state: dict[str, Tensor]) -> _Static:
    parts, bias, scale = _static_parts(state), state.get("linear.bias"), _per_channel(state)
    word = _word(layer, scale)
    if bias is None:
        bias = torch.zeros(word.shape[0], dtype=torch.int32, device=word.device)
    parts |= {"input_offset": state["input_offset"], "deq_scale": word, "quant_bias": bias}
    if bias.dtype != torch.int32:
        return parts, f"its bias is {dtype_name(bias.dtype)}, and quant_bias is int32", ""
    cut = word.dtype != scale.dtype and not torch.equal(unpack_scale(word)[0], scale)
    return parts, "", "deq_scale keeps 19 bits of its scale" if cut else ""


def _compressed_tensors(layer: QuantizedLinear, state: dict[str, Tensor]) -> _Static:
    parts, bias = _static_parts(state), state.get("linear.bias")
    if "weight_scale" not in parts or bool(state["input_offset"].any()):
        return parts, "it has a zero point, or its weight's scale is not known by itself", ""
    if bias is not None and not parts.setdefault("bias", bias).is_floating_point():
        return parts, "its float bias is not known", ""
    again = build("compressed-tensors", False, layer.input_dtype, parts.get).linear
    if not torch.equal(_word(layer, again.scale), _word(layer, _per_channel(state))):
        return parts, "its scale is not exactly the product of the two scales", ""
    same = bias is again.bias is None or (
        bias is not None
        and again.bias is not None
        and bias.dtype == again.bias.dtype
        and torch.equal(bias, again.bias)
    )
    return parts, "" if same else "its bias is not the one that its float bias gives", ""


_STATIC: dict[str, Callable[[QuantizedLinear, dict[str, Tensor]], _Static]] = {
    "msmodelslim": _msmodelslim,
    "compressed-tensors": _compressed_tensors,
}


def _word(layer: QuantizedLinear, scale: Tensor) -> Tensor:
    """A static layer's scale as its row of the table reads it."""
    if scale.dtype == torch.float32 and layer.linear.output_dtype == torch.float16:
        return trans_quant_param(scale)
    return scale
