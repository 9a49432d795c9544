"""Checks of one quantized layer's tensors, before anything is changed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..modules.quantized_linear import QuantizedLinear
from ..quantization.layer import no_row
from ..rules.tables import dtype_name
from .build import bias_dtype
from .files import refuse
from .folder import CheckpointFiles
from .formats import (
    PARTS,
    Part,
)
from .layers import LayerToLoad, weight_of
from .tensors import fits

__all__ = ["check_layer"]

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16


def check_layer(
    files: CheckpointFiles, path: Path, kind: str, layer: LayerToLoad, dtype: torch.dtype | None
) -> None:
    """A layer's tensors are there, each of the right dtype, shape and values; and the model and the
    product can run it. Decides what it gives."""
    name, n, k = layer.name, layer.n, layer.k
    for part in PARTS[kind, layer.dynamic]:
        if part.name not in layer.keys:
            if part.required:
                refuse(path, f"{name}.{part.name}", _describe(part, n, k), "no such tensor")
            continue
        key = layer.keys[part.name]
        given, shape = files.header(key)
        shapes = [tuple({"n": n, "k": k}.get(str(s), s) for s in wanted) for wanted in part.shapes]
        if given not in part.dtypes or shape not in shapes:
            found = f"{'another dtype' if given is None else dtype_name(given)} {shape}"
            refuse(files.path(key), key, _describe(part, n, k), found)
        _check_values(files, key, part)
    layer.output = _output(files, path, layer, dtype)
    _check_input_scale(files, layer)
    _check_range(files, layer)
    _check_product(files, path, kind, layer)


def _describe(part: Part, n: int, k: int) -> str:
    shape = tuple({"n": n, "k": k}.get(str(size), size) for size in part.shapes[0])
    return f"{' or '.join(map(dtype_name, part.dtypes))} {shape}"


def _check_values(files: CheckpointFiles, key: str, part: Part) -> None:
    """Scales are finite and positive, an input's zero point is one of int8, and a weight's is 0:
    LinearQuant has none."""
    if part.name == "weight_offset" and bool(files.read(key).any()):
        refuse(files.path(key), key, "zeros (symmetric weights)", "other values")
    if part.name == "input_offset":
        offset = files.read(key).float()
        if not bool(((offset >= -128) & (offset <= 127)).all()):
            found = str(float(offset.reshape(-1)[0]))
            refuse(files.path(key), key, "a value of -128 to 127", found)
    if part.positive:
        values = _scales(files, key)
        if not bool((values.isfinite() & (values > 0)).all()):
            refuse(files.path(key), key, "finite scales above 0", "NaN, infinity, 0 or less")


def _scales(files: CheckpointFiles, key: str) -> Tensor:
    """The scales that a tensor holds, or of which it holds the bits."""
    values = files.read(key)
    return (values & 0xFFFFFFFF).to(torch.uint32).view(_F32) if values.dtype == _I64 else values


def _check_range(files: CheckpointFiles, layer: LayerToLoad) -> None:
    """No weight and no bias that the files stand for is beyond the dtype of the layer's output."""
    keys, dtype = layer.keys, dtype_name(layer.output)
    todo = "load in bfloat16, or quantize again" if layer.output == _F16 else "quantize again"
    if (key := keys.get("bias")) is not None and not fits(files.read(key), layer.output):
        found = str(float(files.read(key).abs().max()))
        expected = f"finite values that {dtype} holds, the layer's dtype"
        refuse(files.path(key), key, expected, found, todo)
    for part in ("weight_scale", "deq_scale"):
        if (key := keys.get(part)) is None:
            continue
        scale = _scales(files, key).reshape(-1).double()
        if part == "deq_scale":  # the product of both scales
            scale = scale / files.read(keys["input_scale"]).double()
        if not fits(scale * 127, layer.output):
            expected = f"weights that {dtype} holds, the layer's dtype"
            refuse(files.path(key), key, expected, f"127 * {float(scale.max()):.6g}", todo)
    if (key := keys.get("quant_bias")) is not None:
        # the zero point's part of it is no bias: at most this
        zero_point = files.read(keys["input_offset"]).double().abs() * layer.k * 128
        least = (files.read(key).double().abs() - zero_point).clamp(min=0)
        bias = least * _scales(files, keys["deq_scale"]).double()
        if not fits(bias, layer.output):
            expected = f"a bias that {dtype} holds, the layer's dtype"
            refuse(files.path(key), key, expected, f"{float(bias.max()):.6g}", todo)


