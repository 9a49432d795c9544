"""Saves one checkpoint over another until it is killed: `saves_for_ever.py FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests
import cann_host

cann_host.activate()

from lq_graph import save_checkpoint  # noqa: E402
from support.checkpoints import FORMATS, quantized  # noqa: E402

both = {kind: (quantized(1, old, "up"), quantized(2, new)) for kind, (old, new) in FORMATS.items()}
print("ready", flush=True)
while True:
    for i in (0, 1):
        for kind, models in both.items():
            save_checkpoint(models[i], f"{sys.argv[1]}/{kind}", kind)
