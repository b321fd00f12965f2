"""Where metrics go: the JSONL file, the console, wandb. Rank 0 only; other ranks get a tracker that does nothing."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sft_dist.config import Recipe
from sft_dist.metrics import HeldOutMetrics, StepMetrics, to_line

logger = logging.getLogger(__name__)

Metrics = StepMetrics | HeldOutMetrics


class Tracker(Protocol):
    def log(self, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


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
        for tracker in self._trackers:
            tracker.close()


class JsonlTracker:
    """Appends one line per record, and repairs a torn last line first: a crash may have cut it."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        # NaN and infinity are not JSON; a withheld step says null.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in to_line(metrics).items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ConsoleTracker:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, *, num_steps: int, done: int) -> None:
        self._console, self._num_steps = console, num_steps
        self._progress: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=console)
            self._task = self._progress.add_task("", total=num_steps, completed=done)
            self._progress.start()

    def log(self, metrics: Metrics) -> None:
        if isinstance(metrics, HeldOutMetrics):
            self._console.print(
                f"held-out loss {metrics.held_out_loss:.4f} after step {metrics.step} ({metrics.examples} examples)",
                highlight=False,
            )
            return
        skipped = "" if metrics.applied else "  SKIPPED: gradient not finite"
        numbers = (
            f"loss {metrics.loss:.4f}  lr {metrics.lr:.2e}  |g| {metrics.grad_norm:.3f}  "
            f"{metrics.tokens_per_s:,.0f} tok/s{skipped}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=metrics.step, description=numbers)
        elif (
            metrics.step == self._num_steps or metrics.step % max(1, self._num_steps // 100) == 0 or not metrics.applied
        ):
            self._console.print(f"step {metrics.step}/{self._num_steps}  {numbers}", highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class WandbTracker:
    """Best effort: the first failure is said once, and the run goes on; metrics.jsonl has everything."""

    def __init__(self, recipe: Recipe) -> None:
        assert recipe.wandb is not None
        self._run: Any = None
        settings = recipe.wandb

        def start() -> None:
            import wandb

            run = recipe.run
            self._run = wandb.init(
                project=settings.project,
                name=run.name,
                dir=str(run.path),
                mode=settings.mode,
                config=recipe.model_dump(mode="json"),
            )

        self._try(start)

    def log(self, metrics: Metrics) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log(to_line(metrics), step=metrics.step))

    def close(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker does, it never stops a run
            logger.warning("wandb is off for this run: %s: %s", type(error).__name__, error)
            self._run = None


def start_trackers(recipe: Recipe, *, console: Console, num_steps: int, done: int) -> Trackers:
    """The trackers of rank 0."""
    trackers: list[Tracker] = [
        JsonlTracker(recipe.run.path / "metrics.jsonl"),
        ConsoleTracker(console, num_steps=num_steps, done=done),
    ]
    if recipe.wandb is not None:
        trackers.append(WandbTracker(recipe))
    return Trackers(trackers)
