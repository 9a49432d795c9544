"""Regular expressions from files, matched in bounded time.

Python's engine tries one path through a pattern after another, and a pattern such as `(a+)+$` has
exponentially many. This module follows all paths at once: the bits of an integer are the positions
of the text that the pattern can have reached. The results are those of `re.match`. Patterns that
are not regular (back references, flags) are refused.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

__all__ = ["Pattern", "PatternError", "Text", "Work"]

_STEPS = 200_000  # of one match; a match of a real file takes some ten
_STEPS_OF_BEGINNING = 10
_STEPS_OF_READING = 20  # a character of a pattern
_ALL_STEPS = 10_000_000  # of all matches of a load

_AT = {
    "AT_BEGINNING": "^",
    "AT_BEGINNING_STRING": r"\A",
    "AT_BOUNDARY": r"\b",
    "AT_NON_BOUNDARY": r"\B",
    "AT_END": "$",
    "AT_END_STRING": r"\Z",
}
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}


class PatternError(ValueError):
    """A pattern that is invalid, or cannot be matched in bounded time."""


class Work:
    """Counts the steps that are left: for all matches together, and for the current match."""

    def __init__(self) -> None:
        self._all = _ALL_STEPS
        self._left = 0

    def read(self, text: str) -> None:
        """Count the reading of a pattern, because a file may have many."""
        self._left = self._all
        self.step(_STEPS_OF_READING * len(text))

    def begin(self) -> None:
        """Begin a match."""
        self._left = _STEPS
        self.step(_STEPS_OF_BEGINNING)

    def step(self, steps: int = 1) -> None:
        """Count steps.

        Raises:
            PatternError: no steps are left.
        """
        self._left -= steps
        self._all -= steps
        if self._left < 0 or self._all < 0:
            raise PatternError("it takes too long to match")


class Pattern:
    """A regular expression.

    Raises:
        PatternError: it is invalid, is not regular, or takes more steps than are left.
    """

    def __init__(self, text: str, work: Work) -> None:
        self.text, self._work = text, work
        work.read(text)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that may change its meaning
                parsed = parser.parse(text)
            if parsed.state.flags & ~(re.UNICODE | re.VERBOSE):
                raise PatternError("it has flags")
            self._nodes = _nodes(cast(Any, parsed))
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(str(error) or type(error).__name__) from None

    def matches(self, text: Text) -> bool:
        """Whether re.match finds the pattern at the beginning of a text.

        Raises:
            PatternError: it takes more steps than are left.
        """
        self._work.begin()
        try:
            return text.after(self._nodes, 1, self._work) != 0
        except RecursionError:
            raise PatternError("it is nested too deeply") from None


# an operation and its operand: see Text._after_one
_Node = tuple[str, Any]


def _nodes(parsed: Iterable[Any]) -> list[_Node]:
    """A parsed pattern in a form that Text can match fast; refuses one that is not regular."""
    found: list[_Node] = []
    for op, value in parsed:
        name = str(op)
        if name in ("LITERAL", "FAILURE"):
            found.append((name, chr(value) if name == "LITERAL" else None))
        elif name in ("NOT_LITERAL", "ANY", "IN"):
            found.append(("CHARACTER", _test(name, value)))
        elif name == "AT":
            found.append((name, _AT[str(value)]))
        elif name == "BRANCH":
            found.append((name, [_nodes(way) for way in value[1]]))
        elif name == "SUBPATTERN" and not value[1] and not value[2]:
            found += _nodes(value[3])
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, body = value
            found.append(("REPEAT", (low, int(high), _nodes(body))))
        elif name in ("ASSERT", "ASSERT_NOT"):
            direction, body = value
            back = body.getwidth()[0] if direction < 0 else None
            found.append(("LOOK", (back, _nodes(body), name == "ASSERT")))
        else:
            raise PatternError(f"it has {name.lower()}, which is not regular")
    return found


class Text:
    """A text to match, with the positions of characters and of empty matches in it. Bit i stands
    for the position before character i."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._chars: dict[str, int] = {}
        for i, char in enumerate(text):
            self._chars[char] = self._chars.get(char, 0) | 1 << i
        self._found: dict[Callable[[str], bool], int] = {}

    def after(self, nodes: list[_Node], start: int, work: Work) -> int:
        """The positions where a sequence can end if it begins at one of `start`."""
        for op, value in nodes:
            if not start:
                return 0
            work.step()
            start = self._after_one(op, value, start, work)
        return start

    def _after_one(self, op: str, value: Any, start: int, work: Work) -> int:
        if op == "LITERAL":
            return (start & self._chars.get(value, 0)) << 1
        if op == "CHARACTER":
            return (start & self._where(value)) << 1
        if op == "BRANCH":
            ends = 0
            for way in value:
                ends |= self.after(way, start, work)
            return ends
        if op == "REPEAT":
            low, high, body = value
            return self._repeated(low, high, body, start, work)
        if op == "AT":
            return start & self._empty(value)
        if op == "LOOK":
            back, body, wanted = value
            return self._looked(back, body, wanted, start, work)
        return 0  # FAILURE

    def _repeated(self, low: int, high: int, nodes: list[_Node], start: int, work: Work) -> int:
        # a loop with more rounds than characters contains an empty match and changes nothing
        for _ in range(min(low, len(self.text) + 1)):
            before, start = start, self.after(nodes, start, work)
            if start == before:
                break
        if len(nodes) == 1 and nodes[0][0] == "CHARACTER" and high - low >= len(self.text):
            # the carries of the addition move each position to the end of its run of characters
            where = self._where(nodes[0][1])
            return start | (((start & where) + where) ^ where)
        ends = new = start
        for _ in range(min(high - low, len(self.text) + 1)):
            new = self.after(nodes, new, work) & ~ends
            if not new:
                break
            ends |= new
        return ends

    def _looked(
        self, back: int | None, nodes: list[_Node], wanted: bool, start: int, work: Work
    ) -> int:
        kept = 0
        for i in range(start.bit_length()):
            if not start >> i & 1:
                continue
            work.step()
            if back is None:
                found = self.after(nodes, 1 << i, work) != 0
            else:
                found = i >= back and self.after(nodes, 1 << (i - back), work) >> i & 1 != 0
            if found == wanted:
                kept |= 1 << i
        return kept

    def _where(self, test: Callable[[str], bool]) -> int:
        if test not in self._found:
            self._found[test] = sum(bits for char, bits in self._chars.items() if test(char))
        return self._found[test]

    def _empty(self, pattern: str) -> int:
        bits = 0
        for found in re.finditer(pattern, self.text):
            bits |= 1 << found.start()
        return bits


def _test(op: str, value: Any) -> Callable[[str], bool]:
    """A function that says whether a node matches a character."""
    if op == "ANY":
        return lambda char: char != "\n"
    if op == "NOT_LITERAL":
        return lambda char: ord(char) != value

    def one_of(char: str) -> bool:
        negate = False
        for kind, what in value:
            name = str(kind)
            if name == "NEGATE":
                negate = True
            elif (
                (name == "LITERAL" and ord(char) == what)
                or (name == "RANGE" and what[0] <= ord(char) <= what[1])
                or (name == "CATEGORY" and re.match(_CATEGORIES[str(what)], char))
            ):
                return not negate
        return negate

    return one_of
