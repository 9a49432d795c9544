"""Which operators of a graph write into the caller's memory, and what must be copied before.

GE gives an operator that updates an input in place the caller's memory, if the input comes straight
from an input of the graph or from a constant in the caller's memory. torchair puts a TensorMove
before the operator where a program still needs the old values; cann_host copies only there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cann_host.graph.executor import GraphError
from cann_host.graph.program import Slot, Step

__all__ = ["plan_writes"]

# operators whose result is the memory of their input, in GE too
_SAME_MEMORY = frozenset({"ExpandDims", "Reshape", "Squeeze", "Unsqueeze"})


def plan_writes(
    steps: Sequence[Step], memory: Iterable[Slot], outputs: Sequence[Slot]
) -> set[Slot]:
    """Tell each step that writes which of its inputs it must copy, and what it would change.

    Args:
        steps: of the graph, in order; `copies` and `views` are set.
        memory: the slots that are the caller's memory.
        outputs: of the graph.

    Returns:
        The slots of `memory` that some step writes into.
    """
    written: set[Slot] = set()
    if not any(step.op.writes for step in steps):
        return written
    origin = {slot: slot for slot in memory}
    last = {slot: at for at, step in enumerate(steps) for slot in step.sources}
    last.update((slot, len(steps)) for slot in outputs)
    read: dict[str, list[Slot]] = {}  # slots that are read, by node
    for slot in last:
        read.setdefault(slot.node, []).append(slot)
    for at, step in enumerate(steps):
        first = next(iter(step.sources), None)
        if step.op.type in _SAME_MEMORY and first in origin:
            origin[Slot(step.node, 0)] = origin[first]
        for port, name in enumerate(step.op.writes):
            source = step.inputs.get(name)
            if not isinstance(source, Slot):
                raise GraphError(f"node {step.node} ({step.op.type}): {name} is not given")
            if source not in origin:
                step.copies.append(name)
                continue
            root = origin[Slot(step.node, port)] = origin[source]
            written.add(root)
            views = _readers(steps[:at], root, origin, read)
            step.views.extend(slot for slot in views if last[slot] > at)
    return written


def _readers(
    steps: Sequence[Step], root: Slot, origin: dict[Slot, Slot], read: dict[str, list[Slot]]
) -> list[Slot]:
    """What was computed from a memory, and may be a view of it here. In GE it never is."""
    found: dict[Slot, None] = {}
    for step in steps:
        if any(origin.get(slot) == root or slot in found for slot in step.sources):
            made = read.get(step.node, ())
            found.update((slot, None) for slot in made if origin.get(slot) != root)
    return list(found)
