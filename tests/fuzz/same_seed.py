"""Prints, for each kind of input, whether the same seed makes the same ones, and several."""

import random

import cann_host

cann_host.activate()

import calls  # noqa: E402
import graphs  # noqa: E402
import makers  # noqa: E402, F401 - the other families of calls

for kind in (calls, graphs):
    target = kind.Target(cann_host.runtime.current().library)
    made = [[target.make(random.Random(f"1 {i}")) for i in range(20)] for _ in range(2)]
    print(made[0] == made[1], len(set(made[0])) > 10)
