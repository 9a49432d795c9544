"""`python -m cann_host`: run a script or a module on the stand-in for CANN."""

from __future__ import annotations

import argparse
import importlib.util
import io
import runpy
import sys
import traceback
import zipfile
from dataclasses import asdict
from pathlib import Path

import cann_host
from cann_host.options import VARIABLES, Options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cann_host",
        usage="%(prog)s [options] script.py [args]\n       %(prog)s [options] -m module [args]",
        description="Run a script or a module with the real torch_npu and torchair, on a stand-in "
        "for CANN that computes on the CPU. Without one, print what the stand-in is.",
        allow_abbrev=False,
    )
    for name, (variable, takes, what) in VARIABLES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, metavar=takes, help=f"{what} (or the variable {variable})")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("script", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


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
    if not path.is_file():  # runpy would open it twice, and find a pipe empty
        return f"{path} is not a regular file"
    if path.suffix == ".pyc" or zipfile.is_zipfile(path):
        return ""
    try:
        with io.open_code(str(path.absolute())) as file:
            compile(file.read(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, before Python 3.12
        text = "".join(traceback.format_exception_only(error)).rstrip()
        return f"{path} is not a Python program\n{text}"
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


def main(arguments: list[str]) -> int:
    """Run what the arguments name; returns the exit code of the launcher itself, 2 if it ran
    nothing."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    module, script = parsed.module, parsed.script
    given = {name: getattr(parsed, name) for name in VARIABLES}
    if module == []:
        parser.error("-m needs the name of a module")
    try:
        options = Options.of(**given)
        if not module and not script:
            parser.print_usage()
            print(_settings(options))
            return 0
        why = _why_no_module(module[0], False) if module else _why_no_script(Path(script[0]))
        if why:
            return _refuse(why)
        cann_host.activate(**given)
    except cann_host.CannHostError as error:
        return _refuse(str(error))
    if module:
        if why := _why_no_module(module[0], True):
            return _refuse(why)
        sys.argv = module
        # `python -m` puts the working directory first, as it did for this launcher.
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        sys.path[0] = str(Path(script[0]).resolve().parent)
        runpy.run_path(script[0], run_name="__main__")
    return 0


def _refuse(why: str) -> int:
    print(f"cann_host: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
