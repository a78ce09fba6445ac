"""`python -m sabrage` is the command line, for torchrun and the like."""

import sys

from sabrage.cli import main

sys.exit(main())