def _output(
    files: CheckpointFiles, path: Path, layer: LayerToLoad, dtype: torch.dtype | None
) -> torch.dtype:
    """The float dtype a layer takes and gives."""
    module = layer.module
    own = module.input_dtype if isinstance(module, QuantizedLinear) else weight_of(module).dtype
    wanted = dtype or own
    if wanted not in (_F16, _BF16):
        refuse(
            path,
            layer.name,
            "an output dtype of float16 or bfloat16",
            f"{dtype_name(wanted)}, the dtype of the model's layer",
            "pass dtype=torch.bfloat16 or torch.float16",
        )
    if (key := layer.keys.get("deq_scale")) is not None:
        given = files.header(key)[0]
        says = _F16 if given == _I64 else _BF16
        if says != wanted:
            refuse(
                files.path(key),
                key,
                f"{'int64' if wanted == _F16 else 'float32'}, of a layer in {dtype_name(wanted)}",
                f"{dtype_name(given)}, of one in {dtype_name(says)}",
                f"call model.to(torch.{dtype_name(says)}) first"
                if dtype is None
                else f"leave dtype= out, or pass torch.{dtype_name(says)}",
            )
    if not layer.dynamic and own in (_F16, _BF16) and own != wanted:
        refuse(
            path,
            layer.name,
            f"a layer in {dtype_name(wanted)}, as dtype= says",
            f"{dtype_name(own)} in the model, and a static layer takes one dtype",
            f"call model.to(torch.{dtype_name(wanted)}) first, or leave dtype= out",
        )
    return wanted


def _check_input_scale(files: CheckpointFiles, layer: LayerToLoad) -> None:
    """What the chip multiplies by, in the dtype that it does so in, and the product of the scales
    are no zero or infinity."""
    if (key := layer.keys.get("input_scale")) is None:
        return
    scale = files.read(key).reshape(-1).to(_F32)
    factor = scale.reciprocal().to(layer.output)
    if not bool((factor.isfinite() & (factor > 0)).all()):
        found = f"{float(scale[0])}, whose reciprocal is {float(factor[0])}"
        expected = f"a scale whose reciprocal is finite and above 0 in {dtype_name(layer.output)}"
        refuse(files.path(key), key, expected, found, "load in bfloat16, or quantize again")
    if "deq_scale" in layer.keys:
        return
    key = layer.keys["weight_scale"]
    product = scale * files.read(key).reshape(-1).to(_F32)
    if not bool((product.isfinite() & (product > 0)).all()):
        expected = "scales that, times input_scale, are finite and above 0 in float32"
        refuse(files.path(key), key, expected, "zero or infinity")
    if "bias" in layer.keys and layer.output == _F16:
        key = layer.keys["bias"]
        steps = files.read(key).double() / product.double()
        most = 2**31 - 1 - layer.k * 128 * 127  # leaves the product its room
        if not bool((steps.abs() <= most).all()):
            found = f"{float(steps.abs().nan_to_num(torch.inf).max()):.3g}"
            refuse(
                files.path(key),
                key,
                f"at most {most:,} steps of input_scale * weight_scale, for the int32 bias that "
                "float16 output takes",
                found,
                "load in bfloat16",
            )


def _check_product(files: CheckpointFiles, path: Path, kind: str, layer: LayerToLoad) -> None:
    """The product's tables have a row for the layer."""
    bias = None
    if "quant_bias" in layer.keys:
        bias = _I32
    elif "bias" in layer.keys:
        bias = bias_dtype(kind, layer.dynamic, layer.output, files.header(layer.keys["bias"])[0])
    packed = "deq_scale" in layer.keys and files.header(layer.keys["deq_scale"])[0] == _I64
    why = no_row(
        layer.k,
        layer.n,
        static=not layer.dynamic,
        input_dtype=layer.output,
        output_dtype=layer.output,
        scale=_I64 if packed else _F32,
        bias=bias,
    )
    if why:
        found, todo = why.split(". What to do: ")
        refuse(path, layer.name, "a layer that the product can run", found, todo.rstrip("."))
