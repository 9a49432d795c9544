"""The dtypes that LinearQuant's constructor is told: `x1_dtype`, `x2_dtype` and `dtype`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LinearQuantTypeError
from ..rules.refusal import refused
from ..rules.tables import STORAGE_DTYPES, dtype_name

__all__ = ["check_stated", "storage_dtype"]


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
