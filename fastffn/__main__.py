"""`python -m fastffn`, and `torchrun -m fastffn`: the command line."""

import sys

from fastffn.cli import main

sys.exit(main())
