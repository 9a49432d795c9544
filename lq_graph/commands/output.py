"""What commands print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

__all__ = ["add_json", "only_the_answer", "print_json"]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def print_json(answer: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Print one document.

    Raises:
        ValueError: a number in it is not finite; JSON has no word for it.
    """
    print(json.dumps(answer, indent=2, allow_nan=False))


@contextmanager
def only_the_answer(as_json: bool) -> Iterator[None]:
    """With --json, everything that is printed inside goes to stderr: what a model of the user's own
    prints, and the messages of libraries. The answer, printed afterwards, is then alone on
    stdout."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed
        kept = None
    try:
        if kept is not None:
            os.dup2(2, 1)  # for libraries in C++
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)
