"""Runs the code blocks of Markdown pages: python -m cann_host run_doc_pages.py ROOT PAGE...

Each page runs in a forked process of its own, in a temporary folder from which the checkout's
`examples` and `benchmarks` can be reached; its blocks share one namespace, in order. Prints a JSON
object, page to list of failures. What a page may hold:

    ```python                      runs
    ```bash                        each command runs
    ```console                     `$ command` runs; lines below it are its output, compared
    <!-- output -->                the block below is the output of the block before, compared
    <!-- message -->               the same, wherever lines are broken
    <!-- not run: reason -->       the block below is not run
    <!-- setup: code -->           runs, and the reader does not see it

In output, `...` stands for anything, and numbers of seconds are not compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Block", "blocks", "matches"]

_PART = re.compile(
    r"^<!-- setup:(?P<setup>.*?)-->[ ]*$"
    r"|(?:^<!-- (?P<marker>output|message|not run: [^\n]*?) -->[ ]*\n\n?)?"
    r"^(?P<fence>`{3,}|:{3,})(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_DIRECTIVE = re.compile(r"\{[\w-]+\}")  # {note}, {include}: MyST's, no code


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or code in a setup comment.

    Attributes:
        line: where it begins, from 1.
        language: as the fence names it; "setup" for a comment.
        marker: "output", "message", "not run: reason", or empty.
        text: what is in it.
    """

    line: int
    language: str
    marker: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    for found in _PART.finditer(page):
        line = page.count("\n", 0, found.start()) + 1
        if found["setup"] is not None:
            yield Block(line, "setup", "", textwrap.dedent(found["setup"]))
        elif not _DIRECTIVE.match(found["language"]):
            yield Block(line, found["language"].strip(), found["marker"] or "", found["text"])


def matches(shown: str, got: str) -> bool:
    """Whether output is what a page shows; `...` stands for anything."""

    def plain(text: str) -> str:
        text = re.sub(r"\d+(?:\.\d+)?(?= (?:s|ms|us)\b)", "#", text)
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    parts = [re.escape(part) for part in plain(shown).split("...")]
    return re.fullmatch(".*".join(parts), plain(got), re.DOTALL) is not None


def _commands(text: str) -> list[str]:
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _run_command(command: str) -> str:
    """The output of a command. Python programs that run on the stand-in run in this process, which
    has it already."""
    words = shlex.split(command, comments=True)
    if words[:3] == ["python", "-m", "cann_host"]:
        words = ["python", *words[3:]]
    elif words[:3] != ["python", "-m", "lq_graph"]:
        words = []
    if len(words) < 2 or (words[1].startswith("-") and words[1] != "-m"):
        command = re.sub(r"^python\b", shlex.quote(sys.executable), command)
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{command}: exit status {done.returncode}\n{done.stderr}")
        return done.stdout
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            if words[1] == "-m":
                sys.argv = words[2:]
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words[1:]
                runpy.run_path(words[1], run_name="__main__")
        except SystemExit as left:
            if left.code not in (0, 1, None):
                raise RuntimeError(f"{command}: exit status {left.code}") from None
    return printed.getvalue()


def _run_console(text: str) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        got = _run_command(command)
        if shown.strip() and not matches(shown, got):
            raise AssertionError(f"$ {command} prints\n{got}")


def _run(page: Path) -> list[str]:
    """What fails in a page."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed: str | None = None
    failures = []
    for block in blocks(page.read_text()):
        if block.marker.startswith("not run"):
            printed = None
            continue
        try:
            if block.marker in ("output", "message"):
                if printed is None:
                    raise AssertionError("no block that runs is before this output")
                shown, got = block.text, printed
                if block.marker == "message":
                    shown, got = (" ".join(text.split()) for text in (shown, got))
                if not matches(shown, got):
                    raise AssertionError(f"the block before prints\n{printed}")
            elif block.language in ("python", "setup"):
                code = "\n" * block.line + block.text
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile(code, page.name, "exec"), names)
                if block.language == "python" or out.getvalue():
                    printed = out.getvalue()
            elif block.language == "bash":
                printed = "".join(map(_run_command, _commands(block.text)))
            elif block.language == "console":
                _run_console(block.text)
            else:
                raise AssertionError(
                    f"a block of {block.language or 'no language'}: mark it as output or not run"
                )
        except BaseException:
            failures.append(f"line {block.line}: {traceback.format_exc(limit=-2)}")
            printed = ""
    return failures


def _in_a_process(root: Path, page: Path) -> list[str]:
    """`_run`, in a forked child."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = os.fork()
        if not child:
            try:
                os.chdir(folder)
                for name in ("examples", "benchmarks"):
                    os.symlink(root / name, name)
                result.write_text(json.dumps(_run(page)))
            finally:
                os._exit(0)  # whatever happens, the child does not go on with the parent's pages
        _, status = os.waitpid(child, 0)
        if status or not result.exists():
            return [f"the page's process ended with status {status}"]
        failures: list[str] = json.loads(result.read_text())
        return failures


def main() -> None:
    root, *pages = (Path(argument).resolve() for argument in sys.argv[1:])
    import torch

    import lq_graph  # noqa: F401 - imported once, before the processes are made

    torch.manual_seed(0)
    print(json.dumps({str(page): _in_a_process(root, page) for page in pages}))


if __name__ == "__main__":
    main()
