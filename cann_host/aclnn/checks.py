"""Checks that several operators share."""

from __future__ import annotations

from cann_host.rules import NULL_POINTER

from .refusal import RefusedError
from .tensors import BASE_FORMATS, AclTensor, Argument

__all__ = ["compute_base_format_only", "need", "need_base_format"]


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
