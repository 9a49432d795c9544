"""The directive `{generated} NAME`: a table of tables.py, made when the pages are built; and what
docstrings write that reStructuredText reads otherwise."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from tables import TABLES


class Generated(Directive):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in TABLES:
            raise self.error(f"there is no table {name}; there are {', '.join(TABLES)}")
        content = nodes.container(classes=["generated"])
        lines = TABLES[name]().splitlines()
        self.state.nested_parse(StringList(lines, name), self.content_offset, content)
        return [content]


def prepare(*event: Any) -> None:
    """Make a literal block of each indented block after a paragraph and an empty line. Keep `n.`
    and `k.` from being items of a list."""
    lines: list[str] = event[-1]  # after app, what, name, obj, options
    lines[:] = [re.sub(r"(^|: )([a-z]\.)", r"\1\\\2", line) for line in lines]
    for i in range(len(lines) - 1, 1, -1):
        paragraph, empty, line = lines[i - 2 : i + 1]
        begins = paragraph[:1].strip() and not empty.strip() and line.startswith("    ")
        if begins and not paragraph.endswith("::"):
            lines[i:i] = ["::", ""]


def setup(app: Any) -> dict[str, bool]:
    """Register both."""
    app.add_directive("generated", Generated)
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
