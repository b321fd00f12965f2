"""What a report tells, read from a run's files alone. What is not there is left out, never made up.

metrics.jsonl run.json config.yaml evaluation.json answers/step-*.jsonl INTERRUPTED, and the token store where it is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sft_dist.data.store import TokenStore
from sft_dist.errors import ConfigError, DataError
from sft_dist.metrics import read_counted
from sft_dist.redact import redacted_tree
from sft_dist.run_files import ANSWERS, CONFIG, EVALUATION, METRICS
from sft_dist.run_record import read_interrupted, read_starts

Series = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Steps and values, both `[n]`; NaN where a value was not finite."""


@dataclass(frozen=True)
class Answer:
    """What the model answered after a step. score: None where it was not scored."""

    step: int
    text: str
    score: float | None


@dataclass(frozen=True)
class Question:
    """A held-out prompt, and its answers by step."""

    task: str
    prompt: tuple[tuple[str, str], ...]
    """(role, text) of each message."""
    truth: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class RunData:
    """A run as its files tell it. `lines`, by event: the attempt that counts, in the order of steps."""

    run_dir: Path
    name: str
    starts: Sequence[Mapping[str, Any]]
    lines: Mapping[str, Sequence[Mapping[str, Any]]]
    recipe: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    questions: tuple[Question, ...]
    store: TokenStore | None
    interrupted: Mapping[str, Any] | None

    @property
    def last_start(self) -> Mapping[str, Any]:
        return self.starts[-1] if self.starts else {}

    @property
    def environment(self) -> Mapping[str, Any]:
        return self.last_start.get("environment") or {}

    @property
    def data(self) -> Mapping[str, Any]:
        """What run.json notes of the training data; empty for a run of before it did."""
        return self.last_start.get("data") or {}

    @property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        return self.lines.get("step", ())

    @property
    def num_steps(self) -> int | None:
        return self.last_start.get("num_steps")

    @property
    def newest_steps(self) -> Sequence[Mapping[str, Any]]:
        """Those of the newest start that has done some."""
        attempt = self.steps[-1].get("attempt") if self.steps else None
        return [line for line in self.steps if line.get("attempt") == attempt]

    @property
    def steps_start(self) -> Mapping[str, Any]:
        """The start that did them."""
        attempt = self.steps[-1].get("attempt") if self.steps else None
        return next((start for start in self.starts if start["attempt"] == attempt), {})

    @property
    def planned_memory(self) -> Mapping[str, float]:
        return self.last_start.get("planned_memory") or {}

    def series(self, key: str) -> Series:
        """A number of each step's line that has it; null, as a loss that was not finite, is NaN."""
        lines = [line for line in self.steps if key in line]
        return _series((line["step"], line[key]) for line in lines)

    def held_out(self) -> dict[str, Series]:
        """Held-out losses by set."""
        lines = self.lines.get("held_out", ())
        names = dict.fromkeys(line.get("set", "held_out") for line in lines)
        return {
            name: _series((x["step"], x["held_out_loss"]) for x in lines if x.get("set", "held_out") == name)
            for name in names
        }

    def scores(self) -> dict[tuple[str, str], Series]:
        """Scores by set and task."""
        lines = self.lines.get("score", ())
        keys = dict.fromkeys((line["set"], line["task"]) for line in lines)
        return {key: _series((x["step"], x["score"]) for x in lines if (x["set"], x["task"]) == key) for key in keys}

    def restarts(self) -> list[int]:
        """The steps after which the run went on again."""
        return [int(start["after_step"]) for start in self.starts[1:]]

    def changes(self) -> list[int]:
        """The steps after which another curve begins."""
        return [int(line["step"]) for line in self.lines.get("change", ())]

    def withheld(self) -> list[int]:
        return [int(line["step"]) for line in self.steps if not line["applied"]]

    def warnings(self) -> list[str]:
        """What the banner of the newest start warned of."""
        rows = [(str(name), str(text)) for name, text in self.last_start.get("banner", ())]
        kept = ("warning", "changed", "restart")
        return [
            f"{name}: {text.removeprefix('warning: ')}" if name not in kept else text
            for name, text in rows
            if name in kept or text.startswith("warning: ") or name == "dropout"
        ]

    def state(self) -> str:
        """How far it came, in words."""
        done, all_steps = (self.steps[-1]["step"] if self.steps else 0), self.num_steps
        if all_steps is not None and done >= all_steps:
            return f"finished, {done:,} steps"
        of_all = "" if all_steps is None else f" of {all_steps:,}"
        if self.interrupted is not None:
            return f"stopped on request after step {done:,}{of_all} ({self.interrupted['reason']})"
        return f"step {done:,}{of_all}"


def read_run(run_dir: Path) -> RunData:
    """Raises ConfigError where there is no run, CheckpointError for a damaged run.json."""
    if not (run_dir / METRICS).is_file():
        raise ConfigError(f"{run_dir}: no {METRICS} is here; name the directory of a run that has trained a step")
    starts = read_starts(run_dir)
    return RunData(
        run_dir=run_dir,
        name=run_dir.resolve().name,
        starts=starts,
        lines=_lines(run_dir / METRICS, starts),
        recipe=redacted_tree(_read_yaml(run_dir / CONFIG)),
        evaluation=_read_json(run_dir / EVALUATION),
        questions=_questions(run_dir / ANSWERS),
        store=_store(starts),
        interrupted=read_interrupted(run_dir),
    )


def _lines(path: Path, starts: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Those that count, by event."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in read_counted(path, starts):
        found.setdefault(line["event"], []).append(line)
    return found


def _series(pairs: Any) -> Series:
    found = [(step, math.nan if value is None else float(value)) for step, value in pairs]
    return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _store(starts: Sequence[Mapping[str, Any]]) -> TokenStore | None:
    """The training data's store, if it is still where it was."""
    noted = (starts[-1].get("data") or {}) if starts else {}
    if not noted.get("store"):
        return None
    try:
        return TokenStore.open(Path(noted["store"]))
    except (DataError, OSError, ValueError, KeyError):
        return None


def _questions(directory: Path) -> tuple[Question, ...]:
    """Prompts in the order of the first file, with the answers of all files."""
    found: dict[tuple[str, str], tuple[dict[str, Any], list[Answer]]] = {}
    for path in sorted(directory.glob("step-*.jsonl")):
        digits = path.stem.removeprefix("step-")
        if not digits.isdecimal():
            continue
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
                key = str(row["set"]), str(row["id"])
                answer = Answer(int(digits), str(row["answer"]), row.get("score"))
            except (ValueError, TypeError, KeyError):  # cut off by a crash
                continue
            found.setdefault(key, (row, []))[1].append(answer)
    return tuple(
        Question(
            task=str(row.get("task", "")),
            prompt=tuple((str(turn.get("role", "")), str(turn.get("content", ""))) for turn in row.get("prompt", ())),
            truth=str(row.get("truth", "")),
            answers=tuple(answers),
        )
        for row, answers in found.values()
    )
