"""Checks of one quantized layer's tensors, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..modules.quantized_linear import QuantizedLinear
from ..modules.supported import why_not_supported
from ..rules.tables import Product, dtype_name
from .base import MustBe, Part
from .files import refuse
from .layers import LayerToLoad, weight_of
from .tensors import fits

__all__ = [
    "check_headers",
    "check_values",
    "check_without_effect",
    "outputs_of",
    "scale_and_bias",
    "why_no_row",
]

_I32, _F32, _F16, _BF16 = torch.int32, torch.float32, torch.float16, torch.bfloat16
_MISSING = "download the missing file, or correct the JSON that says how the layer is quantized"
_AS_SAID = (
    "correct the JSON that says how the layer is quantized, or load into a model of its sizes"
)
_AGAIN = "quantize the layer again"
_SYMMETRIC = "quantize again with symmetric weights"
_ONE_SCALE = "quantize again with one scale for a channel; LinearQuant has no groups along k"
# the weights of a model may be saved as floats, with the scales beside them
_COMPRESS = (
    "save the model again with its weights quantized (save_compressed=True), or load the float "
    "model and call lq_graph.quantize"
)


def check_headers(layer: LayerToLoad, dtype: torch.dtype | None) -> None:
    """Refuse a layer with a tensor that is missing or has a wrong dtype or shape, and a layer that
    the model or the product cannot run. Sets `layer.output`. No tensor is read.

    Args:
        layer: the layer to check.
        dtype: float16 or bfloat16, from the caller of load_checkpoint; None for the model's.
    """
    for part in layer.format.parts[layer.kind]:
        if part.name in layer:
            _check_header(layer, part)
        elif part.required:
            key = f"{layer.name}.{part.name}"
            refuse(layer.files.path, key, _describe(part, layer), "no such tensor", _MISSING)
    _check_bias(layer)
    layer.output = _output(layer, dtype)
    _check_product(layer)


def check_values(layer: LayerToLoad) -> None:
    """Refuse a layer with a scale, zero point or bias of a wrong value, or of one that the layer's
    dtype cannot hold. Reads these tensors.

    Args:
        layer: a layer that passed `check_headers`.
    """
    for part in layer.parts.values():
        _check_values(layer, part)
    _check_input_scale(layer)
    _check_range(layer)


def check_without_effect(layers: Iterable[LayerToLoad], wanted: Mapping[str, MustBe]) -> None:
    """Refuse a tensor that would have an effect on a layer, if it is not loaded.

    Args:
        layers: that were found.
        wanted: what the tensors must be, by name.
    """
    by_name = {layer.name: layer for layer in layers}
    for key, must_be in wanted.items():
        if (layer := by_name.get(key.rpartition(".")[0])) is None:
            continue  # another name of a layer; its tensors are those of the first name
        dtype, shape = layer.files.header(key)
        values = layer.files.read(key) if dtype is not None else None
        if must_be is MustBe.ZERO:
            fine = values is not None and not bool(values.double().any())
            expected = "zeros, because LinearQuant's weights and symmetric inputs have none"
        elif must_be is MustBe.SHAPE:
            fine = values is not None and values.tolist() == [layer.n, layer.k]
            expected = f"[{layer.n}, {layer.k}], the shape of the weight"
        else:
            fine = values is not None and shape == (layer.k,) and bool((values.diff() >= 0).all())
            expected = f"the {layer.k} columns in their order"
        if not fine:
            todo = _WITHOUT_EFFECT[must_be]
            refuse(layer.files.file_of(key), key, expected, "other values", todo)


_WITHOUT_EFFECT = {
    MustBe.ZERO: "quantize again with symmetric=True",
    MustBe.SHAPE: "use the JSON that was saved with these weights",
    MustBe.ORDERED: "quantize again with actorder='weight' or without actorder",
}


def _shapes(part: Part, layer: LayerToLoad) -> list[tuple[str | int, ...]]:
    sizes = {"n": layer.n, "k": layer.k}
    return [tuple(sizes.get(str(size), size) for size in shape) for shape in part.shapes]


def _describe(part: Part, layer: LayerToLoad) -> str:
    return f"{' or '.join(map(dtype_name, part.dtypes))} {_shapes(part, layer)[0]}"


def _check_header(layer: LayerToLoad, part: Part) -> None:
    given, shape = layer.dtype(part.name), layer.shape(part.name)
    if given not in part.dtypes or shape not in _shapes(part, layer):
        found = f"{'another dtype' if given is None else dtype_name(given)} {shape}"
        floats = part.name == "weight" and given is not None and given.is_floating_point
        groups = part.name == "weight_scale" and shape[:1] == (layer.n,) and shape[-1] > 1
        todo = _COMPRESS if floats else _ONE_SCALE if groups else _AS_SAID
        layer.refuse_part(part.name, _describe(part, layer), found, todo)


def _check_bias(layer: LayerToLoad) -> None:
    """The files have the bias of a layer that has one in the model."""
    module = layer.module
    if isinstance(module, QuantizedLinear):  # the int32 bias of a static layer may be a zero point
        bias: object = module.linear.bias if module.dynamic else module.float_bias
    else:
        bias = module.bias
    if bias is not None and "bias" not in layer and "quant_bias" not in layer:
        layer.refuse(
            "the bias that the model's layer has",
            "no such tensor",
            "make the model from the config.json that was saved with these weights (without biases "
            "if its layers have none), or download the missing file",
        )


def _check_values(layer: LayerToLoad, part: Part) -> None:
    """Scales are finite and positive. The zero point of an input is in -128 to 127. The zero point
    of a weight is 0, because LinearQuant has none."""
    if part.name == "weight_offset" and bool(layer.read(part.name).any()):
        layer.refuse_part(part.name, "zeros (symmetric weights)", "other values", _SYMMETRIC)
    if part.name == layer.format.zero_point:
        offset = layer.read(part.name).double()
        if not bool(((offset >= -128) & (offset <= 127) & (offset == offset.round())).all()):
            found = str(float(offset.reshape(-1)[0]))
            todo = "quantize again; zero points are integers of int8"
            layer.refuse_part(part.name, "an integer of -128 to 127", found, todo)
    if part.positive:
        values = layer.scales(part.name)
        if not bool((values.isfinite() & (values > 0)).all()):
            layer.refuse_part(
                part.name, "finite scales above 0", "NaN, infinity, 0 or less", _AGAIN
            )


def _output(layer: LayerToLoad, dtype: torch.dtype | None) -> torch.dtype:
    """The float dtype that a layer takes and returns."""
    module = layer.module
    own = module.input_dtype if isinstance(module, QuantizedLinear) else weight_of(module).dtype
    wanted = dtype or own
    if wanted not in (_F16, _BF16):
        layer.refuse(
            "an output dtype of float16 or bfloat16",
            f"{dtype_name(wanted)}, the dtype of the model's layer",
            "call model.bfloat16() or model.half() first; dtype= sets only quantized layers",
        )
    for part, outputs in layer.format.output_decided_by.items():
        if part not in layer:
            continue
        given = layer.dtype(part)
        assert given is not None
        stated = outputs[given]
        if stated != wanted:
            right = next(scale for scale, output in outputs.items() if output == wanted)
            layer.refuse_part(
                part,
                f"{dtype_name(right)}, of a layer in {dtype_name(wanted)}",
                f"{dtype_name(given)}, of a layer in {dtype_name(stated)}",
                f"call model.to(torch.{dtype_name(stated)}) first"
                if dtype is None
                else f"leave dtype= out, or pass torch.{dtype_name(stated)}",
            )
    if layer.kind.static and own in (_F16, _BF16) and own != wanted:
        layer.refuse(
            f"a layer in {dtype_name(wanted)}, the dtype of dtype=",
            f"{dtype_name(own)} in the model, and a static layer takes one dtype",
            f"call model.to(torch.{dtype_name(wanted)}) first, or leave dtype= out",
        )
    return wanted


def _check_input_scale(layer: LayerToLoad) -> None:
    """The reciprocal of input_scale in the layer's dtype, by which the chip multiplies, and
    input_scale * weight_scale in float32 are finite and above 0."""
    if "input_scale" not in layer:
        return
    scale = layer.read("input_scale").reshape(-1).to(_F32)
    factor = scale.reciprocal().to(layer.output)
    if not bool((factor.isfinite() & (factor > 0)).all()):
        found = f"{float(scale[0])}, whose reciprocal is {float(factor[0])}"
        expected = f"a scale whose reciprocal is finite and above 0 in {dtype_name(layer.output)}"
        layer.refuse_part("input_scale", expected, found, "load in bfloat16, or quantize again")
    if "deq_scale" in layer:  # holds the product
        return
    product = scale * layer.read("weight_scale").reshape(-1).to(_F32)
    if not bool((product.isfinite() & (product > 0)).all()):
        expected = "scales that, times input_scale, are finite and above 0 in float32"
        layer.refuse_part("weight_scale", expected, "zero or infinity", _AGAIN)
    has_zero_point = layer.format.zero_point in layer
    if "bias" in layer and (layer.output == _F16 or has_zero_point):
        steps = layer.read("bias").double() / product.double()
        # the product, and the zero point times the weight, need the rest of the int32 range
        most = 2**31 - 1 - layer.k * 128 * (255 if has_zero_point else 127)
        if not bool((steps.abs() <= most).all()):
            found = f"{float(steps.abs().nan_to_num(torch.inf).max()):.3g}"
            layer.refuse_part(
                "bias",
                f"at most {most:,} steps of input_scale * weight_scale, for the int32 bias that "
                f"{'a zero point' if has_zero_point else 'float16 output'} takes",
                found,
                "quantize again" if has_zero_point else "load in bfloat16",
            )


def _check_range(layer: LayerToLoad) -> None:
    """The dtype of the layer's output can hold every weight and bias of the files as a float."""
    dtype = dtype_name(layer.output)
    todo = "load in bfloat16, or quantize again" if layer.output == _F16 else "quantize again"
    if "bias" in layer and not fits(layer.read("bias"), layer.output):
        found = str(float(layer.read("bias").abs().max()))
        expected = f"finite values that {dtype} holds, the layer's dtype"
        layer.refuse_part("bias", expected, found, todo)
    for part in ("weight_scale", "deq_scale"):
        if part not in layer:
            continue
        scale = layer.scales(part).reshape(-1).double()
        if part == "deq_scale":  # the product of both scales
            scale = scale / layer.read("input_scale").double()
        top = 8 if layer.kind.storage == _I32 else 127
        if not fits(scale * top, layer.output):
            expected = f"weights that {dtype} holds, the layer's dtype"
            layer.refuse_part(part, expected, f"{top} * {float(scale.max()):.6g}", todo)
    if "quant_bias" in layer:
        # the part of it that the zero point adds is not a bias: it is at most this
        zero_point = layer.read("input_offset").double().abs() * layer.k * 128
        least = (layer.read("quant_bias").double().abs() - zero_point).clamp(min=0)
        bias = least * layer.scales("deq_scale").double()
        if not fits(bias, layer.output):
            expected = f"a bias that {dtype} holds, the layer's dtype"
            layer.refuse_part("quant_bias", expected, f"{float(bias.max()):.6g}", todo)


