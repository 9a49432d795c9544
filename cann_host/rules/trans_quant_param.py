"""TransQuantParamV2 and its aclnn functions.

Source: hicann/ops-nn quant/trans_quant_param_v2: for a graph op_host, its tiling and InferShape;
for an eager call op_host/op_api/aclnn_trans_quant_param_v2.cpp; op_kernel/trans_quant_param_v2.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A950, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal

__all__ = [
    "PackedWords",
    "TransQuantParamCall",
    "check_trans_quant_param",
    "packed_words",
    "trans_quant_param_shape",
]


class TransQuantParamCall(NamedTuple):
    """A call of TransQuantParamV2.

    Attributes:
        soc: name of the chip.
        scale: (n,) or (1, n) float32; on Ascend 950 any shape in a graph, (g, n) eagerly.
        offset: (n,), (1, n) or None.
        round_mode: 0 or 1.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    scale: TensorDesc
    offset: TensorDesc | None = None
    round_mode: int = 0
    is_graph: bool = False


def check_trans_quant_param(call: TransQuantParamCall) -> Refusal | None:
    """Why a TransQuantParamV2 is refused; None if it is accepted.

    The tiling of a graph does not check offset's shape. Only aclnn compares the two lengths, and
    only if offset has one dim: see `packed_words`.
    """
    code = TILING if call.is_graph else INVALID
    given = {"scale": call.scale} | ({} if call.offset is None else {"offset": call.offset})
    for name, tensor in given.items():
        if tensor.dtype != "float32":
            return Refusal(
                f"{name} is {tensor.dtype}; it must be float32",
                NO_KERNEL if call.is_graph else code,
            )
    if call.round_mode not in (0, 1):
        return Refusal(f"round_mode is {call.round_mode}; it must be 0 or 1", code)
    for name, tensor in given.items():
        if not _has_shape_of(call, name, tensor.shape):
            return Refusal(f"{name} has shape {tensor.shape}; it must be (n,) or (1, n)", code)
    if call.offset is None or call.is_graph or len(call.offset.shape) != 1:
        return None
    lengths = call.scale.shape[0], call.offset.shape[0]
    if min(lengths) > 1 and lengths[0] != lengths[1]:
        return Refusal(
            f"offset has shape {call.offset.shape} but scale {call.scale.shape}; they must agree "
            "or have one element",
            code,
        )
    return None


def _has_shape_of(call: TransQuantParamCall, name: str, shape: tuple[int, ...]) -> bool:
    is_950 = soc_family(call.soc) == A950
    if call.is_graph and (is_950 or name == "offset"):
        return True
    if min(shape, default=0) <= 0:
        return False
    groups = is_950 and name == "scale"
    return len(shape) == 1 or (len(shape) == 2 and (shape[0] == 1 or groups))


def trans_quant_param_shape(
    soc: str, scale: Sequence[int], offset: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape that InferShape declares for TransQuantParamV2's result.

    It is the shape of scale, or of an offset with more dims; on Ascend 950 also of a longer offset,
    if both have one dim.
    """
    if offset is None:
        return tuple(scale)
    longer = len(scale) == len(offset) == 1 and offset[0] > scale[0]
    if len(offset) > len(scale) or (longer and soc_family(soc) == A950):
        return tuple(offset)
    return tuple(scale)


@dataclass(frozen=True)
class PackedWords:
    """How TransQuantParamV2's kernel uses the memory of its result.

    Attributes:
        refusal: why cann_host does not compute the call, though CANN takes it: the kernel would
            read outside scale or offset, or leave words unwritten.
        overrun: a message if the kernel writes words past the result.
    """

    refusal: Refusal | None = None
    overrun: str | None = None


def packed_words(
    scale: Sequence[int], offset: Sequence[int] | None, room: Sequence[int]
) -> PackedWords:
    """Compare the values that TransQuantParamV2 reads and writes with the shapes of its tensors.

    The kernel writes as many words as the longer of scale and offset has values, independent of the
    shape of its result. It repeats an operand of one value.

    Args:
        scale: shape of scale.
        offset: shape of offset, or None.
        room: shape of the result, from InferShape or from the caller of aclnn.
    """
    lengths = {"scale": math.prod(scale), "offset": 0 if offset is None else math.prod(offset)}
    words, places = max(lengths.values()), math.prod(room)
    given = f"scale {tuple(scale)} and offset {None if offset is None else tuple(offset)}"
    no_values = "CANN does not check this, and cann_host has no values for the rest"
    for name, length in lengths.items():
        if length < min(words, places) and length != 1 and (name == "scale" or length):
            reason = f"{given}: {name} has {length} values and {words} are read; {no_values}"
            return PackedWords(refusal=Refusal(reason, None))
    if places > words:
        reason = f"{given}: {words} words for a result of shape {tuple(room)}; {no_values}"
        return PackedWords(refusal=Refusal(reason, None))
    if places == words:
        return PackedWords()
    reads = ", and a matmul reads word 0 for every column" if places == 1 else ""
    return PackedWords(
        overrun=f"TransQuantParamV2 with {given}: its result has shape {tuple(room)}, and the "
        f"kernel writes {words} words: {words - places} overwrite other memory{reads}. Expand "
        "scale to offset's length, as lq_graph does. (cann_host's caution; CANN reports nothing.)"
    )
