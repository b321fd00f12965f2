"""What is written of each step, and how it is read back.

`metrics.jsonl` is the truth about a run: one JSON object a line, written by rank 0. A resumed run appends with
the next `attempt`; readers take the last attempt of a step and ignore a torn last line.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step over all ranks."""

    step: int
    epoch: int
    loss: float
    """Nats; the global loss, already weighted."""
    lr: float
    grad_norm: float
    """Global L2 norm before clipping."""
    applied: bool
    withheld: str | None
    """Why the update was withheld on all ranks, if it was."""
    examples: int
    batch: str
    """16 hex digits over the ids of the examples, in order: equal ones trained the same."""
    tokens: int
    response_tokens: int
    tokens_per_s: float
    seconds: float
    pack_fill: float
    """Tokens over capacity of all packs; there is no padding, so a low fill wastes nothing."""
    imbalance: float
    """Slowest rank's cost summed over micro-steps, over the ideal; 1.0 is perfect."""
    peak_memory_bytes: int
    """Of rank 0: device memory on GPU, resident set on CPU; since the run began."""
    attempt: int
    flops: float | None = None
    """Model FLOPs of forward and backward over all ranks, by `ModelShape.step_flops`; None for an unknown shape."""
    memory_bytes: int | None = None
    """The same memory at the end of the step."""


@dataclass(frozen=True)
class HeldOutMetrics:
    """The held-out loss after `step` updates, in nats, under the run's own `loss`."""

    step: int
    held_out_loss: float
    examples: int
    response_tokens: int
    seconds: float
    attempt: int
    set: str = "held_out"


@dataclass(frozen=True)
class ScoreMetrics:
    """The mean score, 0 to 1, of the answers to one task of a held-out set after `step` updates.

    seconds: what the answers of all tasks took, an equal part for each.
    """

    step: int
    set: str
    task: str
    metric: str
    score: float
    n: int
    seconds: float
    attempt: int


@dataclass(frozen=True)
class CommitMetrics:
    """A checkpoint that was committed. stall_s: seconds that training stood still for it, of `seconds` in all."""

    step: int
    size_bytes: int
    stall_s: float
    seconds: float
    attempt: int


@dataclass(frozen=True)
class ChangeMetrics:
    """The run went on after `step` under other settings, as --allow-change lets it: from here the curve is another."""

    step: int
    changed: tuple[str, ...]
    attempt: int


Metrics = StepMetrics | HeldOutMetrics | ScoreMetrics | CommitMetrics | ChangeMetrics
EVENTS = {
    StepMetrics: "step",
    HeldOutMetrics: "held_out",
    ScoreMetrics: "score",
    CommitMetrics: "commit",
    ChangeMetrics: "change",
}


def to_line(metrics: Metrics) -> dict[str, Any]:
    """The JSON object of a line; `event` tells the kinds apart."""
    # Fields are plain values: asdict, which copies them one by one, would take as long as all trackers together.
    return {"event": EVENTS[type(metrics)]} | vars(metrics)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Lines as they were written; a torn last line is ignored, and others that are no record are told and left out."""
    if not path.exists():
        return
    damaged = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:  # a power cut leaves zeros where lines were
                record = None
            if isinstance(record, dict) and "event" in record and type(record.get("step")) is int:
                yield record
            else:
                damaged.append(number)
    if damaged:
        logger.warning("%s: %d lines cannot be read, the first is line %d", path, len(damaged), damaged[0])


def ends_of(attempts: Iterable[int], starts: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """By attempt, the last step whose lines count: what a later one of `attempts` went back behind is gone.

    attempts: those that wrote lines; one that ended before it did takes nothing back. starts: of run.json.
    """
    went_on = {start["attempt"]: start["after_step"] for start in starts}
    ends, end = {}, math.inf
    for attempt in sorted(set(attempts), reverse=True):
        ends[attempt] = end
        end = min(end, went_on.get(attempt, math.inf))
    return ends


def attempt_of(line: Mapping[str, Any]) -> int:
    return int(line.get("attempt", 1))


def read_counted(path: Path, starts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines that count, in the order of steps: the last attempt of each, without what a later start undid."""
    lines = list(read_lines(path))
    ends = ends_of(map(attempt_of, lines), starts)
    counted = [line for line in lines if line["step"] <= ends[attempt_of(line)]]
    last = {(line["step"], *(line.get(key) for key in ("event", "set", "task"))): line for line in counted}
    return sorted(last.values(), key=lambda line: int(line["step"]))


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """The last attempt of each step, by step; also steps that a later start went back behind."""
    return {line["step"]: line for line in read_lines(path) if line["event"] == "step"}


def read_held_out(path: Path, set_name: str | None = None) -> dict[int, dict[str, Any]]:
    """The last attempt of each held-out loss of a set, by step; of the first set that was measured unless one is named.

    Lines from before sets had names are of `held_out`.
    """
    lines = [line for line in read_lines(path) if line["event"] == "held_out"]
    if set_name is None and lines:
        set_name = lines[0].get("set", "held_out")
    return {line["step"]: line for line in lines if line.get("set", "held_out") == set_name}


def last_commit(path: Path) -> int | None:
    """The step of the last checkpoint that was ever committed; None if none was."""
    return max((line["step"] for line in read_lines(path) if line["event"] == "commit"), default=None)


class Replay:
    """What earlier attempts wrote of the steps that are trained again: the same must come out.

    tolerance: relative and absolute difference of losses that rounding may make; the batch and the rate must be equal.
    """

    def __init__(self, path: Path, *, after_step: int, tolerance: float) -> None:
        self._tolerance = tolerance
        self._earlier: dict[int, dict[str, Any]] = {}
        for line in read_lines(path):
            if line["event"] == "change":  # what came before it is another curve
                self._earlier = {step: old for step, old in self._earlier.items() if step <= line["step"]}
            elif line["event"] == "step" and line["step"] > after_step:
                self._earlier[line["step"]] = line

    def difference(self, metrics: StepMetrics) -> str | None:
        """What is not as it was when this step was trained before, in words; None when all is, or it never was."""
        then = self._earlier.pop(metrics.step, None)
        if then is None:
            return None
        for key in ("batch", "lr", "examples", "response_tokens"):
            if then[key] != getattr(metrics, key):
                return f"{key} was {then[key]}, is {getattr(metrics, key)}"
        was, now = then["loss"], metrics.loss
        if was is None or not math.isfinite(now):
            return None if (was is None) != math.isfinite(now) else f"loss was {was}, is {now}"
        if abs(now - was) > self._tolerance * (1 + abs(was)):
            return f"loss was {was:.9g}, is {now:.9g}"
        return None
