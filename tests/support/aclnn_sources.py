"""The operators of libopapi as cann_host's sources declare them, and their argument types."""

from __future__ import annotations

import re
from pathlib import Path

import cann_host

__all__ = ["SOURCES", "c_types", "declared"]

_CSRC = Path(cann_host.__file__).parent / "csrc"
SOURCES = "".join(
    re.sub(r"//.*", "", path.read_text()).replace("\\\n", " ")
    for path in sorted(_CSRC.glob("aclnn*.cpp"))
)


def declared(macro: str = "OPERATOR") -> dict[str, list[str]]:
    """The types of each operator's arguments, by the names that csrc/aclnn.h gives them.

    Args:
        macro: what declares them, without CANN_HOST_.
    """
    lists = dict(re.findall(r"#define (\w+) ([^\n()]+)\n", SOURCES))
    found = re.findall(rf"\nCANN_HOST_{macro}\((\w+),([^)]*)\)", SOURCES)
    return {name: _expanded(types, lists) for name, types in found}


def _expanded(types: str, lists: dict[str, str]) -> list[str]:
    found: list[str] = []
    for one in re.findall(r"\w+", types):
        found += _expanded(lists[one], lists) if one in lists else [one]
    return found


def c_types() -> dict[str, str]:
    """The C type behind each name, without const."""
    header = (_CSRC / "aclnn.h").read_text()
    return dict(re.findall(r"\nusing (\w+) = (?:const )?([\w*]+);", header))
