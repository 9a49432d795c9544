"""Writing into a cache."""

from __future__ import annotations

from typing import NamedTuple

from cann_host.graph.ops.cache import scatter_nd_update, scatter_update
from cann_host.rules import ScatterCall, check_scatter_nd_update, check_scatter_update

from .checks import compute_base_format_only, need, update_without_overlap
from .operator import Operator
from .refusal import raise_refusal
from .tensors import AclTensor

__all__ = ["OPERATORS"]


class ScatterNdUpdateArguments(NamedTuple):
    var: AclTensor
    indices: AclTensor
    updates: AclTensor


class ScatterUpdateArguments(NamedTuple):
    data: AclTensor
    indices: AclTensor
    updates: AclTensor
    axis: int


def _check_scatter_nd_update(call: ScatterNdUpdateArguments, soc: str) -> None:
    need(var=call.var, indices=call.indices, updates=call.updates)
    var, indices, updates = call
    raise_refusal(check_scatter_nd_update(ScatterCall(soc, var.desc, indices.desc, updates.desc)))
    compute_base_format_only(var=var, indices=indices, updates=updates)
    update_without_overlap(var=var)


def _scatter_nd_update(call: ScatterNdUpdateArguments, _soc: str) -> None:
    scatter_nd_update(call.var.view(), call.indices.view(), call.updates.view())


def _check_scatter_update(call: ScatterUpdateArguments, soc: str) -> None:
    data, indices, updates, axis = call
    need(data=data, indices=indices, updates=updates)
    raise_refusal(
        check_scatter_update(
            ScatterCall(soc, data.desc, indices.desc, updates.desc, axis, "update")
        )
    )
    compute_base_format_only(data=data, indices=indices, updates=updates)
    update_without_overlap(data=data)


def _scatter_update(call: ScatterUpdateArguments, _soc: str) -> None:
    scatter_update(call.data.view(), call.indices.view(), call.updates.view(), call.axis)


OPERATORS = (
    Operator(
        "aclnnScatterNdUpdate",
        ScatterNdUpdateArguments,
        _check_scatter_nd_update,
        _scatter_nd_update,
    ),
    Operator(
        "aclnnInplaceScatterUpdate", ScatterUpdateArguments, _check_scatter_update, _scatter_update
    ),
)
