"""`python -m saccade` is the command; under torchrun: `torchrun --nproc-per-node 2 -m saccade train ...`."""

import sys

from saccade.cli import main

sys.exit(main())
