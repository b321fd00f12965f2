"""The report of a run, written in a process of its own after a training or an evaluation."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from sft_dist.world import EXIT_CODES

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0


def write_report_apart(run_dir: Path, console: Console) -> None:
    """Write report.html and curve.png. Best effort, for the run is done whatever comes of it."""
    command = [sys.executable, "-m", "sft_dist", "report", str(run_dir)]
    # It is no rank, and its exit code is not rank 0's.
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", EXIT_CODES)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("no report was written: %s; `sft-dist report %s` tries again", error, run_dir)
        return
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        logger.warning("no report was written: %s; `sft-dist report %s` tries again", reason[0], run_dir)
    else:
        console.print(done.stdout.strip(), markup=False, highlight=False)
