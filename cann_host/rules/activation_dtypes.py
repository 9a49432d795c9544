"""Dtypes that DynamicQuant and AscendQuant have in common, and the last dim that int4 needs."""

from __future__ import annotations

from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A950, soc_family
from .refusal import Refusal, one_of

__all__ = ["Dtypes", "check_dtypes"]

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "hifloat8")  # Ascend 950 quantizes to these too


class Dtypes(NamedTuple):
    """The dtypes that a family of products has.

    Attributes:
        x: of the input.
        y: of the quantized result. Graphs have int4; aclnn also int32 that holds eight int4 values.
    """

    x: tuple[str, ...]
    y: tuple[str, ...]


def check_dtypes(
    table: dict[str, Dtypes], soc: str, x: TensorDesc, y_dtype: str, code: int, *, is_graph: bool
) -> Refusal | None:
    """Why x or y is refused; None if they are accepted.

    Args:
        table: dtypes for each family of products.
        soc: name of the chip.
        x: input.
        y_dtype: dtype of the quantized result.
        code: CANN's error code of a refusal.
        is_graph: whether it is the graph's operator.
    """
    allowed = table.get(soc_family(soc) or "")
    if allowed is None:
        return Refusal(f"cann_host has no rules for {soc}", None)
    outputs = [dtype for dtype in allowed.y if not (is_graph and dtype == "int32")]
    if x.dtype not in allowed.x:
        return Refusal(f"x is {x.dtype}; {soc} allows {one_of(allowed.x)}", code)
    if y_dtype in _FLOAT8 and soc_family(soc) == A950:
        return Refusal(f"y is {y_dtype}, which cann_host does not compute", None)
    if y_dtype not in outputs:
        return Refusal(f"y is {y_dtype}; {soc} allows {one_of(outputs)}", code)
    parts = {"int4": 2, "int32": 8}.get(y_dtype, 1)
    if x.shape and x.shape[-1] % parts:
        return Refusal(
            f"x has last dim {x.shape[-1]}; for {y_dtype} it must be a multiple of {parts}", code
        )
    return None
