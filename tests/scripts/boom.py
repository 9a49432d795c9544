"""A module that raises, for `python -m cann_host -m boom`."""

import sys

print(sys.argv[1:])
raise ValueError("from the script")
