"""`python -m tvmatch` is the command `tvmatch`."""

import sys

from tvmatch.cli import main

sys.exit(main())
