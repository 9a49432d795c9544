"""Which fusions run: set in code, else the environment.

It stands here because LinearQuant shows it: torchair's cache_compile keys its cache on that.
`set_fusion` is in fusion/options.py, beside the table of the fusions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import LinearQuantValueError

__all__ = ["VARIABLE", "FusionOptions", "fusion", "get_fusion", "put_fusion"]

VARIABLE = "LQ_GRAPH_FUSION"


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
        first = "off" if not self.enabled else "exact" if self.exact else "on"
        return ",".join([first, *(f"-{name}" for name in sorted(self.off))])


_set: FusionOptions | None = None


def put_fusion(options: FusionOptions | None) -> None:
    """Set the options for this process; None goes back to the environment."""
    global _set
    _set = options


def get_fusion() -> FusionOptions:
    """The options in force: of `set_fusion`, else of LQ_GRAPH_FUSION, else all fusions.

    The variable is "on", "exact" or "off", and after it names with a minus: "on,-swiglu".

    Raises:
        LinearQuantValueError: LQ_GRAPH_FUSION has another form.
    """
    if _set is not None:
        return _set
    text = os.environ.get(VARIABLE, "on")
    first, *others = text.split(",")
    if first not in ("on", "exact", "off") or not all(name.startswith("-") for name in others):
        raise LinearQuantValueError(
            f"{VARIABLE} is {text!r}; allowed are on, exact and off, and after them names of "
            'fusions with a minus: "on,-swiglu".'
        )
    return FusionOptions(first == "exact", frozenset(n[1:] for n in others), first != "off")


@contextmanager
def fusion(options: FusionOptions) -> Iterator[None]:
    """Other options inside a block."""
    before = _set
    put_fusion(options)
    try:
        yield
    finally:
        put_fusion(before)
