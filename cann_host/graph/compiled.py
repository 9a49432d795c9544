"""A compiled graph: the steps that every run computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cann_host import watched, weights
from cann_host.graph.device_memory import Input, Inputs, bytes_at
from cann_host.graph.executor import FractalNZ, GraphError, Value, torch_dtype
from cann_host.graph.program import Program, Slot, Step
from cann_host.memory import FRACTAL_NZ

__all__ = ["CompiledGraph", "TensorInfo", "output_tensor"]


class TensorInfo(NamedTuple):
    """GE dtype and shape of a graph's input or output; -1 is a dim that only run time knows."""

    dtype: int
    shape: tuple[int, ...]

    @property
    def known(self) -> bool:
        return all(dim >= 0 for dim in self.shape)


@dataclass
class CompiledGraph:
    """A compiled graph.

    Attributes:
        name: of the graph.
        inputs: slot of each graph input, in the order of the caller's inputs.
        input_infos: their dtypes and shapes.
        formats: of each graph input, for which the graph was compiled.
        outputs: slots of the results.
        output_infos: dtypes and shapes of the outputs, for the summary.
        constants: values known at compile time.
        steps: the steps that every run computes.
        returns_one: see `Program`; of the steps that the compiler checked.
        is_static: whether every shape is known.
        borrowed: (name, address, bytes) of constants in the caller's memory.
        parameters: the parameters whose memory is in `borrowed`.
        written: the inputs, and the constants in the caller's memory, that a run writes into.
        memory: reads the inputs of a run.
    """

    name: str
    inputs: list[Slot]
    input_infos: list[TensorInfo]
    formats: list[int]
    outputs: list[Slot]
    output_infos: list[TensorInfo]
    constants: dict[Slot, Value]
    steps: list[Step]
    returns_one: dict[Step, bool]
    is_static: bool
    borrowed: list[tuple[str, int, int]]
    parameters: list[watched.Watched]
    written: set[Slot]

    def __post_init__(self) -> None:
        self._program = self._make(self.returns_one)
        self.memory = Inputs()
        self._scalars = [i for i, info in enumerate(self.input_infos) if info.shape == ()]
        self._expected = [
            (torch_dtype(info.dtype), info.shape, form == FRACTAL_NZ)
            for info, form in zip(self.input_infos, self.formats, strict=True)
        ]

    def _make(self, returns_one: Mapping[Step, bool]) -> Program:
        return Program(self.inputs, self.constants, self.steps, self.outputs, returns_one)

    def run(self, inputs: Sequence[Value]) -> list[Tensor]:
        """Compute the graph's outputs.

        Args:
            inputs: one value per graph input.

        Returns:
            One tensor per graph output.
        """
        if len(inputs) != len(self.inputs):
            raise GraphError(f"the graph has {len(self.inputs)} inputs but got {len(inputs)}")
        for name, address, size in self.borrowed:
            if bytes_at(address) < size:
                raise GraphError(f"the memory of constant {name} was freed after compilation")
        inputs = self._as_declared(inputs)
        program = self._program
        if self.returns_one and self._expected != [_kind(value) for value in inputs]:
            program = self._make({})  # every step checks again
        try:
            results = program.run(inputs)
        finally:
            for value in self._written(inputs):
                weights.wrote(value.data_ptr(), value.nbytes)
        return [output_tensor(result, i) for i, result in enumerate(results)]

    def _as_declared(self, inputs: Sequence[Value]) -> Sequence[Value]:
        """torchair declares a symbolic size as a scalar, and passes one element."""
        if not self._scalars:
            return inputs
        values = list(inputs)
        for i in self._scalars:
            value = values[i]
            if isinstance(value, Tensor) and value.shape == (1,):
                values[i] = value[0]
        return values

    def _written(self, inputs: Sequence[Value]) -> Iterator[Tensor]:
        values = dict(zip(self.inputs, inputs, strict=True))
        for slot in self.written:
            value = values.get(slot, self.constants.get(slot))
            if isinstance(value, Tensor):
                yield value

    def check_unchanged(self, given: Sequence[Tensor], inputs: Sequence[Input]) -> None:
        """Refuse changes that a device would not notice: torchair passes the formats of the inputs
        once, then only addresses; for constants and frozen parameters it passes nothing more.

        Args:
            given: the tensors that torchair was called with.
            inputs: what the graph got.

        Raises:
            RuntimeError: one of them is not what the graph was compiled for.
        """
        todo = (
            "torch._dynamo.reset() after a weight was replaced, prepared or moved, and call again"
        )
        watched.check(f"graph {self.name}", self.parameters, todo)
        for slot, form, tensor, one in zip(self.inputs, self.formats, given, inputs, strict=False):
            if tensor.device.type != "npu" or tensor.numel() == 0:
                continue
            moved = tensor.data_ptr() != one.address
            if moved or not watched.has_format(tensor, form):
                name = f"input {slot.node} {tuple(tensor.shape)} of graph {self.name}"
                watched.check_format(name, form, tensor)
                watched.refuse_frozen(name, todo)


def _kind(value: Value) -> tuple[torch.dtype, tuple[int, ...], bool]:
    """dtype, shape, and whether it is FRACTAL_NZ."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, False
    assert isinstance(value, FractalNZ) and isinstance(value.like, Tensor)
    return value.like.dtype, value.like.shape, True


def output_tensor(value: Value, index: int) -> Tensor:
    """A value as output number `index` of a graph.

    Raises:
        GraphError: it is int4.
    """
    if isinstance(value, FractalNZ):
        value = value.nd
    if not isinstance(value, Tensor):
        raise GraphError(f"output {index} is int4, which torch cannot hold")
    return value
