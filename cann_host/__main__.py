"""`python -m cann_host`: run a script or a module on the stand-in for CANN."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import cann_host

USAGE = """\
usage: python -m cann_host script.py [args]
       python -m cann_host -m module [args]"""


def main(arguments: list[str]) -> int:
    """Run what the arguments name; returns the exit code of the launcher itself."""
    if not arguments:
        print(USAGE)
        for name, value in cann_host.info().items():
            print(f"{name}: {value}")
        return 0
    if arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    is_module = arguments[0] == "-m"
    if (is_module and len(arguments) == 1) or (not is_module and arguments[0].startswith("-")):
        print(USAGE, file=sys.stderr)
        return 2
    if not is_module and not Path(arguments[0]).exists():
        print(f"cann_host: no such script: {arguments[0]}", file=sys.stderr)
        return 2
    try:
        cann_host.activate()
    except cann_host.CannHostError as error:
        print(f"cann_host: {error}", file=sys.stderr)
        return 1
    if is_module:
        sys.argv = arguments[1:]
        # `python -m` puts the working directory first, as it did for this launcher.
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
