"""Parts of the pages that are generated: pages from outside docs/, tables, and docstrings as
reStructuredText.

The pages can also be read as plain Markdown. So links point to files, and the pages contain the
tables; a test compares them with the output of `tables.py`, and the build replaces them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from tables import TABLES, put_in

ROOT = Path(__file__).parents[2]

# files outside docs/ that are pages: the page that is built
PAGES = {
    "README.md": "docs/index.md",
    "CHANGELOG.md": "docs/changelog.md",
    "CONTRIBUTING.md": "docs/contributing.md",
    "SECURITY.md": "docs/security.md",
    "cann_host/README.md": "docs/cann_host.md",
}
_PAGE = re.compile(r"^<!-- page: (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _links(text: str, written: str, shown: str) -> str:
    """The text of a file with its links changed for the page that shows it. A link to a file that
    is not a page becomes plain text.

    Args:
        text: Markdown.
        written, shown: the folders of the file and of the page, from the root.
    """

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(written, found[2]))
        page = PAGES.get(target, target)
        if not page.startswith("docs/"):
            return found[1]
        return f"[{found[1]}]({posixpath.relpath(page, shown)}{found[3] or ''})"

    return _LINK.sub(link, text)


def read_page(_app: Any, docname: str, source: list[str]) -> None:
    """Put in the pages from outside docs/ and the tables."""
    folder = posixpath.dirname(f"docs/{docname}")

    def page(found: re.Match[str]) -> str:
        written = posixpath.dirname(found[1])
        return _links((ROOT / found[1]).read_text(), written, folder)

    text = put_in(_links(source[0], folder, folder), TABLES)
    source[0] = _PAGE.sub(page, text)


def prepare_docstring(*event: Any) -> None:
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
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", prepare_docstring, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
