"""The commands of `python -m lq_graph`, one module each.

A module says what the command is and takes its options; it imports torch, and whatever else it
needs, only when it runs.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from ..doctor import command as doctor
from . import check, compare, explain, forecast, inspect

__all__ = ["COMMANDS", "Command"]


class Command(Protocol):
    """What the module of a command has.

    Attributes:
        HELP: one line, in the list of the commands.
        DESCRIPTION, EPILOG: in the command's own help, before and after the options.
        NEEDS_TORCH: whether torch is imported, and the operators registered, before it runs.
    """

    HELP: str
    DESCRIPTION: str
    EPILOG: str
    NEEDS_TORCH: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options."""

    def run(self, asked: argparse.Namespace) -> int:
        """Do it, and print; returns the exit status.

        Raises:
            LinearQuantError: what was asked for cannot be done; its text is printed.
        """


# in the order of the help
COMMANDS: dict[str, Command] = {
    "check": check,
    "explain": explain,
    "compare": compare,
    "forecast": forecast,
    "inspect": inspect,
    "doctor": doctor,
}
