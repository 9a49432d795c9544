"""`python -m cann_host` without the stand-in, which takes seconds to load: what the launcher itself
does. `python -m not_activated ARGUMENTS`."""

import sys

import cann_host
from cann_host import launcher

cann_host.activate = lambda **options: None
sys.exit(launcher.main(sys.argv[1:]))
