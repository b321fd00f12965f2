"""`python -m sft_dist` is `sft-dist`; launchers start modules."""

from sft_dist.cli import run

run()
