"""Dtypes of other graph operators, by their definitions.

Source: hicann/ops-nn, op_host/<operator>_def.cpp under activation and norm. A family that is not in
a row has no public definition, so cann_host does not know its dtypes.
"""

from __future__ import annotations

from .products import A2, A950, P310, soc_family
from .refusal import NO_KERNEL, Refusal, one_of

__all__ = ["DEFINED", "check_definition"]

_FLOATS = ("float16", "bfloat16", "float32")

# GE op type: {family: dtypes of the first input}
DEFINED: dict[str, dict[str, tuple[str, ...]]] = {
    "Gelu": {A950: _FLOATS},
    "GeluV2": {A950: _FLOATS},
    "LayerNormV4": {P310: ("float16",), A2: _FLOATS, A950: _FLOATS},
    "LogSoftmaxV2": {A950: _FLOATS},
    "Relu": {A950: (*_FLOATS, "int8", "int32", "int64")},
    "Sigmoid": {A950: _FLOATS},
    "SoftmaxV2": {A950: _FLOATS},
    "Softplus": {A950: _FLOATS},
    "SwiGlu": {P310: ("float16", "float32"), A2: _FLOATS, A950: _FLOATS},
    "Swish": {A950: _FLOATS},
}


def check_definition(type_: str, soc: str, x: str) -> Refusal | None:
    """Why a graph operator has no kernel for the dtype of its first input; None if it may have one.

    Args:
        type_: GE op type.
        soc: name of the chip.
        x: dtype of the first input.
    """
    allowed = DEFINED.get(type_, {}).get(soc_family(soc) or "")
    if allowed is None or x in allowed:
        return None
    return Refusal(f"x is {x}; {soc} allows {one_of(allowed)}", NO_KERNEL)
