"""The command line of `python -m cann_host`: its options, and what to run."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import cann_host
from cann_host import as_python
from cann_host.as_python import Program
from cann_host.options import VARIABLES, Options

__all__ = ["main"]

_EXIT_CODES = """\
exit codes: the program's own; 0 if there was none; 1 after an error that the program did not catch;
2 if nothing was run; ended by SIGINT (130 in a shell) after Ctrl-C."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cann_host",
        usage="%(prog)s [options] script.py [args]   (or a folder, a zip file, - for stdin)\n"
        "       %(prog)s [options] -m module [args]\n"
        "       %(prog)s [options] -c code [args]\n"
        "       %(prog)s -i",
        description="Run a program with the real torch_npu and torchair, on a stand-in for CANN "
        "that computes on the CPU. Without a program, print what the stand-in is. What follows the "
        "program is for the program. Python's own options come first: python -u -m cann_host ...",
        epilog=_EXIT_CODES,
        allow_abbrev=False,
    )
    for name, (variable, takes, what) in VARIABLES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, metavar=takes, help=f"{what} (or the variable {variable})")
    parser.add_argument(
        "-i",
        dest="stays",
        action="store_true",
        help="a console: after the program, with its names; without one, with torch and torch_npu",
    )
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's own options, and the program with its arguments: [], ["-c", code, ...],
    ["-m", module, ...] or [path or -, ...]. As python's own, -c and -m end the options, may follow
    -i in one word, and may have their value in the same word."""
    rest = list(arguments)
    own: list[str] = []
    takes_value = {"--" + name.replace("_", "-") for name in VARIABLES}
    while rest:
        word = rest.pop(0)
        if word == "--":
            return own, rest
        if word == "-" or not word.startswith("-"):
            return own, [word, *rest]
        if word.startswith("--"):
            own.append(word)
            if word in takes_value and rest:
                own.append(rest.pop(0))
            continue
        flags = word[1:].lstrip("i")
        if len(flags) < len(word) - 1:
            own.append("-i")
        if flags[:1] in ("c", "m"):
            value = [flags[1:]] if len(flags) > 1 else []
            return own, ["-" + flags[0], *value, *rest]
        if flags:
            own.append("-" + flags)
    return own, []


def _settings(options: Options) -> str:
    """What a program would run on."""
    values = {**cann_host.info(), **asdict(options)}
    notes = {
        "active": "a program must be named" if not values["active"] else "",
        "memory": "the devices share the host's memory" if not options.memory else "",
        "fail": "no call fails" if not options.fail else "",
    }
    return "\n".join(
        f"{name}: {value}" + (f" ({notes[name]})" if notes.get(name) else "")
        for name, value in values.items()
    )


def _why_no_script(path: Path) -> str:
    """Why Python cannot run a file or a folder; empty if it can."""
    if not path.exists():
        return f"no such script: {path}"
    if path.is_dir():
        return "" if (path / "__main__.py").is_file() else f"{path} is a folder without __main__.py"
    return ""


def _why_no_module(name: str, active: bool) -> str:
    """Why Python cannot find `-m name`; empty if it can. Empty too if this is unknown before
    activation, because Python imports the packages around a module to find it."""
    if name.endswith(".py") and Path(name).exists():
        return f"-m takes the name of a module; for the file, leave -m out: {name}"
    if not all(part.isidentifier() for part in name.split(".")):
        return f"{name!r} is not the name of a module"
    if "." in name and not active:
        return ""
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            if not active:
                return ""
            name += ".__main__"
            found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the packages around it were found, but they import a missing module
        found = None
    except ValueError:  # a module without a spec, such as __main__
        found = None
    return "" if found is not None else f"no such module: {name}"


def _why_not(kind: str, name: str) -> str:
    """Why a program cannot be run, as far as this is known before activation; empty if it can."""
    if kind == "-m":
        return _why_no_module(name, False)
    return _why_no_script(Path(name)) if kind == "" else ""


def _load(kind: str, name: str, arguments: list[str], piped: bytes) -> Program:
    """The program, compiled. Raises SyntaxError, or OSError if it cannot be read."""
    if kind == "-c":
        return as_python.command(name, arguments)
    if kind == "-m":
        return as_python.module(name, arguments)
    if kind == "-":
        return as_python.text(name, piped, arguments)
    if Path(name).is_dir() or (Path(name).is_file() and zipfile.is_zipfile(name)):
        return as_python.folder(name, arguments)
    return as_python.file(name, arguments)


def _named(parser: argparse.ArgumentParser, program: list[str]) -> tuple[str, str, list[str]]:
    """The kind of a program ("-c", "-m", "-" for stdin, "" for a path), its name, its arguments."""
    if not program or program[0] == "-":
        return "-", "".join(program[:1]), program[1:]
    if program[0] not in ("-c", "-m"):
        return "", program[0], program[1:]
    if len(program) == 1:
        what = "code" if program[0] == "-c" else "the name of a module"
        parser.error(f"{program[0]} needs {what}")
    return program[0], program[1], program[2:]


def main(arguments: list[str]) -> int:
    """Run what the arguments name; returns the exit code of the launcher itself, 2 if it ran
    nothing."""
    own, program = _split(arguments)
    parser = _parser()
    parsed = parser.parse_args(own)
    given = {name: getattr(parsed, name) for name in VARIABLES}
    kind, name, rest = _named(parser, program)
    has_terminal = sys.stdin is None or sys.stdin.isatty()
    is_console = kind == "-" and (parsed.stays or (name == "-" and has_terminal))
    piped = b"" if kind != "-" or is_console or has_terminal else sys.stdin.buffer.read()
    try:
        options = Options.of(**given)
        if kind == "-" and not (name or is_console or piped.strip()):
            parser.print_usage()
            print(_settings(options))
            return 0
        if why := _why_not(kind, name):
            return _refuse(why)
        loaded = Program([name, *rest], lambda: None, "")
        try:
            if not is_console:
                loaded = _load(kind, name, rest, piped)
        except OSError as error:
            return _refuse(f"{name} cannot be read: {error.strerror}")
        except Exception:  # it is not Python
            with as_python.shown(stays=parsed.stays):
                raise
        cann_host.activate(**given)
    except cann_host.CannHostError as error:
        return _refuse(str(error))
    if kind == "-m" and (why := _why_no_module(name, True)):
        return _refuse(why)
    with as_python.shown(stays=parsed.stays):
        as_python.run(loaded)
    if is_console or parsed.stays:
        as_python.interact(is_new=is_console)
    return 0


def _refuse(why: str) -> int:
    print(f"cann_host: {why}", file=sys.stderr)
    return 2
