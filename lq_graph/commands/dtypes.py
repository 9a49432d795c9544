"""Dtypes and tensors as they are written on the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import LinearQuantValueError

if TYPE_CHECKING:
    import torch

    from ..rules.plan import Spec

__all__ = ["dtype_of", "tensor_of"]

_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_of(option: str, text: str) -> torch.dtype:
    """The dtype of that name.

    Args:
        option: for the message: "--output".
        text: "int8", "bf16", ...

    Raises:
        LinearQuantValueError: torch has none of that name.
    """
    import torch

    found = getattr(torch, _SHORT.get(text, text), None)
    if not isinstance(found, torch.dtype):
        raise LinearQuantValueError(
            f"argument {option}: {text!r} is not a dtype; write int8, int4, float32, bfloat16, ..."
        )
    return found


def tensor_of(option: str, text: str) -> torch.dtype | Spec:
    """The tensor that int8, int8[16,512] or int4[16,512] stands for; int4 is int32 that holds eight
    values.

    Raises:
        LinearQuantValueError: text of another form.
    """
    import torch

    from ..kernels import storage_k
    from ..rules.plan import Spec
    from ..rules.tables import STORAGE_DTYPES

    found = re.fullmatch(r"(\w+)(?:\[([\d,\s]*)\])?", text.strip())
    if not found:
        raise LinearQuantValueError(
            f"argument {option}: {text!r} is not of the form int8 or int8[16,512]"
        )
    name, sizes = found.groups()
    int4 = name == "int4"
    dtype = torch.int32 if int4 else dtype_of(option, name)
    if sizes is None:
        return dtype
    shape = [int(size) for size in sizes.split(",") if size.strip()]
    if int4 and shape:
        pack = STORAGE_DTYPES[torch.int32]
        if shape[-1] % pack:
            raise LinearQuantValueError(
                f"argument {option}: {text!r}: k of int4 must be a multiple of {pack}, the values "
                "in an int32"
            )
        shape[-1] = storage_k(shape[-1], torch.int32)
    return Spec(dtype, tuple(shape))
