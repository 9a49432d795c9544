"""Text for the terminal: tables that fit its width, equal lines folded, and a few colours."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

__all__ = [
    "FEW",
    "colours",
    "counted",
    "folded",
    "pattern_of",
    "shortened",
    "styled",
    "table",
    "terminal_width",
    "wrapped",
]

FEW = 12  # so many lines are read one by one
_PROSE = 100  # longer lines of prose are hard to read, however wide the terminal is
_WORDS = 20  # cells up to this length stay on one line
_NAME = 28  # a longer name may be shortened to so many characters
_SMALLEST = 8  # a shortened name has at least so many characters
_T = TypeVar("_T")


def terminal_width() -> int:
    """Columns of the terminal, or what the variable COLUMNS says; 80 if the output is no
    terminal."""
    return shutil.get_terminal_size((80, 24)).columns


# ---- names ----


def shortened(name: str, size: int) -> str:
    """A name of at most `size` characters: its middle is left out if it is longer."""
    if len(name) <= size:
        return name
    dots = "…"
    try:
        dots.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        dots = "..."
    rest = max(size - len(dots), 2)
    return f"{name[: rest // 2]}{dots}{name[-(rest - rest // 2) :]}"


def folded(
    items: Iterable[_T],
    name: Callable[[_T], str],
    also: Callable[[_T], object] = lambda _: None,
    *,
    everything: bool = False,
    few: int = FEW,
) -> list[list[_T]]:
    """Items whose names differ in numbers alone, and that are the same in `also`, together, in the
    order of the first of each group; with everything, or if there are only a few, each item
    alone."""
    items = list(items)
    alone = everything or len(items) <= few
    groups: dict[object, list[_T]] = {}
    for number, item in enumerate(items):
        key = number if alone else (re.sub(r"\d+", "#", name(item)), also(item))
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def pattern_of(names: Sequence[str]) -> str:
    """The name of a group of `folded`, with * for the numbers that differ."""
    if len(names) == 1:
        return names[0]
    parts = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    return "".join(same[0] if len(set(same)) == 1 else "*" for same in parts)


def counted(names: Sequence[str]) -> str:
    """The name of a group of `folded`, and how many they are: model.layers.*.mlp.up_proj x32."""
    return pattern_of(names) + (f" x{len(names):,}" if len(names) > 1 else "")


# ---- lines ----


def wrapped(text: str, indent: str = "", width: int | None = None) -> list[str]:
    """Prose as lines, the further ones indented. Long words, such as paths, stay whole."""
    return textwrap.wrap(
        text,
        min(width or terminal_width(), _PROSE),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def table(
    rows: Sequence[Sequence[object]], indent: str = "", width: int | None = None
) -> list[str]:
    """Rows as lines with aligned columns. Numbers are right-aligned, with a comma between
    thousands. The first row is the head.

    Args:
        rows: of equal length; the first cell of each is its name.
        indent: before each line.
        width: columns of the lines. If a row is wider, texts of several words are broken into
            lines; then long names are shortened in the middle; then what stands in the last column
            goes below the row, and the name above it. Numbers are never touched. Default:
            `terminal_width()`; 0: as wide as it is.
    """
    limit = terminal_width() if width is None else width
    room = limit - len(indent) if limit else sys.maxsize
    return [(indent + line).rstrip() for block in _blocks(rows, room) for line in block]


def _blocks(
    rows: Sequence[Sequence[object]], room: int, *, may_split: bool = True
) -> list[list[str]]:
    """The lines of each row."""
    columns = list(zip(*rows, strict=True))
    numbers = [all(isinstance(cell, int) for cell in column[1:]) for column in columns]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    texts = list(zip(*cells, strict=True))
    widths = [max(map(len, text)) for text in texts]
    space = room - 2 * (len(widths) - 1)
    words = [[max(map(len, _words(cell)), default=0) for cell in text] for text in texts]
    whole = [  # short cells below the head, and parts of longer ones that are not too short
        max(longest[0], 0, *map(max, longest[1:], (min(len(cell), _WORDS) for cell in text[1:])))
        for text, longest in zip(texts, words, strict=True)
    ]
    _shrink(widths, whole, space)
    if may_split and len(widths) > 2:
        _shrink(widths, [min(widths[0], _NAME), *widths[1:]], space)
        if sum(widths) > space:
            if max(map(len, texts[-1][1:]), default=0) > _WORDS:
                return _note_below(rows, cells, room)
            if widths[0] > _WORDS:
                return _name_above(rows, cells, room)
    _shrink(widths, [max(longest) for longest in words], space)
    small = [
        size if number else min(size, _SMALLEST)
        for size, number in zip(widths, numbers, strict=True)
    ]
    _shrink(widths, small, space)
    return [
        _aligned([_broken(*one) for one in zip(row, widths, strict=True)], widths, numbers)
        for row in cells
    ]


def _note_below(
    rows: Sequence[Sequence[object]], cells: list[list[str]], room: int
) -> list[list[str]]:
    """The lines of rows that are too wide, the last cell of each below it."""
    found = _blocks([row[:-1] for row in rows], room)
    for block, row in zip(found, cells, strict=True):
        block += wrapped(f"  {row[-1]}", "  ", room) if row[-1] else []
    return found


def _name_above(
    rows: Sequence[Sequence[object]], cells: list[list[str]], room: int
) -> list[list[str]]:
    """The lines of rows that are too wide, the first cell of each above it."""
    found = _blocks([row[1:] for row in rows], room - 2, may_split=False)
    return [
        [shortened(row[0], room), *(f"  {line}" for line in block)]
        for row, block in zip(cells, found, strict=True)
    ]


def _aligned(parts: list[list[str]], widths: list[int], right: list[bool]) -> list[str]:
    """One row: its cells, each of some lines, beside each other."""
    lines = []
    for number in range(max(map(len, parts))):
        texts = [part[number] if number < len(part) else "" for part in parts]
        lines.append(
            "  ".join(
                text.rjust(size) if to_the_right else text.ljust(size)
                for text, size, to_the_right in zip(texts, widths, right, strict=True)
            )
        )
    return lines


def _shrink(widths: list[int], least: list[int], room: int) -> None:
    """Make the widest columns narrower, none below its least width, until they fit."""
    while sum(widths) > room:
        wide = [i for i, size in enumerate(widths) if size > least[i]]
        if not wide:
            return
        widths[max(wide, key=lambda i: widths[i])] -= 1


def _broken(cell: str, size: int) -> list[str]:
    if len(cell) <= size:
        return [cell]
    lead = cell[: len(cell) - len(cell.lstrip())]
    words = " ".join(shortened(word, size - len(lead)) for word in _words(cell))
    lines = textwrap.wrap(
        _COUNT.sub(rf"{_STAYS}\1", words),
        size,
        initial_indent=lead,
        subsequent_indent=f"{lead}  " if lead else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_STAYS, " ") for line in lines]


_COUNT = re.compile(r" (x[\d,]+)$")  # what `counted` adds; it stays beside the name
_STAYS = "\1"  # for a space at which textwrap must not end a line


def _words(cell: str) -> list[str]:
    return [word.replace(_STAYS, " ") for word in _COUNT.sub(rf"{_STAYS}\1", cell).split()]


# ---- colours ----

_CODES = {"good": "32", "bad": "31", "worst": "1"}
_on = False


@contextmanager
def colours() -> Iterator[None]:
    """Colours on, if the output is a terminal that shows them. NO_COLOR (https://no-color.org) and
    TERM=dumb turn them off, FORCE_COLOR on."""
    global _on
    before = _on
    if os.environ.get("NO_COLOR"):
        _on = False
    else:
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        _on = terminal or bool(os.environ.get("FORCE_COLOR"))
    try:
        yield
    finally:
        _on = before


def styled(text: str, style: str) -> str:
    """A text in a colour, after it was laid out: "good" green, "bad" red, "worst" bold. Only the
    command line has colours on."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if _on and text else text
