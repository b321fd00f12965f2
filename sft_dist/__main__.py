"""`python -m sft_dist` is `sft-dist`; launchers start modules."""

import sys

from sft_dist.cli import main
from sft_dist.world import report_exit

code = main()
report_exit(code)
sys.exit(code)
