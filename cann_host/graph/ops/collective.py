"""Collectives of HCCL in a graph. They call the same code as eager ones (csrc/hccl.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from cann_host import runtime
from cann_host.graph.executor import Dynamic, GraphError, op

# numbers of csrc/hccl.h
_ALL_REDUCE, _REDUCE_SCATTER, _ALL_GATHER, _BROADCAST = 0, 2, 3, 4
_REDUCTIONS = {"sum": 0, "prod": 1, "max": 2, "min": 3}
_DTYPES = {
    torch.int8: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.float16: 3,
    torch.float32: 4,
    torch.int64: 5,
    torch.uint8: 7,
    torch.float64: 10,
    torch.bfloat16: 11,
}


def _run(
    group: str, kind: int, x: Tensor, out: Tensor, count: int, reduction: str = "sum", root: int = 0
) -> Tensor:
    if x.dtype not in _DTYPES or reduction not in _REDUCTIONS:
        raise GraphError(f"x is {x.dtype}, reduction {reduction}; HCCL has no such collective")
    if x.is_meta:
        return out
    library, x = runtime.current().library, x.contiguous()
    numbers = (kind, _DTYPES[x.dtype], _REDUCTIONS[reduction], root, count)
    code = library.cann_host_hccl_run(group.encode(), *numbers, x.data_ptr(), out.data_ptr())
    if code:
        text = library.cann_host_recent_error().decode(errors="replace")
        raise GraphError(f"{text} (HCCL error {code})")
    return out


def _check_ranks(group: str, rank_size: int) -> None:
    have = runtime.current().library.cann_host_hccl_ranks(group.encode())
    if rank_size != have:
        raise GraphError(f"rank_size is {rank_size}, and {group} has {have} ranks")


@op("HcomAllReduce", only_at_run_time=True)
def _all_reduce(
    x: Tensor, *, reduction: str, group: str, fusion: int = 1, fusion_id: int = -1
) -> Tensor:
    del fusion, fusion_id
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _run(group, _ALL_REDUCE, x, out, x.numel(), reduction)


@op("HcomReduceScatter", only_at_run_time=True)
def _reduce_scatter(
    x: Tensor,
    *,
    reduction: str,
    group: str,
    rank_size: int,
    fusion: int = 0,
    fusion_id: int = -1,
) -> Tensor:
    del fusion, fusion_id
    _check_ranks(group, rank_size)
    if x.dim() == 0 or x.shape[0] % rank_size:
        raise GraphError(f"x has shape {tuple(x.shape)}; its first dim has to split in {rank_size}")
    out = x.new_empty(x.shape[0] // rank_size, *x.shape[1:])
    return _run(group, _REDUCE_SCATTER, x, out, out.numel(), reduction)


@op("HcomAllGather", only_at_run_time=True)
def _all_gather(
    x: Tensor, *, rank_size: int, group: str, fusion: int = 0, fusion_id: int = -1
) -> Tensor:
    del fusion, fusion_id
    _check_ranks(group, rank_size)
    if x.dim() == 0:
        raise GraphError("x has no dims to gather on")
    out = x.new_empty(x.shape[0] * rank_size, *x.shape[1:])
    return _run(group, _ALL_GATHER, x, out, x.numel())


@op("HcomBroadcast", only_at_run_time=True)
def _broadcast(
    x: Dynamic, *, root_rank: int, group: str, fusion: int = 0, fusion_id: int = -1
) -> list[Tensor]:
    del fusion, fusion_id
    copies = [one.contiguous().clone() for one in x]
    return [_run(group, _BROADCAST, one, one, one.numel(), root=root_rank) for one in copies]
