"""Prints, for each operator of libopapi, how many unchanged calls of its maker were accepted and
refused, and the first refusal: `python tests/fuzz/accepted.py [--calls N]`. An operator that is
never accepted has no maker that reaches its arithmetic; the exit status is then 1."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys

import cann_host

cann_host.activate()

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401

from cann_host.aclnn import OPERATORS  # noqa: E402

import calls  # noqa: E402 # isort: skip
import makers  # noqa: E402, F401 # isort: skip - the other families

OTHER_CHIPS = "it is for Ascend 950"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=40)
    options = parser.parse_args()
    torch.npu.set_device(0)  # type: ignore[attr-defined]
    library = cann_host.runtime.current().library
    target = calls.Target(library)
    missing = 0
    for name in sorted(OPERATORS):
        accepted, refusals = 0, []
        for number in range(options.calls if name in calls.MAKERS else 0):
            arguments = calls.MAKERS[name](random.Random(f"{name} {number}"))
            call = {"op": name, "then": "launch", "arguments": arguments}
            if target.run(json.dumps(call).encode()):
                accepted += 1
            else:
                refusals.append(library.cann_host_recent_error().decode(errors="replace"))
        first = refusals[0] if refusals else ""
        print(f"{name:40} {accepted:4} accepted {len(refusals):4} refused  {first[:90]}")
        missing += not accepted and OTHER_CHIPS not in first
    print(f"{len(OPERATORS)} operators, {missing} never accepted")
    return int(missing > 0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
