"""Tables of the part of CANN that the stand-in has: `python -m cann_host -m cann_host.surface`.

They are made from the native library itself, the table of GE operators, and the names that
torch_npu's libraries look for.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import cann_host

__all__ = ["asked_for", "table"]

# prefix of names: what these names are for
_FAMILIES = {
    "aclnn": "operators, two names each",
    "aclrt": "devices, memory, streams, events",
    "aclmdl": "captured graphs, dumps",
    "aclop": "single operators",
    "acltdt": "channels",
    "aclprof": "profiler of CANN",
    "acl": "descriptors, options, versions",
    "Hccl": "collectives",
    "mspti": "profiler of torch",
    "mstx": "marks for a profiler",
    "Msprof": "profiler hooks",
}
_NAME = re.compile(rb"\0((?:%s)[A-Z]\w{1,70})(?=\0)" % "|".join(_FAMILIES).encode())


def _family(symbol: str) -> str:
    return next(family for family in _FAMILIES if symbol.startswith(family))


def asked_for() -> set[str]:
    """The names of CANN's functions in the libraries of the installed torch_npu."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise cann_host.CannHostError("torch_npu is not installed")
    folder = Path(next(iter(spec.submodule_search_locations)))
    names: set[str] = set()
    for library in sorted(folder.rglob("*.so")):
        names |= {name.decode() for name in _NAME.findall(library.read_bytes())}
    return names


def _rows() -> Iterator[tuple[str, ...]]:
    entries = cann_host.entries()
    groups = dict.fromkeys(group for group, _, _ in entries)
    for group in groups:
        mine = [(symbol, kind) for of, symbol, kind in entries if of == group]
        works = sorted(symbol for symbol, kind in mine if kind != "fails")
        fails = sorted(symbol for symbol, kind in mine if kind == "fails")
        yield group, _list(_operators(works)), _list(fails)


def _operators(symbols: list[str]) -> list[str]:
    """The symbols without the first phases: an operator has both phases or none."""
    return [s for s in symbols if not (s.startswith("aclnn") and s.endswith("GetWorkspaceSize"))]


def _list(symbols: list[str]) -> str:
    return ", ".join(f"`{symbol}`" for symbol in symbols) or "-"


def table() -> str:
    """Two Markdown tables and a list: the functions that cann_host has, the names that the wheel
    looks for, the GE operators."""
    from cann_host.graph import executor, ops  # noqa: F401 - ops registers the operators

    lines = ["| group | works | fails by its name |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in sorted(_rows())]
    kinds = {symbol: kind for _, symbol, kind in cann_host.entries()}
    wanted = asked_for()
    lines += [
        "",
        "The names that torch_npu looks for at run time. It reports an absent one itself "
        '("Failed to find function ..."):',
        "",
        "| names | what for | asked for | work | fail by their name | absent |",
        "|---|---|---|---|---|---|",
    ]
    for family, what in _FAMILIES.items():
        names = {name for name in wanted if _family(name) == family}
        fail = sum(kinds.get(name) == "fails" for name in names)
        work = sum(name in kinds for name in names) - fail
        lines.append(
            f"| `{family}*` | {what} | {len(names)} | {work} | {fail} "
            f"| {len(names) - work - fail} |"
        )
    types = sorted(executor.OPS)
    lines += ["", f"GE operators in compiled graphs, {len(types)}: {_list(types)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
