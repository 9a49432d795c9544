"""Runs the suite on the real torch_npu and torchair, over cann_host in place of CANN.

LQ_GRAPH_TEST_NPU=1 runs it on the machine's own NPU and CANN instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("LQ_GRAPH_TEST_NPU") != "1":
    import cann_host

    cann_host.activate()  # before anything imports torch
