"""The tensors of a layer that is split: devices keep their parts, state dicts the whole layer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    distribute_tensor,
)

from ..backends.npu import format_of
from ..errors import LinearQuantValueError
from ..modules.linear_quant import PARAMETERS, LinearQuant
from ..modules.quantized_linear import QuantizedLinear
from ..modules.split import SPLIT, Split

__all__ = [
    "check_same",
    "keep_state",
    "layer_in",
    "parameters_of",
    "part_of",
    "to_dtensors",
    "to_parts",
]


def keep_state(undo: ExitStack, *modules: nn.Module) -> None:
    """Let a stack undo all later changes to the modules, hooks and buffers included."""
    for module in modules:
        own = vars(module)
        undo.callback(_put_back, own, {**own})
        for held in own.values():
            # the dict itself is kept, because handles of hooks refer to it
            if isinstance(held, dict):
                undo.callback(_put_back, held, {**held})


def _put_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    held.clear()
    held.update(before)


def layer_in(module: LinearQuant | QuantizedLinear) -> LinearQuant:
    """The LinearQuant of a QuantizedLinear, or itself."""
    return module.linear if isinstance(module, QuantizedLinear) else module


def parameters_of(layer: LinearQuant) -> list[tuple[str, Tensor]]:
    """Names and tensors of the parameters that a layer has."""
    found = ((name, getattr(layer, name)) for name in PARAMETERS)
    return [(name, tensor) for name, tensor in found if tensor is not None]


def part_of(
    whole: Tensor, mesh: DeviceMesh, placement: Placement, source: int | None = None
) -> Tensor:
    """This device's part of a tensor.

    Args:
        whole: the tensor.
        mesh: of one dim.
        placement: how it is split.
        source: the rank whose values are used; None for each rank's own.
    """
    if not isinstance(placement, Partial):
        placed = distribute_tensor(whole, mesh, [placement], src_data_rank=source)
        return placed.to_local().contiguous()
    everywhere = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=source).to_local()
    return everywhere if mesh.get_local_rank() == 0 else torch.zeros_like(everywhere)


def to_dtensors(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of state_dict: parts become DTensors, which stand for the whole layer."""
    del metadata
    split: Split = vars(layer)[SPLIT]
    for name, placement in split.placements.items():
        key = prefix + name
        if key in state:
            state[key] = DTensor.from_local(state[key], split.mesh, [placement], run_check=False)


def to_parts(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook of load_state_dict: DTensors, or whole tensors, become this device's parts."""
    split: Split = vars(layer)[SPLIT]
    mesh = split.mesh
    for name, placement in split.placements.items():
        given = state.get(prefix + name)
        if isinstance(given, DTensor):
            same = given.device_mesh == mesh and tuple(given.placements) == (placement,)
            state[prefix + name] = (
                given.to_local() if same else part_of(given.full_tensor(), mesh, placement)
            )
        elif given is not None:
            state[prefix + name] = part_of(given, mesh, placement)


def check_same(style_name: str, layer: LinearQuant, mesh: DeviceMesh) -> None:
    """Refuse, on all ranks and before anything is split, layers that differ between the ranks.

    Raises:
        LinearQuantValueError: a rank has another checkpoint or another model.
    """
    everyone = [""] * mesh.size()
    mine = f"{layer.extra_repr()}, weight format {format_of(layer.weight)}"
    dist.all_gather_object(everyone, mine, group=mesh.get_group())
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise LinearQuantValueError(
                f"{style_name}: the ranks hold different layers. Rank 0 has ({everyone[0]}), rank "
                f"{rank} has ({theirs}). What to do: load the same checkpoint into the same model "
                "on every rank."
            )
