"""The quantizer of a static layer's input, in each form that an operator reads.

lq_graph.static_quant reads 1 / scale and the zero point in the dtype of x. The operators that a
graph fuses it with read other forms of the same numbers:

    AddRmsNormQuant      a value for each of k; float32 and int32, or both bfloat16
    DequantSwigluQuant   the scale itself and the zero point, float32

To compute them in a graph would be kernels, so a layer holds them. Layers with equal numbers hold
the same tensors: then a graph sees that they quantize one tensor equally.

Sources: aclnnAddRmsNormQuantV2.md and aclnnDequantSwigluQuant.md (hicann/ops-nn), and
torch_npu-npu_add_rms_norm_quant.md (Ascend/op-plugin) for the dtypes.
"""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

__all__ = ["Forms", "Quantizer", "quantizer_of", "shared"]


class Forms(NamedTuple):
    """What fused operators read in place of scale_reciprocal and offset: the other arguments of
    static_quant.

    Attributes:
        scale, zero_point: float32, (1,).
        reciprocals, zero_points: (k,), float32 and int32; both bfloat16 if x is bfloat16.
    """

    scale: Tensor
    zero_point: Tensor
    reciprocals: Tensor
    zero_points: Tensor


class Quantizer(NamedTuple):
    """A static quantization.

    Attributes:
        scale_reciprocal, offset: in the dtype of x, (1,).
        forms: the same numbers.
    """

    scale_reciprocal: Tensor
    offset: Tensor
    forms: Forms


_OF_EACH_K = {torch.float16: (torch.float32, torch.int32)}  # else both have the dtype of x


def quantizer_of(scale: Tensor, offset: Tensor, dtype: torch.dtype, k: int) -> Quantizer:
    """The quantizer of an input (..., k) of a dtype, from its float32 scale and zero point, (1,).

    All forms hold 1 / scale as it is rounded to dtype, because static_quant multiplies by that.
    """
    reciprocal, own_offset = scale.reciprocal().to(dtype), offset.to(dtype)
    wide, points = reciprocal.float(), own_offset.float()
    of_scales, of_points = _OF_EACH_K.get(dtype, (dtype, dtype))
    return Quantizer(
        reciprocal,
        own_offset,
        Forms(
            wide.reciprocal(),
            points,
            wide.to(of_scales).expand(k).contiguous(),
            points.round().to(of_points).expand(k).contiguous(),
        ),
    )


_known: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
_lock = Lock()


def shared(tensor: Tensor | None) -> Tensor | None:
    """A form of a quantizer; another layer's tensor, if it is equal. Nobody writes into them."""
    if type(tensor) is not Tensor or tensor.is_meta or tensor.is_inference():
        return tensor
    key = tensor.device, tensor.dtype, tensor.shape, float(tensor[0])
    with _lock:
        known = _known.setdefault(key, tensor)
        if known is tensor or torch.equal(known, tensor):
            return known
        _known[key] = tensor
    return tensor
