"""Tensor-parallel loading: each process reads its part of a layer's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..modules.split import SplitStyle
from .files import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

__all__ = ["TensorParallel"]


class TensorParallel:
    """The mesh and the plan of a tensor-parallel load.

    Args:
        mesh: of one dim.
        plan: how layers are split, by name (`*` for any part between two dots).

    Attributes:
        rank, ranks: the rank of this process, and the number of ranks.

    Raises:
        CheckpointError: a style of another kind.
        LinearQuantValueError: a mesh of several dims.
    """

    def __init__(self, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
        self._styles: dict[str, SplitStyle] = {}
        for pattern, style in plan.items():
            if not isinstance(style, SplitStyle):
                raise CheckpointError(
                    f"load_checkpoint: the plan has {type(style).__name__} for {pattern}; allowed "
                    "are ColwiseLinearQuant and RowwiseLinearQuant. What to do: leave other "
                    "modules to parallelize_module, after loading."
                )
            style.check_mesh(mesh)
            self._styles[pattern] = style
        self.mesh = mesh
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()

    def style(self, name: str) -> SplitStyle | None:
        """How a layer is split; None if the plan does not have it."""
        tokens = name.split(".")
        for pattern, style in self._styles.items():
            patterns = pattern.split(".")
            if len(patterns) == len(tokens) and all(map(fnmatchcase, tokens, patterns)):
                return style
        return None

    @contextmanager
    def agreeing(self) -> Iterator[list[str]]:
        """A block after which either all ranks continue or none does.

        An error of one rank is raised on all ranks. The block gets a list; if the ranks put
        different items into it, that is an error on all ranks too.
        """
        import torch.distributed as dist

        mine: BaseException | None = None
        found: list[str] = []
        try:
            yield found
        except BaseException as error:  # any error: the others must not wait for this rank
            mine = error
        answers: list[Any] = [None] * self.ranks
        answer = (None if mine is None else str(mine) or type(mine).__name__, found)
        dist.all_gather_object(answers, answer, group=self.mesh.get_group())
        if mine is not None:
            raise mine
        for rank, (text, _) in enumerate(answers):
            if text is not None:
                raise CheckpointError(f"rank {rank} of {self.ranks} could not load: {text}")
        for rank, (_, theirs) in enumerate(answers):
            if theirs != answers[0][1]:
                here, there = (
                    next(iter(sorted(set(a) - set(b))), "nothing more")
                    for a, b in ((answers[0][1], theirs), (theirs, answers[0][1]))
                )
                raise CheckpointError(
                    f"the ranks' checkpoints differ: rank 0 has {here}, rank {rank} has "
                    f"{there}. What to do: give every rank the same files and the same model."
                )
