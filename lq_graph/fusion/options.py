"""Choosing fusions."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import LinearQuantValueError
from ..modules.fusion_options import VARIABLE, FusionOptions, get_fusion, put_fusion
from .table import FUSIONS

__all__ = ["checked", "set_fusion"]


def set_fusion(
    *, exact: bool = False, off: Collection[str] = (), enabled: bool = True
) -> FusionOptions:
    """Choose the fusions of the graphs that are compiled from now on in this process.

    `set_fusion()` is all of them. A graph that is compiled already stays as it is.

    Args:
        exact: only fusions that change no bit of the result. The others compute what CANN's
            documents say of the fused operator, which rounds less often.
        off: names of fusions to leave out: docs/fusion.md has the table.
        enabled: False for no fusion at all.

    Returns:
        The options that are in force now.

    Raises:
        LinearQuantValueError: a name that no fusion has.
    """
    put_fusion(_known(FusionOptions(exact, frozenset(off), enabled), "set_fusion"))
    return get_fusion()


def checked() -> FusionOptions:
    """The options in force.

    Raises:
        LinearQuantValueError: LQ_GRAPH_FUSION has another form, or a name that no fusion has.
    """
    return _known(get_fusion(), VARIABLE)


def _known(options: FusionOptions, where: str) -> FusionOptions:
    names = [fusion.name for fusion in FUSIONS]
    if unknown := sorted(options.off - set(names)):
        raise LinearQuantValueError(
            f"{where}: no fusion is called {', '.join(unknown)}; allowed are {', '.join(names)}."
        )
    return options
