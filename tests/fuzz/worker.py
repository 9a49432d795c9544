"""Runs inputs in the process that `run.py` starts under the sanitizers.

Before an input is used it is written, with the counts so far, to a file that is mapped into memory:
if the process dies, `run.py` reads there which input ended it.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import struct
import sys
import time
from pathlib import Path
from typing import Any

# number of the input, accepted, refused, length of the input, seconds so far
HEAD = struct.Struct("<4Qd")
MOST_BYTES = 1 << 20
FAILED = 99  # exit status of a failure that is no crash


def fail(text: str) -> None:
    print(f"fuzz: {text}", file=sys.stderr, flush=True)
    os._exit(FAILED)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("graphs", "calls"))
    parser.add_argument("build", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--replay", type=Path, nargs="*", default=None)
    parser.add_argument("--tell", action="store_true", help="what became of each input")
    options = parser.parse_args()

    import cann_host

    cann_host.__path__.insert(0, str(options.build / "cann_host"))
    cann_host.activate()
    import torch

    from lq_graph import kernels

    kernels.__path__.insert(0, str(options.build / "lq_graph" / "kernels"))
    torch.set_num_threads(1)
    torch.npu.set_device(0)
    library: Any = cann_host.runtime.current().library
    # ctypes would drop an exception of a callback and return success
    sys.unraisablehook = lambda raised: fail(f"an exception was dropped: {raised.exc_value!r}")
    import calls
    import graphs
    import makers  # noqa: F401 - the other families of calls

    kind = {"calls": calls, "graphs": graphs}[options.kind]
    target = kind.Target(library)

    with options.state.open("r+b") as file:
        state = mmap.mmap(file.fileno(), 0)
    accepted = refused = 0
    begin = time.monotonic()

    def inputs() -> Any:
        if options.replay is not None:
            for path in options.replay:
                yield path.read_bytes()
            return
        index = options.first
        while time.monotonic() - begin < options.seconds:
            yield target.make(random.Random(f"{options.seed} {options.kind} {index}"))
            index += 1

    number = options.first
    for data in inputs():
        data = data[:MOST_BYTES]
        HEAD.pack_into(state, 0, number, accepted, refused, len(data), time.monotonic() - begin)
        state[HEAD.size : HEAD.size + len(data)] = data
        library.cann_host_set_error(b"")
        done = target.run(data)
        text = library.cann_host_recent_error().decode(errors="replace")
        accepted, refused = accepted + done, refused + (not done)
        if not done and not text:
            fail("refused without a word")
        if options.tell:
            print("accepted" if done else f"refused: {text}", flush=True)
        number += 1
    HEAD.pack_into(state, 0, number, accepted, refused, 0, time.monotonic() - begin)
    os._exit(0)  # an end in order takes seconds under the sanitizers; tests/ has it


if __name__ == "__main__":
    main()
