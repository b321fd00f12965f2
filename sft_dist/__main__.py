"""`python -m sft_dist` is `sft-dist`; launchers start modules."""

import sys

from sft_dist.cli import main

sys.exit(main())
