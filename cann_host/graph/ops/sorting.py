"""Sorting and searching: operators that compare values and return positions."""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host.graph.executor import GraphError, Host, dtype_name, ints, op, torch_dtype


@op("TopKV2")
def _top_k(
    x: Tensor,
    k: Host,
    *,
    sorted: bool = True,
    dim: int = -1,
    largest: bool = True,
    indices_dtype: int = 3,
    sort_policy: int = 1,  # which algorithm the kernel takes
) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(ints(k)[0], dim, largest, sorted)
    return values, indices.to(torch_dtype(indices_dtype))


@op("ArgMaxWithValue")
def _arg_max_with_value(
    x: Tensor, *, dimension: int, keep_dims: bool = False
) -> tuple[Tensor, Tensor]:
    values, indices = x.max(dimension, keepdim=keep_dims)
    return indices.to(torch.int32), values


@op("ArgMinWithValue")
def _arg_min_with_value(
    x: Tensor, *, dimension: int, keep_dims: bool = False
) -> tuple[Tensor, Tensor]:
    values, indices = x.min(dimension, keepdim=keep_dims)
    return indices.to(torch.int32), values


@op("ArgMaxV2")
def _arg_max(x: Tensor, dimension: Host, *, dtype: int = 9) -> Tensor:
    return x.argmax(ints(dimension)[0]).to(torch_dtype(dtype))


@op("ArgMin")
def _arg_min(x: Tensor, dimension: Host, *, dtype: int = 9) -> Tensor:
    return x.argmin(ints(dimension)[0]).to(torch_dtype(dtype))


@op("Sort")
def _sort(
    x: Tensor,
    *,
    axis: int = -1,
    descending: bool = False,
    stable: bool = False,
    y2_dtype: int = 3,
) -> tuple[Tensor, Tensor]:
    """Always stable, so that equal values do not differ between two runs."""
    values, indices = torch.sort(x, dim=axis, descending=descending, stable=True)
    return values, indices.to(torch_dtype(y2_dtype))


@op("SearchSorted")
def _search_sorted(
    sorted_sequence: Tensor,
    values: Tensor,
    sorter: Tensor | None = None,
    *,
    dtype: int = 9,
    right: bool = False,
) -> Tensor:
    if values.dtype != sorted_sequence.dtype:
        raise GraphError(
            f"values is {dtype_name(values)} and sorted_sequence {dtype_name(sorted_sequence)}; "
            "SearchSorted takes one dtype"
        )
    found = torch.searchsorted(sorted_sequence, values.contiguous(), right=right, sorter=sorter)
    return found.to(torch_dtype(dtype))
