"""Which fusions run: set in code, else the environment."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import LinearQuantValueError

__all__ = ["FusionOptions", "get_fusion", "set_fusion"]

_VARIABLE = "LQ_GRAPH_FUSION"


@dataclass(frozen=True)
class FusionOptions:
    """Which fusions run in graphs.

    Attributes:
        exact: only those that change no bit of the result.
        off: names of fusions that do not run.
        enabled: False for none.
    """

    exact: bool = False
    off: frozenset[str] = frozenset()
    enabled: bool = True

    def __str__(self) -> str:
        if not self.enabled:
            return "off"
        return ",".join(["exact" if self.exact else "on", *(f"-{n}" for n in sorted(self.off))])


_set: FusionOptions | None = None


def get_fusion() -> FusionOptions:
    """The options in force: of `set_fusion`, else of LQ_GRAPH_FUSION, else all fusions.

    The variable is "on", "exact" or "off", and after it names with a minus: "on,-swiglu".

    Raises:
        LinearQuantValueError: LQ_GRAPH_FUSION has another form or an unknown name.
    """
    if _set is not None:
        return _set
    first, *others = os.environ.get(_VARIABLE, "on").split(",")
    if first not in ("on", "exact", "off") or not all(name.startswith("-") for name in others):
        raise LinearQuantValueError(
            f"{_VARIABLE} is {os.environ[_VARIABLE]!r}; allowed are on, exact and off, and after "
            'them names of fusions with a minus: "on,-swiglu".'
        )
    return _options(first == "exact", [name[1:] for name in others], first != "off", _VARIABLE)


def set_fusion(
    *, exact: bool = False, off: Collection[str] = (), enabled: bool = True
) -> FusionOptions:
    """Choose the fusions of the graphs that are compiled from now on in this process.

    Args:
        exact: only fusions that change no bit of the result. The others compute what CANN's
            documents say of the fused operator, which rounds less often.
        off: names of fusions to leave out, of `lq_graph.fusion.table.FUSIONS`.
        enabled: False for no fusion at all.

    Returns:
        The options that are in force now.

    Raises:
        LinearQuantValueError: a name that no fusion has.
    """
    global _set
    _set = _options(exact, off, enabled, "set_fusion")
    return _set


def _options(exact: bool, off: Collection[str], enabled: bool, where: str) -> FusionOptions:
    from .table import FUSIONS

    names = [fusion.name for fusion in FUSIONS]
    if unknown := sorted(set(off) - set(names)):
        raise LinearQuantValueError(
            f"{where}: no fusion is called {', '.join(unknown)}; allowed are {', '.join(names)}."
        )
    return FusionOptions(exact, frozenset(off), enabled)
