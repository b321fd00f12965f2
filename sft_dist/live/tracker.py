"""The live view as a tracker of the run, and `sft-dist status --watch`: drawn in place, with log lines above it."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sft_dist.errors import ConfigError
from sft_dist.live.state import read_state
from sft_dist.live.view import MIN_COLUMNS, LiveView
from sft_dist.metrics import ChangeMetrics, Metrics, StepMetrics, to_line
from sft_dist.run_record import read_starts
from sft_dist.status import read_status

DRAW_EVERY_S = 0.25
MAX_SHARE = 1 / 200
"""Of the time at most goes into drawing: a slow terminal is drawn less often."""
WATCH_EVERY_S = 2.0
OVER = ("finished", "stopped", "failed", "lost")


def can_be_live(console: Console) -> bool:
    """Whether the live view has a place: a terminal that moves its cursor, of MIN_COLUMNS or more."""
    return console.is_terminal and not console.is_dumb_terminal and console.width >= MIN_COLUMNS


class LiveTracker:
    """Draws when a step is logged, never by a thread of its own: nothing runs beside the training."""

    def __init__(self, console: Console, run_dir: Path) -> None:
        """The start is in run.json by now; the curve before its first step is read from metrics.jsonl."""
        self._console = console
        self._state, _ = read_state(run_dir)
        self._live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        self._due = 0.0
        self._closing = contextlib.ExitStack()
        self._live.start()
        console.show_cursor(True)  # a process that is killed could not bring it back
        self._closing.enter_context(_logging_above())
        self._draw()

    def log(self, metrics: Metrics) -> None:
        self._state.feed(to_line(metrics), now=time.time())
        if isinstance(metrics, StepMetrics) and not metrics.applied:
            self._console.print(f"step {metrics.step}: update WITHHELD: {metrics.withheld}", highlight=False)
        if not isinstance(metrics, ChangeMetrics) and time.monotonic() >= self._due:
            self._draw()

    def close(self, *, failed: bool = False) -> None:
        """Leave the last picture on the screen."""
        ended = self._state.step == self._state.num_steps
        doing = "failed" if failed else "trained" if ended else "stopped"
        if failed:
            # Whoever fails elsewhere has written below the picture, where drawing it again would wipe that out.
            height = len(self._console.render_lines(LiveView(self._state)))
            print("\n" * height, end="", file=self._console.file, flush=True)
        self._live.update(LiveView(self._state, doing=doing))
        self._closing.close()
        self._live.stop()

    def _draw(self) -> None:
        started = time.monotonic()
        self._live.update(LiveView(self._state), refresh=True)
        now = time.monotonic()
        self._due = now + max(DRAW_EVERY_S, (now - started) / MAX_SHARE)


@contextlib.contextmanager
def _logging_above() -> Iterator[None]:
    """Lead handlers that hold the terminal's own streams to the redirected ones, which print above the picture."""
    moved = []
    streams = {sys.__stderr__: sys.stderr, sys.__stdout__: sys.stdout}
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for handler in {handler for logger in (logging.getLogger(), *loggers) for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
            moved.append((handler, handler.setStream(streams[handler.stream])))
    try:
        yield
    finally:
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)


def watch(run_dir: Path, console: Console, *, every_s: float = WATCH_EVERY_S) -> None:
    """Show a run of this or another machine from its files, until it is over. Raises ConfigError without a terminal."""
    if not can_be_live(console):
        raise ConfigError(f"--watch draws on a terminal of {MIN_COLUMNS} columns or more; leave it out to be told once")
    state, follower = read_state(run_dir)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            if read_starts(run_dir) != state.starts:  # what it went back behind is of no account any more
                state, follower = read_state(run_dir)
            for line in follower.new_lines():
                state.feed(line)
            status = read_status(run_dir)
            if status.commit_age_s is not None:
                state.commit_time = time.time() - status.commit_age_s
            live.update(LiveView(state, doing=status.state, detail=status.detail), refresh=True)
            if status.state in OVER:
                return
            time.sleep(every_s)
