"""Which torch call a GE node came from.

A serialized graph does not say this. torchair's own graph object exists while the graph is compiled
and has the text of its "py" dump: a comment with the torch call, then the lines that make the
nodes. That text is read only for the message of a refusal.
"""

from __future__ import annotations

import gc
import re

__all__ = ["origins_of"]

_CALL = re.compile(r"## FX Code: .*? = (torch\.ops\.\S+?)\(")
_NODE = re.compile(r'node_name="([^"]+)"')
_MANY = re.compile(r"\[(\w+)_0\b.*\] = ge\.")  # a list of outputs comes without the node's name


def origins_of(graph: str) -> dict[str, str]:
    """The torch operator from which each node comes, by node name, for a graph that torchair is
    compiling; empty if the graph is not torchair's."""
    origins: dict[str, str] = {}
    for code in _texts(graph):
        call = None
        for line in code.splitlines():
            if found := _CALL.search(line):
                call = found[1].removeprefix("torch.ops.")
            elif call and (found := _NODE.search(line) or _MANY.match(line)):
                origins[found[1]] = call
    return origins


def _texts(graph: str) -> list[str]:
    from torchair.ge._ge_graph import GeGraph

    alive = [o for o in gc.get_objects() if type(o) is GeGraph and o.name == graph]
    return [getattr(o, "_python_code", "") for o in alive]
