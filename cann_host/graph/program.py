"""The steps of a graph as a run computes them: functions of numbered registers.

Which function a step calls, with which values, and which values nobody reads afterwards is decided
when the graph is compiled. A run only makes the calls.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from cann_host.graph import executor
from cann_host.graph.executor import GraphError, Op

__all__ = ["Program", "Slot", "Step"]


class Slot(NamedTuple):
    """The name of a value in a graph: output number `port` of a node."""

    node: str
    port: int


@dataclass(frozen=True, eq=False)
class Step:
    """One operator of a graph.

    Attributes:
        op: what it computes.
        node: name of the node, for messages.
        inputs: slot, or list of slots of a dynamic input, by input name.
        attrs: attributes by name.
        after: the nodes that come before it, whether it reads their results or not.
        copies: the inputs that it writes into and that are not the caller's memory.
        views: slots that are read after this step and may be views of what it writes into.
    """

    op: Op
    node: str
    inputs: dict[str, Slot | list[Slot]]
    attrs: dict[str, Any]
    after: frozenset[str] = frozenset()
    copies: list[str] = field(default_factory=list)
    views: list[Slot] = field(default_factory=list)

    @property
    def sources(self) -> list[Slot]:
        """The slots that it reads, in the order of `inputs`."""
        slots = self.inputs.values()
        return [s for one in slots for s in (one if isinstance(one, list) else [one])]

    def compute(self, *values: Any, compiling: bool = False) -> Any:
        """Check the values of `sources`, and call the operator's function with them."""
        given = iter(values)
        inputs = {
            name: [next(given) for _ in slots] if isinstance(slots, list) else next(given)
            for name, slots in self.inputs.items()
        }
        return executor.compute_op(self.op, inputs, self.attrs, compiling=compiling)

    def run(self, *values: Any) -> list[Any]:
        """Check the values of `sources`, and compute the results, in order."""
        return executor.as_list(self.compute(*values))

    def direct(self) -> tuple[Callable[..., Any], list[Slot | None]]:
        """The operator's function, and the slots of its positional arguments; None is an absent
        one. It checks nothing that `run` checks before the call."""
        function: Callable[..., Any] = self.op.function
        if self.attrs:
            function = partial(function, **self.attrs)
        names = list(self.op.inputs)
        while names and names[-1] not in self.inputs:
            names.pop()
        sources: list[Slot | None] = []
        for name in names:
            slots = self.inputs.get(name)
            if isinstance(slots, list):
                function = partial(_with_list, function, len(sources), len(sources) + len(slots))
                sources += slots
            else:
                sources.append(slots)
        return function, sources

    def failure(self, error: Exception) -> GraphError:
        """An error of this step as an error of its graph."""
        text = str(error) if isinstance(error, GraphError) else f"{type(error).__name__}: {error}"
        return GraphError(f"node {self.node} ({self.op.type}): {text}")


def _with_list(function: Callable[..., Any], first: int, last: int, *values: Any) -> Any:
    """Call a function whose arguments from `first` to `last` are one list."""
    return function(*values[:first], list(values[first:last]), *values[last:])


def _copy(value: Any) -> Any:
    """A value that a step may write into."""
    return value.clone() if isinstance(value, Tensor) else value


def _apart(value: Any, *written: Any) -> Any:
    """A value that stays as it is when the memory of others is written."""
    if not isinstance(value, Tensor):
        return value
    memory = {t.untyped_storage().data_ptr() for t in written if isinstance(t, Tensor)}
    return value.clone() if value.untyped_storage().data_ptr() in memory else value


class _Call(NamedTuple):
    """A step as a run computes it.

    Attributes:
        function: of the values of `sources`.
        sources: numbers of registers.
        target: the register of the result, if the function returns one value and not a sequence.
        targets: ports and their registers, if it returns a sequence. A result that nobody reads has
            no register.
        dead: registers that nobody reads after this call.
        step: for messages.
    """

    function: Callable[..., Any]
    sources: tuple[int, ...]
    target: int | None
    targets: tuple[tuple[int, int], ...]
    dead: tuple[int, ...]
    step: Step


class Program:
    """The calls of a graph. Several threads may run it."""

    def __init__(
        self,
        inputs: Sequence[Slot],
        constants: Mapping[Slot, Any],
        steps: Sequence[Step],
        outputs: Sequence[Slot],
        returns_one: Mapping[Step, bool],
    ) -> None:
        """Decide what every step calls.

        Args:
            inputs: slots of the graph's inputs.
            constants: values known at compile time.
            steps: in an order in which every value is computed before it is read.
            outputs: slots of the results.
            returns_one: the steps whose functions are called directly, because they were called
                with meta tensors of the shapes, dtypes and formats that every run has, and took
                them as they were; and whether they returned one value, not a sequence.
        """
        numbers: defaultdict[Slot | None, int] = defaultdict(itertools.count().__next__)
        self._inputs = [numbers[slot] for slot in inputs]
        self._outputs = [numbers[slot] for slot in outputs]
        last = {slot: step for step in steps for slot in step.sources}
        ports: defaultdict[str, list[int]] = defaultdict(list)
        for slot in dict.fromkeys([*last, *outputs]):
            ports[slot.node].append(slot.port)
        stay = {*constants, *outputs}
        self._calls: list[_Call] = []
        for step in steps:
            called = self._protect(step, numbers) if step.op.writes else step
            function, sources = (
                called.direct() if step in returns_one else (called.run, called.sources)
            )
            targets = [(port, numbers[Slot(step.node, port)]) for port in ports[step.node]]
            is_one = returns_one.get(step, False)
            dead = {slot for slot in step.sources if last[slot] is step and slot not in stay}
            dead.update(set(called.sources) - set(step.sources))
            self._calls.append(
                _Call(
                    function,
                    tuple(numbers[slot] for slot in sources),
                    targets[0][1] if is_one and targets else None,
                    () if is_one else tuple(targets),
                    tuple(numbers[slot] for slot in dead),
                    step,
                )
            )
        self._first = [constants.get(slot) if slot else None for slot in numbers]

    def _protect(self, step: Step, numbers: Mapping[Slot | None, int]) -> Step:
        """Add calls that copy what a step would change and must not.

        Returns:
            The step with these copies as its inputs.
        """
        given = {name: slot for name, slot in step.inputs.items() if isinstance(slot, Slot)}
        written = [numbers[given[name]] for name in step.op.writes if name not in step.copies]
        for slot in step.views:
            self._calls.append(
                _Call(_apart, (numbers[slot], *written), numbers[slot], (), (), step)
            )
        for place, name in enumerate(step.copies, 1):
            copy = Slot(step.node, -place)
            self._calls.append(_Call(_copy, (numbers[given[name]],), numbers[copy], (), (), step))
            given[name] = copy
        return replace(step, inputs={**step.inputs, **given})

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Compute the graph's outputs.

        Args:
            inputs: one value for each input.

        Raises:
            GraphError: a step refuses its inputs or fails.
        """
        registers = self._first.copy()
        for number, value in zip(self._inputs, inputs, strict=True):
            registers[number] = value
        value_of = registers.__getitem__
        call: _Call
        try:
            for call in self._calls:
                function, sources, target, targets, dead, _ = call
                result = function(*map(value_of, sources))
                if target is not None:
                    registers[target] = result
                else:
                    for port, number in targets:
                        registers[number] = result[port]
                result = None
                for number in dead:
                    registers[number] = None
        except Exception as error:
            raise call.step.failure(error) from (None if isinstance(error, GraphError) else error)
        return [registers[number] for number in self._outputs]
