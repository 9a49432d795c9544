"""Whether two tensors share memory or are bit-equal, and whether values fit a dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..modules.float_view import FloatView

__all__ = ["bit_equal", "fits", "memory_of"]


def bit_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit-equal."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(_bits(one), _bits(other))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> object:
    """A key that is equal for tensors that share their memory and read it in the same way."""
    if isinstance(tensor, FloatView):
        return object()  # computed when it is read
    plain = not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided
    if not plain or not tensor.numel():
        return id(tensor)
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (tensor.device, *place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def fits(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite in a dtype."""
    return bool(values.to(dtype).isfinite().all())
