"""A compiled graph: the steps that every run computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from cann_host import watched
from cann_host.graph import executor
from cann_host.graph.device_memory import bytes_at
from cann_host.graph.executor import FractalNZ, GraphError, Op, ShapeUnknownError, Value

__all__ = ["CompiledGraph", "Slot", "Step", "TensorInfo", "output_tensor"]


class Slot(NamedTuple):
    """The name of a value in a graph: output number `port` of a node."""

    node: str
    port: int


@dataclass(frozen=True)
class Step:
    """One operator of a compiled graph.

    Attributes:
        op: what it computes.
        node: name of the node, for messages.
        inputs: slot, or list of slots of a dynamic input, by input name.
        attrs: attributes by name.
        last_use: slots that no step reads after this one.
        copies: the inputs that it writes into and that are not the caller's memory.
        views: slots that are read after this step and may be views of what it writes into.
    """

    op: Op
    node: str
    inputs: dict[str, Slot | list[Slot]]
    attrs: dict[str, Any]
    last_use: list[Slot] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    views: list[Slot] = field(default_factory=list)

    def run(self, values: dict[Slot, Any], *, compiling: bool = False) -> list[Any]:
        """Compute the step's outputs from the values so far."""
        inputs = {
            name: [values[s] for s in slot] if isinstance(slot, list) else values[slot]
            for name, slot in self.inputs.items()
        }
        if self.op.writes:
            self._keep(inputs, values)
        try:
            return executor.run_op(self.op, inputs, self.attrs, compiling=compiling)
        except ShapeUnknownError:
            raise
        except GraphError as error:
            raise GraphError(f"node {self.node} ({self.op.type}): {error}") from None
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise GraphError(f"node {self.node} ({self.op.type}): {text}") from error

    def _keep(self, inputs: dict[str, Any], values: dict[Slot, Any]) -> None:
        """Copy what the step would change and must not."""
        for name in self.op.writes:
            if not isinstance(inputs[name], Tensor):
                raise GraphError(
                    f"node {self.node} ({self.op.type}): {name} has an internal format, into which "
                    "cann_host does not write"
                )
        for name in self.copies:
            inputs[name] = inputs[name].clone()
        written = {inputs[name].untyped_storage().data_ptr() for name in self.op.writes}
        for slot in self.views:
            value = values[slot]
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in written:
                values[slot] = value.clone()


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
        constants: values known at compile time.
        steps: the steps that every run computes.
        outputs: slots of the results.
        output_infos: dtypes and shapes of the outputs, for the summary.
        is_static: whether every shape is known.
        borrowed: (name, address, bytes) of constants in the caller's memory.
        formats: of each graph input, for which the graph was compiled.
        parameters: the parameters whose memory is in `borrowed`.
    """

    name: str
    inputs: list[Slot]
    constants: dict[Slot, Any]
    steps: list[Step]
    outputs: list[Slot]
    output_infos: list[TensorInfo]
    is_static: bool
    borrowed: list[tuple[str, int, int]] = field(default_factory=list)
    formats: list[int] = field(default_factory=list)
    parameters: list[watched.Watched] = field(default_factory=list)

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
        values: dict[Slot, Any] = dict(self.constants)
        values.update(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            for index, value in enumerate(step.run(values)):
                values[Slot(step.node, index)] = value
            for slot in step.last_use:
                values.pop(slot, None)
        return [output_tensor(values[slot], i) for i, slot in enumerate(self.outputs)]

    def check_unchanged(self, given: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """Refuse changes that a device would not notice: torchair passes the formats of the inputs
        once, then only addresses; for constants and frozen parameters it passes nothing more.

        Args:
            given: the tensors that torchair was called with.
            addresses: the addresses that the graph got.

        Raises:
            RuntimeError: one of them is not what the graph was compiled for.
        """
        todo = (
            "torch._dynamo.reset() after a weight was replaced, prepared or moved, and call again"
        )
        watched.check(f"graph {self.name}", self.parameters, todo)
        for slot, form, tensor, address in zip(
            self.inputs, self.formats, given, addresses, strict=False
        ):
            if tensor.device.type != "npu" or tensor.numel() == 0:
                continue
            name = f"input {slot.node} {tuple(tensor.shape)} of graph {self.name}"
            watched.check_format(name, form, tensor)
            if tensor.data_ptr() != address:
                watched.refuse_frozen(name, todo)


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
