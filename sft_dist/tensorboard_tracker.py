"""TensorBoard: metrics under the names of `metric_names` as event files in <run>/tensorboard.

Best effort: the first failure is said once, and the run goes on.
"""

import logging
from pathlib import Path
from typing import Any

from sft_dist.metric_names import named_numbers
from sft_dist.metrics import Metrics, to_line
from sft_dist.redact import redacted
from sft_dist.run_files import TENSORBOARD

logger = logging.getLogger(__name__)

FLUSH_S = 10
"""The longest time until a step is to be seen."""


class TensorboardTracker:
    """Writes behind the training: a thread of TensorBoard's own takes what is logged."""

    def __init__(self, run_dir: Path, *, done: int, peak_flops: float | None) -> None:
        """done: the step the run goes on after; what an earlier start wrote of later steps is hidden.

        peak_flops: of all devices together.
        """
        self._peak_flops = peak_flops
        self._writer: Any = None  # a SummaryWriter: torch is loaded where it is used
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_dir / TENSORBOARD), purge_step=done + 1 if done else 0, flush_secs=FLUSH_S
            )
        except ImportError:
            self._give_up("it is not installed; pip install 'sft-dist[tensorboard]'")
        except OSError as error:
            self._give_up(str(error))

    def log(self, metrics: Metrics) -> None:
        if self._writer is None:
            return
        try:
            for name, value in named_numbers(to_line(metrics), peak_flops=self._peak_flops).items():
                # The new style alone can hold a double.
                self._writer.add_scalar(name, value, metrics.step, new_style=True, double_precision=True)
        except (OSError, ValueError) as error:  # ValueError: its file was closed under it
            self._give_up(str(error))

    def close(self, *, failed: bool = False) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except (OSError, ValueError) as error:
            self._give_up(str(error))
        self._writer = None

    def _give_up(self, reason: str) -> None:
        self._writer = None
        logger.warning(
            "TensorBoard is off for this run: %s; training goes on, and metrics.jsonl has everything", redacted(reason)
        )
