"""What a layer of compressed-tensors computes, in numpy, from the tensors of its files."""

from __future__ import annotations

import numpy as np
import torch

from support import golden
from support.checkpoint_files import F16


def exact(tensors: dict, x: torch.Tensor, dtype: torch.dtype, int4: bool) -> np.ndarray:
    """The operators' results, from the tensors of the files."""
    name = "float16" if dtype == F16 else "bfloat16"
    parts = {part: value.float().numpy().reshape(-1) for part, value in tensors.items()}
    weight, bias = tensors["weight"].numpy(), parts.get("bias")
    weight_scale = np.broadcast_to(parts["weight_scale"], len(weight))
    rows = x.reshape(-1, x.shape[-1]).float().numpy()
    if "input_scale" not in parts:
        values, pertoken = golden.dynamic_quant(rows, 7 if int4 else 127)
        return golden.linear_quant(
            golden.pack_int4(values) if int4 else values.astype(np.int8),
            golden.pack_int4(weight) if int4 else weight,
            weight_scale, None, pertoken, bias, name,
        )  # fmt: skip
    reciprocal = torch.from_numpy(1 / parts["input_scale"]).to(dtype).float().numpy()
    zero_point = float(parts.get("input_zero_point", [0])[0])
    quantized = golden.static_quant(rows, reciprocal, zero_point)
    scale = parts["input_scale"] * weight_scale
    if dtype == F16:  # the operator reads 19 bits of a scale
        scale = (scale.view(np.uint32) & 0xFFFFE000).view(np.float32)
    # bfloat16 output adds the bias after the scale, unless the scales have 19 bits as quantize()'s
    rounded = dtype == F16 or not (scale.view(np.uint32) & 0x1FFF).any()
    if "input_zero_point" in parts or (bias is not None and rounded):
        steps = 0 if bias is None else np.rint(bias.astype(np.float64) / scale)
        total = steps - zero_point * weight.sum(1, dtype=np.int64)
        bias = None if bias is None and not zero_point else total.astype(np.int32)
    if dtype == F16:
        scale = golden.trans_quant_param(scale)
    return golden.linear_quant(
        quantized, weight, scale, None, None, bias, name, packed=scale.dtype == np.int64
    )


def meant(tensors: dict, x: torch.Tensor, int4: bool) -> np.ndarray:
    """The format's definition: the product of the dequantized tensors, in float64."""
    parts = {part: value.double().numpy() for part, value in tensors.items()}
    weight, rows = (
        parts["weight"] * parts["weight_scale"],
        x.reshape(-1, x.shape[-1]).double().numpy(),
    )
    low, high, zero_point = -128, 127, parts.get("input_zero_point", 0)
    if "input_scale" in parts:
        scale = parts["input_scale"]
    else:
        high = 7 if int4 else 127  # DynamicQuant's range; the format's own has half a step more
        low = -high
        scale = np.abs(rows).max(1, keepdims=True) / high
        scale[scale == 0] = 1
    quantized = np.clip(np.rint(rows / scale + zero_point), low, high)
    return (quantized - zero_point) * scale @ weight.T + parts.get("bias", 0)
