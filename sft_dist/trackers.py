"""Where metrics go: the JSONL file, the terminal, wandb, TensorBoard. Rank 0 only; other ranks have none."""

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console

from sft_dist.config import Recipe
from sft_dist.environment import all_peak_flops
from sft_dist.live.tracker import LiveTracker, can_be_live
from sft_dist.metrics import (
    ChangeMetrics,
    CommitMetrics,
    HeldOutMetrics,
    Metrics,
    Replay,
    ScoreMetrics,
    StepMetrics,
    to_line,
)
from sft_dist.redact import redacted, redacted_tree
from sft_dist.run_files import METRICS
from sft_dist.run_record import read_starts
from sft_dist.tensorboard_tracker import TensorboardTracker
from sft_dist.wandb_process import Start, WandbFailureError, WandbProcess, make_run_id

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, metrics: Metrics) -> None: ...
    def close(self, *, failed: bool = False) -> None:
        """failed: the run ends by an error."""


class Trackers:
    """All trackers of a run as one; a context that closes them."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, metrics: Metrics) -> None:
        for tracker in self._trackers:
            tracker.log(metrics)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as closing:  # all are closed, though the file of one may be on a full disk
            for tracker in reversed(self._trackers):
                closing.callback(tracker.close, failed=kind is not None)


class JsonlTracker:
    """Appends one line per record, and repairs a torn last line first: a crash may have cut it.

    Lines that a full disk does not take are kept and written when it does: whether the run stops is for the next
    checkpoint to say, on all ranks alike.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def log(self, metrics: Metrics) -> None:
        # NaN and infinity are not JSON; a withheld step says null.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in to_line(metrics).items()}
        was_waiting = bool(self._waiting)
        self._waiting += json.dumps(line).encode() + b"\n"
        failure = self._write()
        if isinstance(metrics, CommitMetrics) and failure is None:
            os.fsync(self._file.fileno())  # the steps before a checkpoint are never trained again
        if failure is not None and not was_waiting:
            logger.warning("%s: %s; lines are kept until it can be written again", self._path, failure.strerror)

    def close(self, *, failed: bool = False) -> None:
        failure = self._write() if self._waiting else None
        self._file.close()
        if failure is not None:
            lost = self._waiting.count(b"\n")
            logger.warning("%s: %s; its last %d lines are lost", self._path, failure.strerror, lost)

    def _write(self) -> OSError | None:
        """Write all that waits, or nothing: half a line would spoil the one behind it. Returns why it could not."""
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(self._waiting)
            if written < len(self._waiting):  # what a disk does that is full from here on
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            return error
        self._waiting = b""
        return None


