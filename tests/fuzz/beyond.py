"""A kernel of torch's reads bytes beyond an allocation: `beyond.py BUILD BYTES`."""

import sys

import cann_host

cann_host.__path__.insert(0, f"{sys.argv[1]}/cann_host")
cann_host.activate()

import calls  # noqa: E402
import torch  # noqa: E402

from cann_host.memory import over_memory  # noqa: E402

torch.npu.set_device(0)
block, size = calls.Target(cann_host.runtime.current().library).blocks[2], calls.BLOCKS[2]
over_memory(block, torch.int8, (size + int(sys.argv[2]),)).sum()
