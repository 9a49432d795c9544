"""Writing into a cache: operators that update a part of a tensor in place.

Source: hicann/ops-nn index, for each operator its document and kernel. A graph lets an operator
write into the caller's memory only where GE does: see `Op.writes`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, describe, op
from cann_host.rules import (
    ScatterCall,
    check_scatter_elements,
    check_scatter_nd_update,
    check_scatter_update,
    outside,
)

_FEW = 64  # values that Python compares faster than torch


def check_range(name: str, indices: Tensor, sizes: list[int], what: str) -> None:
    """Refuse an index outside of its dim.

    Args:
        name: of the tensor.
        indices: (..., dims).
        sizes: of the dims.
        what: what is indexed.

    Raises:
        GraphError: there is one.
    """
    rows = indices.reshape(-1, len(sizes))
    if rows.numel() > _FEW:
        limits = torch.tensor(sizes, dtype=torch.int64)
        wrong = ((rows < 0) | (rows >= limits)).any(1)
        if not bool(wrong.any()):
            return
        rows = rows[wrong][:1]
    for row in rows.tolist():
        for dim, (value, size) in enumerate(zip(row, sizes, strict=True)):
            if not 0 <= value < size:
                raise GraphError(outside(name, value, size, f"dim {dim} of {what}"))


def last_writers(name: str, linear: Tensor, updates: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and updates without repeated rows: the last one of each is kept. Warns if that matters.

    Args:
        name: of the tensor of indices.
        linear: (n,), row of each update.
        updates: (n, ...).
    """
    if linear.numel() < 2:
        return linear, updates
    rows, inverse = linear.unique(return_inverse=True)
    if rows.numel() == linear.numel():
        return linear, updates
    last = torch.zeros_like(rows).scatter_reduce_(
        0, inverse, torch.arange(linear.numel()), "amax", include_self=False
    )
    if not torch.equal(updates[last[inverse]], updates):
        executor.caution(
            f"{name} repeats rows with different updates: which one remains is not defined on the "
            "device; here it is the last one"
        )
    return rows, updates[last]


def _plain(x: Tensor) -> Tensor:
    """float8 as bytes: torch does not index it on a CPU."""
    return x.view(torch.uint8) if x.is_floating_point() and x.element_size() == 1 else x


def scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Write updates into var, which is returned.

    Args:
        var: any.
        indices: (..., k), of the first k dims of var.
        updates: (..., the other dims of var).

    Raises:
        GraphError: an index is outside.
    """
    if executor.is_meta(var) or not (var.numel() and indices.numel() and updates.numel()):
        return var
    dims = indices.shape[-1]
    sizes, places = list(var.shape[:dims]), indices.reshape(-1, dims).long()
    check_range("indices", places, sizes, "var")
    values = updates.reshape(-1, *var.shape[dims:])
    linear = places[:, 0]
    for size, place in zip(sizes[1:], places.unbind(1)[1:], strict=True):
        linear = linear * size + place
    rows, values = last_writers("indices", linear, values)
    where = []
    for size in reversed(sizes[1:]):
        where.append(rows % size)
        rows = rows // size
    where.append(rows)
    _plain(var)[tuple(reversed(where))] = _plain(values)
    return var


def scatter_update(var: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """Write a window of each batch into var, which is returned.

    Args:
        var: (batches, ...).
        indices: (b,), first place of the window along axis for each of the first b batches; (b, 2)
            batch and place; or without dims, for the first batch.
        updates: (b, ...), a window as long as its axis.
        axis: not 0.

    Raises:
        GraphError: a window is outside.
    """
    if executor.is_meta(var):
        return var
    axis %= var.dim()
    length = updates.shape[axis]
    if indices.dim() == 2:
        places = indices.tolist()
    else:
        places = list(enumerate(indices.reshape(-1).tolist()))
    for batch, first in places:  # all are checked before one is written
        if not 0 <= batch < var.shape[0]:
            raise GraphError(outside("indices", batch, var.shape[0], "dim 0 of var"))
        if not 0 <= first <= var.shape[axis] - length:
            room = f"for {length} values dim {axis} of var"
            raise GraphError(outside("indices", first, var.shape[axis], room))
    for (batch, first), window in zip(places, _plain(updates), strict=True):
        _plain(var)[batch].narrow(axis - 1, first, length).copy_(window)
    return var


def _call(
    var: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none"
) -> ScatterCall:
    tensors = describe(var), describe(indices), describe(updates)
    return ScatterCall(executor.soc_name(), *tensors, axis, reduction, is_graph=True)


@op("ScatterNdUpdate", writes=("var",))
def _scatter_nd_update(
    var: Tensor, indices: Tensor, updates: Tensor, *, use_locking: bool = False
) -> Tensor:
    call = _call(var, indices, updates)
    if refusal := check_scatter_nd_update(call):
        raise GraphError(refusal)
    return scatter_nd_update(var, indices, updates)


@op("Scatter", writes=("var",))
def _scatter(
    var: Tensor, indices: Tensor, updates: Tensor, *, reduce: str = "update", axis: int = 0
) -> Tensor:
    call = _call(var, indices, updates, axis, reduce)
    if refusal := check_scatter_update(call):
        raise GraphError(refusal)
    return scatter_update(var, indices, updates, axis)


@op("Assign", writes=("ref",))
def _assign(
    ref: Tensor, value: Tensor, *, validate_shape: bool = True, use_locking: bool = False
) -> Tensor:
    if ref.shape != value.shape or ref.dtype != value.dtype:
        raise GraphError(f"ref is {describe(ref)} and value {describe(value)}")
    return ref.copy_(value)


@op("ScatterElements", "ScatterElementsV2")
def _scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    call = _call(data, indices, updates, axis, reduction)
    if refusal := check_scatter_elements(call):
        raise GraphError(refusal)
    if not indices.numel() or executor.is_meta(data):
        return data.clone()
    size = data.shape[axis] if data.dim() else 1
    places = indices.long()
    places = torch.where(places < 0, places + size, places)
    check_range("indices", places, [size], f"dim {axis} of data")
    if reduction == "add":
        return data.scatter_add(axis, places, updates)
    if reduction == "mul":
        return data.scatter_reduce(axis, places, updates, "prod")
    return data.scatter(axis, places, updates)