def _check_product(layer: LayerToLoad) -> None:
    """The product's tables have a row for the layer."""
    why, todo = why_no_row(layer, layer.output)
    if why:
        todo = todo or "leave the layer float, or quantize it as W8A8, and save again"
        layer.refuse("a layer that the product can run", why, todo)


def scale_and_bias(
    layer: LayerToLoad, output: torch.dtype
) -> tuple[torch.dtype | None, torch.dtype | None]:
    """The dtypes of a layer's scale and bias, None for no bias, if it returns `output`."""
    scale = layer.dtype("deq_scale") if "deq_scale" in layer else _F32
    if "quant_bias" in layer or layer.format.zero_point in layer:
        return scale, _I32
    if "bias" in layer:
        return scale, layer.format.bias_dtype(layer.kind, output, layer.dtype("bias"))
    return scale, None


def why_no_row(
    layer: LayerToLoad, output: torch.dtype, product: Product | None = None
) -> tuple[str, str]:
    """Why a product, by default the one in force, cannot run a layer that takes and returns
    `output`, and what to do; both empty if it can."""
    scale, bias = scale_and_bias(layer, output)
    return why_not_supported(
        layer.kind,
        layer.k,
        layer.n,
        input_dtype=output,
        output_dtype=output,
        scale=scale,
        bias=bias,
        product=product,
    )


def outputs_of(layer: LayerToLoad) -> tuple[torch.dtype, ...]:
    """The dtypes in which a layer may be loaded: the one that its tensors decide, or both."""
    for part, outputs in layer.format.output_decided_by.items():
        given = layer.dtype(part) if part in layer else None
        if given is not None and given in outputs:
            return (outputs[given],)
    return _F16, _BF16
