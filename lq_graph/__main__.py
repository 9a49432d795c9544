"""`python -m lq_graph`: the commands are in command_line.py."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; returns the exit status."""
    if sys.argv[1:2] == ["doctor"]:  # it must work where torch cannot be imported
        from .doctor import command

        return command.main(sys.argv[2:])
    from . import command_line

    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())
