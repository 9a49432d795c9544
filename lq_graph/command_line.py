"""`python -m lq_graph COMMAND ...`; the commands are in commands/.

Nothing here imports torch, so that --help, --version and mistakes are answered at once, also where
torch cannot be imported.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import lq_graph

from .commands import COMMANDS
from .errors import LinearQuantError
from .reports import colours

__all__ = ["main"]

_EPILOG = (
    "Exit status: 0 for yes or done, 1 if the answer is no, 2 for a mistake in the command, "
    "something that is missing, or an error of the model's own. Without an NPU: python -m "
    "cann_host -m lq_graph ..."
)


class _Version(argparse.Action):
    """--version: of lq_graph and of what it runs on, read from their metadata."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib import metadata

        versions = [f"lq_graph {lq_graph.__version__}"]
        for package in ("torch", "torch_npu"):
            try:
                versions.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                versions.append(f"{package} not installed")
        versions.append(f"Python {sys.version.split()[0]}")
        print(", ".join(versions))
        parser.exit()


def _prog() -> str:
    """How this program was started."""
    script = Path(sys.argv[0]).name
    if script.startswith("lq-graph"):
        return "lq-graph"
    # cann_host is a program that runs another one
    launched = sys.orig_argv[1:3] == ["-m", "cann_host"] or "-mcann_host" in sys.orig_argv[1:2]
    return f"python {'-m cann_host ' if launched else ''}-m lq_graph"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_prog(),
        description="Quantized linear layers from PyTorch to the Ascend NPU: ask what is legal, "
        "what a model becomes, what a checkpoint holds, and what a machine lacks.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of lq_graph and torch"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(
                name,
                help=command.HELP,
                description=command.DESCRIPTION,
                epilog=command.EPILOG,
            )
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0: yes, or done; 1: the answer is no; 2 (raised as SystemExit): a mistake in the command, or
    something that it needs is missing, or (returned) an error of the model's own; 130: stopped by
    Ctrl-C; 141: nobody reads the output.
    """
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    parser = _parser()
    asked = parser.parse_args(arguments)
    command = COMMANDS[asked.command]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder may have any name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if command.NEEDS_TORCH:
            _start(parser)
        with colours():
            status = command.run(asked)
        sys.stdout.flush()
        return status
    except LinearQuantError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`: Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception:  # of a model of the user's own; Python's 1 would say that the answer is no
        traceback.print_exc()
        return 2


def _start(parser: argparse.ArgumentParser) -> None:
    try:
        lq_graph._start()
    except ImportError as error:
        text = str(error)
        if error.name == "torch":
            text = (
                "torch is not installed. What to do: pip install torch; `python -m lq_graph "
                "doctor` looks at the whole machine"
            )
        parser.exit(2, f"{parser.prog}: error: {text}\n")
