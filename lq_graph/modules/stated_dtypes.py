"""What LinearQuant's constructor is told, held against the tensors: `x1_dtype`, `x2_dtype`, `dtype`
and in_features."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LinearQuantTypeError, LinearQuantValueError
from ..kernels import PartialGroupError, logical_k, storage_k
from ..rules.refusal import refused
from ..rules.tables import STORAGE_DTYPES, dtype_name

__all__ = ["check_stated", "check_whole_words", "storage_dtype"]


def storage_dtype(**given: torch.dtype | None) -> torch.dtype:
    """The dtype on which the constructor's three dtype arguments agree; int8 if none is given."""
    chosen: dict[str, torch.dtype] = {k: v for k, v in given.items() if v is not None}
    for name, dtype in chosen.items():
        if dtype not in STORAGE_DTYPES:
            raise LinearQuantTypeError(
                f"LinearQuant: {name} is {dtype}; allowed are torch.int8 and torch.int32 (eight "
                "int4 each). What to do: leave it None for int8. The output's dtype is "
                "output_dtype."
            )
    if len(set(chosen.values())) > 1:
        listed = ", ".join(f"{name}={dtype_name(dtype)}" for name, dtype in chosen.items())
        raise LinearQuantTypeError(
            f"LinearQuant: {listed}; input and weight have one dtype. What to do: give one of them."
        )
    return next(iter(chosen.values()), torch.int8)


def check_stated(name: str, tensor: Tensor, stated: torch.dtype) -> None:
    """Check a tensor against the dtype that the constructor got."""
    if tensor.dtype != stated:
        tensor_name = "weight" if name == "x2" else name
        raise refused(
            LinearQuantTypeError,
            "LinearQuant",
            tensor_name,
            f"{tensor_name} is {dtype_name(tensor.dtype)}, and the layer was made with "
            f"{name}_dtype={dtype_name(stated)}",
            dtype_name(stated),
            f"pass {dtype_name(stated)}",
            f"leave {name}_dtype at None",
        )


def check_whole_words(what: str, in_features: int, weight: Tensor) -> None:
    """Refuse an int4 weight if in_features is not a multiple of 8. An in_features that counts the
    int32 words, as in some models with the vendor's module, is accepted.

    Args:
        what: the layer, for the message.
        in_features: of the layer.
        weight: int8 (..., n, k), or int32 (..., n, k/8).

    Raises:
        LinearQuantValueError: in_features is neither the number of words nor a multiple of 8.
    """
    words = weight.shape[-1]
    if words == in_features:
        return
    try:
        storage_k(in_features, weight.dtype)
    except PartialGroupError as error:
        k = logical_k(words, weight.dtype)
        raise LinearQuantValueError(
            f"{what}: in_features is {in_features}, and weight is {dtype_name(weight.dtype)} "
            f"{tuple(weight.shape)} and holds k = {k} int4 values in a row; with int4, in_features "
            f"must be a multiple of {error.group}. What to do: make the layer with "
            f"in_features={k}, or pad k with zeros in x1 and weight alike before packing."
        ) from None
