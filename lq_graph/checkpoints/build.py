"""A QuantizedLinear of the tensors of a file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..errors import LinearQuantTypeError
from ..modules.linear_quant import layer_of
from ..modules.quantized_linear import QuantizedLinear
from ..modules.replaceable import carry_over
from .files import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard

from .folder import CheckpointFiles
from .layers import LayerToLoad, weight_of
from .tensor_parallel import TensorParallel

__all__ = ["bias_dtype", "build", "new_layer"]

_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16


def bias_dtype(
    kind: str, dynamic: bool, output: torch.dtype, given: torch.dtype | None
) -> torch.dtype:
    """Of the built layer's bias, where the file has a float one."""
    if kind == "compressed-tensors" and not dynamic and output == _F16:
        return _I32  # the row of float16 output without pertoken_scale takes no other
    return output if given == output else _F32


# what a tensor of the files becomes: a parameter, by whose placement it is split
_BECOMES = {"weight": "weight", "quant_bias": "bias", "bias": "bias"}


def new_layer(
    files: CheckpointFiles,
    kind: str,
    layer: LayerToLoad,
    shares: TensorParallel | None,
    weights: dict[str, nn.Parameter],
) -> QuantizedLinear:
    """The layer that stands in the module's place."""
    new = build(kind, layer.dynamic, layer.output, partial(_read, files, layer, shares))
    new = new.to(_device_of(layer.module))
    if layer.style is None:  # one weight that several layers have stays one
        new.linear.weight = weights.setdefault(
            layer.keys["weight"], cast(nn.Parameter, new.linear.weight)
        )
    elif shares is not None:
        layer.style.adopt(new, shares.mesh)
    try:
        carry_over(layer.module, new)
    except LinearQuantTypeError as error:
        raise CheckpointError(f"load_checkpoint: {layer.name}: {error}") from None
    return new


def _read(
    files: CheckpointFiles, layer: LayerToLoad, shares: TensorParallel | None, part: str
) -> Tensor | None:
    """A tensor of a layer, or this process's part of it; None if the layer has none."""
    if part not in layer.keys:
        return None
    key = layer.keys[part]
    shape = files.header(key)[1]
    if layer.style is None or shares is None or layer.parts[part].shapes[0][0] != "n":
        return files.read(key)
    size = shape if part == "weight" else shape[:1]
    placement = layer.style.placement(_BECOMES.get(part, "scale"), size)
    if placement.is_shard():
        dim = cast("Shard", placement).dim
        return files.read_part(key, dim, shares.rank, shares.ranks)
    tensor = files.read(key)
    return torch.zeros_like(tensor) if placement.is_partial() and shares.rank else tensor


def build(
    kind: str, dynamic: bool, output: torch.dtype, read: Callable[[str], Tensor | None]
) -> QuantizedLinear:
    """A layer of the tensors of a file.

    Args:
        kind: the file's format.
        dynamic: whether the layer quantizes its input per token.
        output: dtype that the layer takes and gives.
        read: gives a tensor by the name of PARTS, or None.
    """

    def floats(part: str) -> Tensor | None:
        tensor = read(part)
        return None if tensor is None else tensor.reshape(-1).to(_F32)

    weight, bias = read("weight"), read("bias")
    assert weight is not None
    weight_scale, input_scale, float_bias = floats("weight_scale"), floats("input_scale"), None
    if dynamic:
        scale = weight_scale
        weight_scale = None
    elif kind == "msmodelslim":
        # quant_bias holds the float bias and the zero point of the input already
        scale, float_bias, bias = read("deq_scale"), bias, read("quant_bias")
    else:
        assert weight_scale is not None and input_scale is not None
        scale = input_scale * weight_scale
        if bias is not None and bias_dtype(kind, dynamic, output, bias.dtype) == _I32:
            float_bias, bias = bias, (bias.to(_F32) / scale).round().to(_I32)
    if bias is not None and bias.is_floating_point():
        bias = bias.to(bias_dtype(kind, dynamic, output, bias.dtype))
    assert scale is not None
    return QuantizedLinear(
        layer_of(weight, scale, bias, pertoken=dynamic, output_dtype=output),
        input_scale,
        floats("input_offset"),
        input_dtype=output,
        weight_scale=weight_scale,
        float_bias=float_bias,
    )


def _device_of(module: nn.Module) -> torch.device:
    device = weight_of(module).device
    return torch.device("cpu") if device.type == "meta" else device
