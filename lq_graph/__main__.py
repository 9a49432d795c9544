"""`python -m lq_graph`, and the console script `lq-graph`."""

from __future__ import annotations

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
