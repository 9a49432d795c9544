"""Checks that several operators share."""

from __future__ import annotations

from cann_host.memory import has_overlap
from cann_host.rules import NULL_POINTER

from .refusal import RefusedError
from .tensors import BASE_FORMATS, AclTensor, Argument

__all__ = ["compute_base_format_only", "need", "need_base_format", "update_without_overlap"]


def need(**arguments: Argument) -> None:
    """Refuse a null pointer, and name its argument."""
    for name, argument in arguments.items():
        if argument is None:
            raise RefusedError(f"{name} is null", NULL_POINTER)


def need_base_format(**tensors: AclTensor | None) -> None:
    """For an operator whose checks in CANN refuse an internal format."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.format not in BASE_FORMATS:
            raise RefusedError(f"{name} has the internal format {tensor.format}; it must be ND")


def compute_base_format_only(**tensors: AclTensor | None) -> None:
    """For an operator whose checks in CANN do not check this; cann_host does not compute it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.format not in BASE_FORMATS:
            raise RefusedError(
                f"{name} has the internal format {tensor.format}; cann_host takes ND here", None
            )


def update_without_overlap(**tensors: AclTensor) -> None:
    """For an operator that writes parts of tensors: CANN does not check that elements share memory,
    and does not document which of several values remains."""
    for name, tensor in tensors.items():
        if has_overlap(tensor.shape, tensor.strides):
            raise RefusedError(
                f"elements of {name}, of shape {tensor.shape} and strides {tensor.strides}, share "
                "memory. CANN takes the call, and the order of its writes is not documented; this "
                "refusal is cann_host's own",
                None,
            )
