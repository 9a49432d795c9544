"""Runs a program and keeps the GE graphs that torchair lowers in it.

    python -m cann_host benchmarks/dump_graphs.py FOLDER PROGRAM [ARGUMENT ...]

The program makes torchair's configuration itself, so this gives each new configuration the folder.
`recipes.py --graphs` starts the vendor's recipes so.
"""

from __future__ import annotations

import functools
import runpy
import sys
from typing import Any

import torch_npu  # noqa: F401  (makes the name `torchair` importable)
from torchair import CompilerConfig


def main() -> None:
    folder, program = sys.argv[1:3]
    make = CompilerConfig.__init__

    @functools.wraps(make)
    def dumping(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.debug.graph_dump.type, self.debug.graph_dump.path = "txt", folder

    CompilerConfig.__init__ = dumping
    sys.argv = sys.argv[2:]
    sys.path[0] = program.rpartition("/")[0]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main()
