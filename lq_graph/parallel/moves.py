"""Tensors that move between devices, from one layout to another."""

from __future__ import annotations

from typing import Any

import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    Partial,
    Placement,
    Shard,
)

from ..errors import LinearQuantValueError

__all__ = ["at_front", "move", "wait_for"]


def at_front(placement: Placement, tensor: Tensor) -> Placement:
    """A placement with its dim counted from the front."""
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + tensor.dim())
    return placement


def wait_for(x: Any) -> Tensor:
    """Wait for a collective's result, so that the error of a rank that is gone is raised here and
    not later. In a graph the result is already a plain tensor."""
    out: Tensor = x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x
    return out


def move(x: Tensor, have: Placement, want: Placement, mesh: DeviceMesh) -> Tensor:
    """Move a plain tensor from one placement to another.

    Args:
        x: this device's part.
        have, want: the placements.
        mesh: of one dim.

    Raises:
        LinearQuantValueError: a dim that cannot be split into equal parts.
    """
    have, want = at_front(have, x), at_front(want, x)
    if have == want or mesh.size() == 1:
        return x
    if isinstance(want, Shard) and x.shape[want.dim] % mesh.size():
        raise LinearQuantValueError(
            f"dim {want.dim} of {tuple(x.shape)} cannot be split into {mesh.size()} equal parts, "
            "one for each device. What to do: pad it, or use Replicate()."
        )
    group = mesh.get_group()
    if isinstance(have, Partial):
        if isinstance(want, Shard):
            return wait_for(collectives.reduce_scatter_tensor(x, "sum", want.dim, group))
        return wait_for(collectives.all_reduce(x, "sum", group))
    if isinstance(have, Shard):
        x = wait_for(collectives.all_gather_tensor(x.contiguous(), have.dim, group))
    if isinstance(want, Shard):
        return x.chunk(mesh.size(), want.dim)[mesh.get_local_rank()].contiguous()
    return x
