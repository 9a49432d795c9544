"""`python -m cann_host`: run a program on the stand-in for CANN."""

import sys

from cann_host.launcher import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
