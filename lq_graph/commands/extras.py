"""Packages that not every user has, asked for before a command begins its work."""

from __future__ import annotations

import importlib.util

from ..errors import LinearQuantValueError

__all__ = ["need"]


def need(command: str, option: str, package: str) -> None:
    """Check that a package is installed.

    Raises:
        LinearQuantValueError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise LinearQuantValueError(
            f"{command}: {option} needs {package}. What to do: leave it out, or pip install "
            f"{package}."
        )
