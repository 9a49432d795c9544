"""Checks that all tensors of a call are on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LinearQuantValueError
from .refusal import refused

__all__ = ["check_devices"]


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that are on several devices.

    The fake kernels call it. Without it, a call with one meta tensor would return uninitialised
    memory, and a graph would expect tensors on another device than they have at run time. The
    dispatcher does not call the CPU kernel with tensors of other devices. torch_npu checks devices
    itself: there this check only replaces its error by ours.

    Args:
        op: the operator's name, for the message.
        tensors: by argument; the others must be on the device of the first; None for absent.

    Raises:
        LinearQuantValueError: names the first tensor on another device.
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
    """Whether two devices are the same; "npu" is the current npu, so it equals any of them."""
    if one.type != other.type:
        return False
    return one.index == other.index or one.index is None or other.index is None
