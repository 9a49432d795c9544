"""All tensors of a call are on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LinearQuantValueError
from .refusal import refused

__all__ = ["check_devices"]


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that are on several devices.

    The fake kernels call it: beside a meta tensor they would answer with uninitialised memory, and
    in a graph with tensors that are somewhere else at run time. The CPU kernel is not reached with
    others, and torch_npu looks by itself: there this only tells its error in our words.

    Args:
        op: the operator's name, for the message.
        tensors: by argument, the one that decides first; None for absent.

    Raises:
        LinearQuantValueError: names the first that is elsewhere.
    """
    (first, decides), *rest = tensors.items()
    assert decides is not None
    wanted = decides.device
    for name, tensor in rest:
        if tensor is None or _same(tensor.device, wanted):
            continue
        todo = (
            "a meta tensor holds no values: load the checkpoint first, then call model.npu() or "
            "model.to(device)"
            if "meta" in (tensor.device.type, wanted.type)
            else f"move the model and its inputs to one device, with model.to('{wanted}') or "
            f"{first}.to('{tensor.device}')"
        )
        raise refused(
            LinearQuantValueError,
            op,
            name,
            f"{name} is on {tensor.device} and {first} on {wanted}",
            "one device for all tensors of a call",
            todo,
            code=None,
        )


def _same(one: torch.device, other: torch.device) -> bool:
    """ "npu" is whichever npu is current, so it is the same as any."""
    if one.type != other.type:
        return False
    return one.index == other.index or one.index is None or other.index is None
