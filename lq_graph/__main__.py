"""`python -m lq_graph`: the commands are in command_line.py."""

from __future__ import annotations

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
