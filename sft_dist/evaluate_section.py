"""The recipe's `evaluate` section: which answers are generated, and how each task's are scored."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from sft_dist.section import Section

MetricName = Literal["exact", "numeric", "choice", "json", "summary", "date"]
METRICS: tuple[str, ...] = get_args(MetricName)
KEYS_OF = {
    "exact": {"ignore_case"},
    "numeric": {"absolute", "relative", "unit", "take", "decimal", "marker"},
    "choice": {"marker"},
    "json": {"ignore_case"},
    "summary": set[str](),
    "date": {"day_first", "marker"},
}
"""Which settings each metric has."""
RIGHT_OR_WRONG = {"exact", "numeric", "choice", "date"}
"""Metrics whose scores are 0 or 1; the others are shares in between."""


class TaskSection(Section):
    """How the answers of one task are scored. `calculator: numeric` stands for `calculator: {metric: numeric}`."""

    metric: MetricName = Field(
        "exact",
        description="exact: the same text. numeric: number and unit within a tolerance. choice: the option's letter. "
        "json: F1 of fields. summary: ROUGE-L F1. date: the same day",
    )
    absolute: float | None = Field(None, ge=0, description="numeric: right within this much, in the truth's unit")
    relative: float | None = Field(
        None, ge=0, le=1, description="numeric: right within this share of the truth, 0.05 for clinical calculators"
    )
    unit: Literal["optional", "required"] = Field(
        "optional", description="numeric: whether a number without its unit is right; a unit that contradicts never is"
    )
    take: Literal["first", "last"] = Field("last", description="numeric: which number, where no marker says it")
    decimal: Literal["point", "comma"] = Field("point", description="numeric: 1,234.5 or 1.234,5")
    day_first: bool = Field(False, description="date: 12/03/2024 is 12 March, not December 3")
    ignore_case: bool | None = Field(None, description="exact: default false. json: default true")
    marker: str = Field(
        "Answer:",
        description="numeric, choice, date: the answer is what stands behind the last of these, if there is one",
    )

    @model_validator(mode="after")
    def _keys_of_the_metric(self) -> "TaskSection":
        for key in sorted(self.model_fields_set - KEYS_OF[self.metric] - {"metric"}):
            owners = [name for name, keys in KEYS_OF.items() if key in keys]
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} belongs to {' and '.join(owners)}, and the metric is {self.metric}")
        return self

    @property
    def is_right_or_wrong(self) -> bool:
        return self.metric in RIGHT_OR_WRONG


@dataclass(frozen=True)
class Best:
    """What the best checkpoint is best in: of the first set unless one is named, "loss", "score" or a task's name."""

    set_name: str | None
    measure: str

    @property
    def is_loss(self) -> bool:
        """Less is better; more of anything else is."""
        return self.measure == "loss"

    def __str__(self) -> str:
        return self.measure if self.set_name is None else f"{self.set_name}/{self.measure}"

    @classmethod
    def parse(cls, text: str) -> "Best":
        """`loss`, `score`, `SET/loss`, `SET/score` or `SET/TASK`. Raises ValueError for anything else."""
        set_name, slash, measure = text.partition("/")
        if not slash and text in ("loss", "score"):
            return cls(None, text)
        if not (set_name and measure):
            raise ValueError("expected loss, score, SET/loss, SET/score or SET/TASK")
        return cls(set_name, measure)


class EvaluateSection(Section):
    task_field: str = Field("task", min_length=1, description="the field of a row that names its task")
    tasks: dict[str, TaskSection] = Field(
        default_factory=dict, description="the metric of each task, such as {calculator: {metric: numeric}}"
    )
    default: TaskSection = Field(
        default_factory=TaskSection, description="the metric of tasks that are not listed, and of rows without a task"
    )
    max_new_tokens: int = Field(256, ge=1, le=2**20, description="the longest answer; a longer one is cut there")
    batch_size: int = Field(32, ge=1, description="prompts that are answered together: memory, and speed")
    max_examples: int | None = Field(
        None, ge=1, description="answer a seeded subset of so many prompts of each set; the loss is of all of them"
    )
    generate_every: int | None = Field(
        None, ge=1, description="steps between answers during the run; also after the last step"
    )
    generate_examples: int | None = Field(
        None, ge=1, description="prompts of each set that are answered during the run; default: max_examples"
    )
    keep_best_by: str = Field(
        "loss",
        description="what train.keep_best keeps the best in: loss, score (the mean over tasks), SET/loss, SET/score or "
        "SET/TASK; of the first held-out set unless one is named",
    )
    worst: int = Field(5, ge=0, description="the worst answers of each set that are shown")
    seed: int = Field(0, ge=0, lt=2**31, description="of the subset, and of the resampling for intervals and p-values")

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_are_metrics(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"metric": task} if isinstance(task, str) else task for name, task in value.items()}

    @field_validator("default", mode="before")
    @classmethod
    def _name_is_metric(cls, value: Any) -> Any:
        return {"metric": value} if isinstance(value, str) else value

    @field_validator("keep_best_by")
    @classmethod
    def _best_can_be_read(cls, value: str) -> str:
        Best.parse(value)
        return value

    @property
    def best(self) -> Best:
        return Best.parse(self.keep_best_by)

    @property
    def best_by(self) -> str | None:
        """How a checkpoint notes what it is compared by; None: by the loss of the first set."""
        return None if self.best == Best(None, "loss") else self.keep_best_by

    def task(self, name: str) -> TaskSection:
        """How answers of the task of this name are scored."""
        return self.tasks.get(name, self.default)