class ConsoleTracker:
    """Plain lines, for logs and for terminals that are too narrow for the live view: about a hundred over the run."""

    def __init__(self, console: Console, *, num_steps: int) -> None:
        self._console, self._num_steps = console, num_steps

    def log(self, metrics: Metrics) -> None:
        if isinstance(metrics, HeldOutMetrics):
            named = f" of {metrics.set}" * (metrics.set != "held_out")
            self._console.print(
                f"held-out loss{named} {metrics.held_out_loss:.4f} after step {metrics.step} "
                f"({metrics.examples} examples)",
                markup=False,
                highlight=False,
            )
            return
        if isinstance(metrics, ScoreMetrics):
            named = f"{metrics.set}/" * (metrics.set != "held_out")
            self._console.print(
                f"score of {named}{metrics.task} {metrics.score:.1%} after step {metrics.step} "
                f"({metrics.metric}, {metrics.n} answers)",
                markup=False,
                highlight=False,
            )
            return
        if isinstance(metrics, CommitMetrics):
            self._console.print(
                f"checkpoint of step {metrics.step}: {metrics.size_bytes / 1e6:,.1f} MB in {metrics.seconds:.1f} s, "
                f"training stood still for {metrics.stall_s:.2f} s",
                highlight=False,
            )
            return
        if isinstance(metrics, ChangeMetrics):
            return  # the banner says it
        is_due = metrics.step == self._num_steps or metrics.step % max(1, self._num_steps // 100) == 0
        if is_due or not metrics.applied:
            withheld = f"  WITHHELD: {metrics.withheld}" * (not metrics.applied)
            self._console.print(
                f"step {metrics.step}/{self._num_steps}  loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  "
                f"|g| {metrics.grad_norm:.3f}  {metrics.tokens_per_s:,.0f} tok/s{withheld}",
                highlight=False,
            )

    def close(self, *, failed: bool = False) -> None: ...


class WandbTracker:
    """Best effort, in a process of its own: the first failure is said once, and the run goes on.

    `log` never waits and never raises, whatever wandb does; `metrics.jsonl` has everything.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        peak_flops: float | None = None,
        init_timeout_s: float = 30.0,
        finish_timeout_s: float = 15.0,
        close_timeout_s: float = 20.0,
    ) -> None:
        """peak_flops: of all devices together.

        close_timeout_s: the longest that `close` waits; above finish_timeout_s, when wandb gives up by itself."""
        assert recipe.wandb is not None
        self._run_dir = recipe.run.path
        self._close_timeout_s = close_timeout_s
        self._process: WandbProcess | None = None
        try:
            start = Start(
                project=recipe.wandb.project,
                name=recipe.run.name,
                id=make_run_id(recipe.run.path),
                dir=str(recipe.run.path.resolve()),
                mode=recipe.wandb.mode,
                config=redacted_tree(recipe.model_dump(mode="json")),
                resume="allow",
                stats_pid=os.getpid(),
                init_timeout_s=init_timeout_s,
                finish_timeout_s=finish_timeout_s,
                peak_flops=peak_flops,
            )
            self._process = WandbProcess(start)
        except (OSError, WandbFailureError) as error:
            self._give_up(error)

    @property
    def pid(self) -> int | None:
        """Of the process that runs wandb; None after a failure."""
        return None if self._process is None else self._process.pid

    def log(self, metrics: Metrics) -> None:
        if self._process is not None:
            try:
                self._process.send(to_line(metrics))
            except WandbFailureError as failure:
                self._give_up(failure)

    def close(self, *, failed: bool = False) -> None:
        if self._process is not None:
            try:
                self._process.finish(exit_code=int(failed), timeout_s=self._close_timeout_s)
            except WandbFailureError as failure:
                self._give_up(failure)
            self._process = None

    def _give_up(self, error: Exception) -> None:
        self._process = None
        logger.warning(
            "wandb is off for this run: %s; training goes on, and `sft-dist sync %s` sends the metrics later",
            redacted(str(error)),
            self._run_dir,
        )


class ReplayTracker:
    """Warns when a step that was trained before comes out differently."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._num_different = 0

    def log(self, metrics: Metrics) -> None:
        if isinstance(metrics, StepMetrics) and (difference := self._replay.difference(metrics)):
            self._num_different += 1
            if self._num_different == 1:  # those behind it follow from it
                logger.warning("step %d was trained before, and %s", metrics.step, difference)

    def close(self, *, failed: bool = False) -> None:
        if self._num_different:
            logger.warning("%d steps did not come out as they did before", self._num_different)


def start_trackers(recipe: Recipe, *, console: Console, num_steps: int, done: int, replay: Replay) -> Trackers:
    """The trackers of rank 0. done: the step the run goes on after."""
    run_dir = recipe.run.path
    peak_flops = all_peak_flops(next(reversed(read_starts(run_dir)), {}))
    shown: Tracker = ConsoleTracker(console, num_steps=num_steps)
    if can_be_live(console):
        shown = LiveTracker(console, run_dir)
    trackers: list[Tracker] = [JsonlTracker(run_dir / METRICS), shown, ReplayTracker(replay)]
    if recipe.wandb is not None:
        trackers.append(WandbTracker(recipe, peak_flops=peak_flops))
    if recipe.train.tensorboard:
        trackers.append(TensorboardTracker(run_dir, done=done, peak_flops=peak_flops))
    return Trackers(trackers)
