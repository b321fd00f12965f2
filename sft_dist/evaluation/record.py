"""What `sft-dist evaluate` finds, as it is written to <run>/evaluation.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sft_dist.evaluation.answers import Scored
from sft_dist.evaluation.task_scores import TaskScore


@dataclass(frozen=True)
class Losses:
    """What a model makes of a held-out set. In nats: example_mean and token_mean, the two training losses over it."""

    examples: int
    response_tokens: int
    example_mean: float
    token_mean: float

    @property
    def perplexity(self) -> float:
        """exp(token_mean); NaN of NaN."""
        return math.inf if self.token_mean >= 700 else math.exp(self.token_mean)


@dataclass(frozen=True)
class SetResult:
    """One held-out set. before: the losses of model.path. left_out: rows that were not asked, by cause."""

    losses: Losses
    before: Losses | None
    left_out: Mapping[str, int]
    tasks: Mapping[str, TaskScore]
    worst: Sequence[Scored]


@dataclass(frozen=True)
class Evaluation:
    """A model on all held-out sets. base: what it is compared with; None without --before."""

    model: str
    base: str | None
    dtype: str
    processes: int
    seconds: float
    sets: Mapping[str, SetResult]

    def to_json(self) -> str:
        """The losses of the first set stand at the top as well; one that is not finite is null."""
        first = next(iter(self.sets.values()))
        found = {
            "model": self.model,
            **_losses(first.losses),
            "dtype": self.dtype,
            "seconds": self.seconds,
            "processes": self.processes,
            "base": self.base,
            "sets": {name: _set(result) for name, result in self.sets.items()},
        }
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _losses(losses: Losses) -> dict[str, Any]:
    found = {**asdict(losses), "perplexity": losses.perplexity}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _set(result: SetResult) -> dict[str, Any]:
    return {
        **_losses(result.losses),
        "before": _losses(result.before) if result.before else None,
        "left_out": dict(result.left_out),
        "tasks": {name: _task(score) for name, score in result.tasks.items()},
        "worst": [_worst(answer) for answer in result.worst],
    }


def _task(score: TaskScore) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metric": score.metric,
        "n": score.n,
        "score": score.score,
        "ci": list(score.ci),
        "invalid": score.num_invalid,
        "constant": {"answer": score.constant[0], "score": score.constant[1]} if score.constant else None,
        "before": None,
        "p_value": None,
    }
    if score.fields is not None:
        found["fields"] = asdict(score.fields)
    if (before := score.before) is not None:
        found["before"] = {"score": before.score, "ci": list(before.ci)}
        found |= {"p_value": before.p_value, "test": before.test, "better": before.wins, "worse": before.losses}
    return found


def _worst(answer: Scored) -> dict[str, Any]:
    kept = ("id", "task", "prompt", "truth", "answer", "score", "why")
    return {name: getattr(answer, name) for name in kept}
