"""What the live view shows, kept up to date line by line: by the run itself, or by whoever reads its files.

The lines are those of metrics.jsonl. Memory does not grow with the run.
"""

import json
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sft_dist.environment import all_peak_flops
from sft_dist.metric_names import mfu_of
from sft_dist.metrics import attempt_of, ends_of
from sft_dist.run_files import METRICS
from sft_dist.run_record import read_starts
from sft_dist.status import RATE_STEPS, Pace, pace_of

SMOOTH_STEPS = 25
"""Span of the exponential mean that the smoothed loss is: half of its weight is on the newest nine steps."""
MAX_BINS = 256


@dataclass
class Curve:
    """Means over stretches of equally many steps, from step 1 on. The stretches double when there are too many."""

    steps_each: int = 1
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        place = (step - 1) // self.steps_each
        while place >= MAX_BINS:
            self.sums = [sum(self.sums[i : i + 2]) for i in range(0, len(self.sums), 2)]
            self.counts = [sum(self.counts[i : i + 2]) for i in range(0, len(self.counts), 2)]
            self.steps_each *= 2
            place = (step - 1) // self.steps_each
        missing = place + 1 - len(self.sums)
        self.sums += [0.0] * missing
        self.counts += [0] * missing
        self.sums[place] += value
        self.counts[place] += 1

    def columns(self, width: int) -> list[float | None]:
        """The curve in `width` columns or fewer; None where there is nothing."""
        num = min(width, len(self.sums))
        edges = [round(i * len(self.sums) / num) for i in range(num + 1)] if num else [0]
        found: list[float | None] = []
        for first, last in pairwise(edges):
            count = sum(self.counts[first:last])
            found.append(sum(self.sums[first:last]) / count if count else None)
        return found


@dataclass(frozen=True)
class Best:
    """A held-out loss now, and the least so far."""

    step: int
    loss: float | None
    best_step: int
    best_loss: float


class LiveState:
    """A run as its lines tell it, without what a start went back behind. A new start is a new state."""

    def __init__(self, name: str, starts: Sequence[Mapping[str, Any]], *, attempts: Collection[int] = ()) -> None:
        """starts: of run.json, oldest first. attempts: those that wrote lines, beside the newest."""
        self.name, self.starts = name, starts
        self.curve = Curve()
        self.last: Mapping[str, Any] = {}
        """The newest line of a step."""
        self.smoothed: float | None = None
        self.held_out: dict[str, Best] = {}
        self.scores: dict[tuple[str, str], tuple[int, float]] = {}
        self.commit: Mapping[str, Any] = {}
        self.commit_time: float | None = None
        self.num_withheld = 0
        start = starts[-1] if starts else {}
        self.attempt = int(start.get("attempt", 1))
        self._ends = ends_of({*attempts, self.attempt}, starts)
        self.num_steps: int | None = start.get("num_steps")
        self.after_step = int(start.get("after_step", 0))
        environment = start.get("environment") or {}
        self.device = str(environment.get("device", ""))
        self.world_size = int(environment.get("world_size") or 1)
        self.peak_flops = all_peak_flops(start)
        self.planned_bytes = sum((start.get("planned_memory") or {}).values()) or None
        self.newest: deque[Mapping[str, Any]] = deque(maxlen=RATE_STEPS)
        self._num_steps_here, self._besides_s, self._tokens, self._seconds = 0, 0.0, 0, 0.0

    def feed(self, line: Mapping[str, Any], *, now: float | None = None) -> None:
        """Take one line. now: Unix time when it was written, if it was just now."""
        if line["step"] > self._ends.get(attempt_of(line), math.inf):
            return
        event = line["event"]
        if event == "step":
            self._feed_step(line)
        elif event == "held_out":
            self._feed_held_out(line)
        elif event == "score":
            self.scores[line["set"], line["task"]] = line["step"], line["score"]
        elif event == "commit":
            self.commit, self.commit_time = line, now
        if attempt_of(line) == self.attempt:
            self._besides_s += line.get("seconds", 0.0) * (event in ("held_out", "score")) + line.get("stall_s", 0.0)

    def _feed_step(self, line: Mapping[str, Any]) -> None:
        self.last, loss = line, line["loss"]
        if loss is not None and math.isfinite(loss):
            self.curve.add(line["step"], loss)
            self.smoothed = loss if self.smoothed is None else self.smoothed + _SHARE * (loss - self.smoothed)
        self.num_withheld += not line["applied"]
        if attempt_of(line) == self.attempt:
            self.newest.append(line)
            self._num_steps_here += 1
            self._tokens += line["tokens"]
            self._seconds += line["seconds"]

    def _feed_held_out(self, line: Mapping[str, Any]) -> None:
        name, loss = line.get("set", "held_out"), line["held_out_loss"]
        best = self.held_out.get(name)
        value = math.inf if loss is None or not math.isfinite(loss) else loss
        if best is None or value < best.best_loss:
            best = Best(line["step"], loss, line["step"], value)
        self.held_out[name] = Best(line["step"], loss, best.best_step, best.best_loss)

    @property
    def step(self) -> int:
        return int(self.last["step"]) if self.last else self.after_step

    @property
    def pace(self) -> Pace | None:
        return pace_of(self.newest, num_steps=self._num_steps_here, besides_s=self._besides_s)

    @property
    def left_s(self) -> float | None:
        pace = self.pace
        return None if pace is None or self.num_steps is None else (self.num_steps - self.step) * pace.spent_s

    @property
    def mean_tokens_per_s(self) -> float | None:
        """Over the steps of this start."""
        return self._tokens / self._seconds if self._seconds else None

    @property
    def flops_per_s(self) -> float | None:
        """Of all devices together, over the newest steps."""
        known = [line for line in self.newest if line.get("flops")]
        return sum(line["flops"] for line in known) / sum(line["seconds"] for line in known) if known else None

    @property
    def mfu(self) -> float | None:
        known = [line for line in self.newest if line.get("flops")]
        seconds = sum(line["seconds"] for line in known)
        total = {"flops": sum(line["flops"] for line in known), "seconds": seconds}
        return mfu_of(total, peak_flops=self.peak_flops)


_SHARE = 2 / (SMOOTH_STEPS + 1)


class Follower:
    """Reads what is added to a run's metrics.jsonl, whole lines only."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self._place = 0

    def new_lines(self) -> Iterator[dict[str, Any]]:
        """Lines since the last call; damaged ones are left out, as a power cut leaves zeros where lines were."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                added = file.read()
        except FileNotFoundError:
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._place += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and "event" in record and type(record.get("step")) is int:
                yield record


def read_state(run_dir: Path) -> tuple[LiveState, Follower]:
    """A run as its files tell it by now, and the reader of what is added to them."""
    follower = Follower(run_dir)
    lines = list(follower.new_lines())
    state = LiveState(run_dir.name, read_starts(run_dir), attempts={attempt_of(line) for line in lines})
    for line in lines:
        state.feed(line)
    return state, follower


def clock(seconds_from_now: float) -> str:
    """When that is, by this machine's clock: "14:05", with the day where it is not today."""
    then = time.localtime(time.time() + seconds_from_now)
    is_today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if is_today else "%a %d %b %H:%M", then)
