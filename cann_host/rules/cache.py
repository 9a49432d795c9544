"""Writing into a cache: ScatterNdUpdate, Scatter (aclnnInplaceScatterUpdate) and ScatterElements.

Source: hicann/ops-nn index/scatter_nd_update, index/scatter and index/scatter_elements: op_api for
an eager call, definition and tiling under op_host, the documents for what only they say. A kernel
of an older product that has no public tiling is held to the document.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .descriptors import TensorDesc
from .products import A2, A950, P310, soc_family
from .refusal import INVALID, NO_KERNEL, TILING, Refusal, one_of

__all__ = [
    "ScatterCall",
    "check_scatter_elements",
    "check_scatter_nd_update",
    "check_scatter_update",
    "outside",
]

_INDICES = ("int32", "int64")
_FLOAT8 = ("float8_e5m2", "float8_e4m3fn")
_ND_UPDATE = {
    P310: ("float32", "float16", "bool"),
    A2: ("float32", "float16", "bfloat16", "bool", "int64", "int32", "int16", "int8"),
    A950: ("float32", "float16", "bfloat16", "bool", "int64", "int8", "uint8", *_FLOAT8),
}
_UPDATE = {
    P310: ("int8", "float16", "float32", "int32"),
    A2: ("int8", "float16", "float32", "bfloat16", "int32"),
    A950: ("int8", "float16", "float32", "bfloat16", "uint8", "int32", *_FLOAT8),
}
_ELEMENTS_MORE = ("float64", "int16", "int64", "bool")  # by an AI CPU
_ELEMENTS = {
    P310: ("float16", "float32", "int8", "int32", "uint8", *_ELEMENTS_MORE),
    A2: ("float16", "float32", "bfloat16", "int8", "int32", "uint8", *_ELEMENTS_MORE),
    A950: ("float16", "float32", "bfloat16", "int8", "int32", "uint8", "int16", "int64"),
}
_REDUCTIONS = ("none", "add", "mul")


class ScatterCall(NamedTuple):
    """A call that writes updates into var.

    Attributes:
        soc: name of the chip.
        var: what is written into; `data` in some documents.
        indices: where.
        updates: what is written.
        axis: attribute of that name.
        reduction: of ScatterElements, or reduce of Scatter.
        is_graph: whether it is the graph's operator.
    """

    soc: str
    var: TensorDesc
    indices: TensorDesc
    updates: TensorDesc
    axis: int = 0
    reduction: str = "none"
    is_graph: bool = False

    @property
    def shapes(self) -> str:
        var, indices, updates = self.var.shape, self.indices.shape, self.updates.shape
        return f"var has shape {var}, indices {indices} and updates {updates}"


def _check_dtypes(call: ScatterCall, table: dict[str, tuple[str, ...]]) -> Refusal | None:
    allowed = table.get(soc_family(call.soc) or "")
    code = NO_KERNEL if call.is_graph else INVALID
    if allowed is None:
        return Refusal(f"cann_host has no rules for {call.soc}", None)
    if call.var.dtype not in allowed:
        return Refusal(f"var is {call.var.dtype}; {call.soc} allows {one_of(allowed)}", code)
    if call.indices.dtype not in _INDICES:
        return Refusal(f"indices is {call.indices.dtype}; it must be {one_of(_INDICES)}", code)
    if call.updates.dtype != call.var.dtype:
        return Refusal(f"updates is {call.updates.dtype} and var {call.var.dtype}", code)
    return None


@lru_cache(maxsize=4096)  # a model makes the same few calls again and again
def check_scatter_nd_update(call: ScatterCall) -> Refusal | None:
    """Why a ScatterNdUpdate is refused; None if it is accepted. CANN does not compare the shapes:
    its kernel would read or write outside, which cann_host refuses."""
    if refusal := _check_dtypes(call, _ND_UPDATE):
        return refusal
    var, indices, updates = call.var.shape, call.indices.shape, call.updates.shape
    if 0 in var or 0 in indices or 0 in updates:
        return None  # nothing is written
    if not indices or indices[-1] > len(var):
        return Refusal(
            f"{call.shapes}; its last dim counts dims of var (refused by cann_host)",
            None,
        )
    wanted = (*indices[:-1], *var[indices[-1] :])
    if updates != wanted:
        return Refusal(f"{call.shapes}; updates must be {wanted} (refused by cann_host)", None)
    return None


@lru_cache(maxsize=4096)
def check_scatter_update(call: ScatterCall) -> Refusal | None:
    """Why a Scatter with reduce "update" is refused; None if it is accepted."""
    if refusal := _check_dtypes(call, _UPDATE):
        return refusal
    var, indices, updates = call.var.shape, call.indices.shape, call.updates.shape
    first = TILING if call.is_graph else INVALID
    if 0 in var or 0 in indices or 0 in updates:
        return Refusal(f"{call.shapes}; they cannot be empty", first)
    if len(var) != len(updates) or not var:
        return Refusal(f"{call.shapes}; var and updates must have equally many dims", first)
    if len(indices) > 2:
        return Refusal(f"{call.shapes}; indices can have 0 to 2 dims", first)
    if not indices and updates[0] != 1:
        return Refusal(f"{call.shapes}; without dims of indices, updates has a batch of 1", first)
    if call.reduction not in ("update", "none", ""):
        return Refusal(f"reduce is {call.reduction!r}; it must be 'update'", TILING)
    rank = len(var)
    if not -rank < call.axis < rank or call.axis == 0:
        return Refusal(
            f"axis is {call.axis}; it must be in {1 - rank} to {rank - 1}, and not 0", TILING
        )
    axis = call.axis % rank
    batch = indices[0] if indices else 1
    others = [i for i in range(1, rank) if i != axis]
    if (
        (len(indices) == 2 and indices[1] != 2)
        or updates[0] != batch
        or batch > var[0]
        or any(updates[i] != var[i] for i in others)
    ):
        return Refusal(
            f"{call.shapes}, axis {call.axis}; indices must be ({updates[0]},) or "
            f"({updates[0]}, 2), updates as large as var except in dim 0 and axis",
            TILING,
        )
    if updates[axis] > var[axis]:
        return Refusal(f"{call.shapes}; updates does not fit along axis {call.axis}", TILING)
    return None


@lru_cache(maxsize=4096)
def check_scatter_elements(call: ScatterCall) -> Refusal | None:
    """Why a ScatterElements is refused; None if it is accepted."""
    if refusal := _check_dtypes(call, _ELEMENTS):
        return refusal
    var, indices, updates = call.var.shape or (1,), call.indices.shape or (1,), call.updates.shape
    updates = updates or (1,)
    rank = len(var)
    if call.reduction not in _REDUCTIONS:
        return Refusal(f"reduction is {call.reduction!r}; it must be {one_of(_REDUCTIONS)}", TILING)
    if not len(indices) == len(updates) == rank:
        return Refusal(f"{call.shapes}; they must have equally many dims", TILING)
    if not -rank <= call.axis < rank:
        return Refusal(f"axis is {call.axis}; it must be in {-rank} to {rank - 1}", TILING)
    axis = call.axis % rank
    fits = all(i <= u for i, u in zip(indices, updates, strict=True))
    if not fits or any(indices[i] > var[i] for i in range(rank) if i != axis):
        return Refusal(
            f"{call.shapes}; indices must fit into updates, and into var except along axis", TILING
        )
    if soc_family(call.soc) == A950 and indices != updates:
        return Refusal(f"{call.shapes}; indices and updates must have the same shape", TILING)
    return None


def outside(name: str, value: int, size: int, where: str) -> Refusal:
    """The refusal for an index outside of a dim: CANN's documents do not allow it, and its kernel
    would write outside or leave the row out.

    Args:
        name: of the tensor of indices.
        value: the index.
        size: of the dim.
        where: what it indexes.
    """
    return Refusal(
        f"{name} has {value}, and {where} has {size}. CANN does not check it, and its documents do "
        "not allow it; cann_host refuses it",
        None,
    )
