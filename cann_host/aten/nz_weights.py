"""The FRACTAL_NZ weight of a matrix product in captured graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import get_tensor_metadata

from cann_host import runtime
from cann_host.memory import FRACTAL_NZ
from cann_host.rules import P310, soc_family

__all__ = ["with_nd_weight"]

# Where mat2 is among the arguments. torch_npu has aclnnMatmulWeightNz and aclnnAddmmWeightNz for
# these in graphs of an A2; for bmm, and for float32, it launches an aclop, which no graph captures
# (op-plugin: op_api_common.h, OpUtils.cpp, AddmmKernelNpuOpApi.cpp).
_MAT2 = {"aten::mm": 1, "aten::addmm": 2}
_DTYPES = (torch.float16, torch.bfloat16)
_BASE_SIZES = "base_sizes_/"
_ND = 2


def with_nd_weight(op: torch._ops.OpOverload, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a product, its weight cast to ND by a launch that the graph captures too: a
    replay reads what the weight holds then.

    A weight that is neither a whole tensor nor its transpose stays: the kernels take the blocks of
    a whole one.
    """
    place = _MAT2.get(op._schema.name)
    if place is None or not _takes_blocks(args[place]) or (place == 2 and args[0].dim() == 0):
        return args
    if place == 2 and soc_family(runtime.options().soc) == P310:  # has no aclnnAddmmWeightNz
        return args
    mat2: Tensor = args[place]
    size = _base_size(mat2)
    # torch_npu casts a view by an aclop
    if _is_whole(mat2, size):
        weight = _cast(mat2)
    elif _is_whole(mat2.t(), size):
        weight = _cast(mat2.t()).t()
    else:
        return args
    return [*args[:place], weight, *args[place + 1 :]]


def _takes_blocks(mat2: Tensor) -> bool:
    if mat2.device.type != "npu" or mat2.dtype not in _DTYPES:
        return False
    format_of = torch.ops.npu.get_npu_format.default
    return int(format_of(mat2)) == FRACTAL_NZ


def _base_size(tensor: Tensor) -> tuple[int, ...] | None:
    """The size of the tensor that was cast, of which this is a view. torch_npu writes it into what
    torch.save keeps."""
    for key in get_tensor_metadata(tensor):
        if key.startswith(_BASE_SIZES):
            return tuple(int(size) for size in key.removeprefix(_BASE_SIZES).split("/") if size)
    return None


def _is_whole(tensor: Tensor, size: tuple[int, ...] | None) -> bool:
    return tuple(tensor.shape) == size and tensor.is_contiguous() and tensor.storage_offset() == 0


def _cast(tensor: Tensor) -> Tensor:
    try:
        nd: Tensor = torch.ops.npu.npu_format_cast(tensor, _ND)
    except RuntimeError as error:
        raise RuntimeError(
            "cann_host: a product with a FRACTAL_NZ weight is not captured here: this torch_npu, "
            "or the CANN that it gets, casts the weight by an aclop. A device takes the product. "
            "What to do: cast the weight to ND before the capture (torch_npu.npu_format_cast)."
        ) from error
    return nd
