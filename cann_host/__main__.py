"""`python -m cann_host`: run a script or a module on the stand-in for CANN."""

from __future__ import annotations

import argparse
import runpy
import sys
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


def main(arguments: list[str]) -> int:
    """Run what the arguments name; returns the exit code of the launcher itself."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    module, script = parsed.module, parsed.script
    given = {name: getattr(parsed, name) for name in VARIABLES}
    if module == []:
        parser.error("-m needs the name of a module")
    if not module and script and not Path(script[0]).exists():
        print(f"cann_host: no such script: {script[0]}", file=sys.stderr)
        return 2
    try:
        if not module and not script:
            parser.print_usage()
            for name, value in {**cann_host.info(), **asdict(Options.of(**given))}.items():
                print(f"{name}: {value}")
            return 0
        cann_host.activate(**given)
    except cann_host.CannHostError as error:
        print(f"cann_host: {error}", file=sys.stderr)
        return 1
    if module:
        sys.argv = module
        # `python -m` puts the working directory first, as it did for this launcher.
        runpy.run_module(module[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        sys.path[0] = str(Path(script[0]).resolve().parent)
        runpy.run_path(script[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
