"""Layers that are split over devices: their mark, and the interface of the styles that split them.

lq_graph.parallel has the styles. This module has what other packages need of them, without an
import of torch.distributed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

    from .linear_quant import LinearQuant
    from .quantized_linear import QuantizedLinear

__all__ = ["SPLIT", "Split", "SplitStyle"]

# Attribute of a LinearQuant that holds a part of a layer: its Split.
SPLIT = "_lq_graph_split"


@dataclass(frozen=True)
class Split:
    """How a layer is split.

    Attributes:
        mesh: over which devices.
        placements: by parameter.
        save, load: hooks of its state dicts, which hold the whole layer.
        hooks: ids of its own hooks: these, and those of the layer's forward.
    """

    mesh: DeviceMesh
    placements: dict[str, Placement]
    save: Callable[..., None]
    load: Callable[..., None]
    hooks: frozenset[int] = frozenset()

    @property
    def on_n(self) -> bool:
        """Whether each device has some of the output channels, and all of k."""
        return getattr(self.placements.get("weight"), "dim", None) == 0

    def mark(self, layer: nn.Module) -> None:
        """Give a layer the mark, and the hooks of its state dicts."""
        handles = (
            layer.register_state_dict_post_hook(self.save),
            layer.register_load_state_dict_pre_hook(self.load),
        )
        hooks = self.hooks.union(handle.id for handle in handles)
        vars(layer)[SPLIT] = replace(self, hooks=hooks)


class SplitStyle(ABC):
    """A way to split a layer over the devices of a mesh."""

    @abstractmethod
    def placement(self, name: str, shape: tuple[int, ...]) -> Placement:
        """How a parameter is split.

        Args:
            name: weight, scale, offset, pertoken_scale or bias.
            shape: of the whole parameter.
        """

    @abstractmethod
    def check(self, name: str, layer: LinearQuant, ranks: int) -> None:
        """Refuse a layer that cannot be split.

        Args:
            name: for the message.
            layer: whole.
            ranks: number of devices.

        Raises:
            LinearQuantValueError, LinearQuantTypeError: with the reason.
        """

    @abstractmethod
    def check_mesh(self, mesh: DeviceMesh) -> None:
        """Refuse a mesh of several dims.

        Raises:
            LinearQuantValueError: with what to pass instead.
        """

    @abstractmethod
    def adopt(self, module: QuantizedLinear, mesh: DeviceMesh) -> nn.Module:
        """Mark a layer as split. Its parameters are already this device's parts, by `placement`."""
