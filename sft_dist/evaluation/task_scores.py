"""The scores of a model task by task: with intervals, before and after, and the worst answers."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sft_dist.evaluate_section import RIGHT_OR_WRONG, EvaluateSection
from sft_dist.evaluation.answers import Scored
from sft_dist.scoring.json_fields import f1
from sft_dist.scoring.metrics import score_answer
from sft_dist.scoring.result import FieldCounts
from sft_dist.significance import TestName, interval, paired_test

NUM_CONSTANTS = 10
"""The most frequent truths that are tried as an answer to every question."""


@dataclass(frozen=True)
class FieldScore:
    """Of JSON answers: shares over the fields of all answers together; the task's score is the mean F1 of answers."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Earlier:
    """The scores of another model on the same questions. wins, losses: answers that became better, and worse."""

    score: float
    ci: tuple[float, float]
    p_value: float
    test: TestName
    wins: int
    losses: int


@dataclass(frozen=True)
class TaskScore:
    """score: the mean over n answers, ci its 95% interval. num_invalid: answers that are not of the kind asked for.

    constant: what one and the same answer to every question would reach, and that answer; None where it was not tried.
    """

    metric: str
    n: int
    score: float
    ci: tuple[float, float]
    num_invalid: int
    fields: FieldScore | None = None
    constant: tuple[str, float] | None = None
    before: Earlier | None = None


def task_scores(
    answers: Sequence[Scored],
    *,
    seed: int,
    before: Sequence[Scored] | None = None,
    section: EvaluateSection | None = None,
) -> dict[str, dict[str, TaskScore]]:
    """Scores by set and task, in the order of first appearance.

    before: another model's answers to the same questions, paired by set and row; those without a partner do not count.
    section: with it, the best constant answer is looked for.
    """
    groups: dict[str, dict[str, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        groups[answer.set][answer.task].append(answer)
    earlier = {(answer.set, answer.id): answer for answer in before or ()}
    return {
        set_name: {
            task: _task_score(some, [earlier.get((a.set, a.id)) for a in some], seed=seed, section=section)
            for task, some in tasks.items()
        }
        for set_name, tasks in groups.items()
    }


def mean_score(tasks: Iterable[TaskScore | Earlier]) -> float:
    """The mean over tasks, each counting the same; NaN for none."""
    scores = [task.score for task in tasks]
    return math.fsum(scores) / len(scores) if scores else math.nan


def worst_answers(answers: Sequence[Scored], *, count: int) -> list[Scored]:
    """The lowest scores that are below 1, one task after the other in turn: none hides the others."""
    by_task: dict[str, list[Scored]] = defaultdict(list)
    for answer in answers:
        if answer.score < 1:
            by_task[answer.task].append(answer)
    columns = [sorted(some, key=lambda answer: answer.score) for some in by_task.values()]
    rows = itertools.zip_longest(*columns)
    return [answer for row in rows for answer in row if answer is not None][:count]


def _task_score(
    answers: Sequence[Scored], before: Sequence[Scored | None], *, seed: int, section: EvaluateSection | None
) -> TaskScore:
    metric, scores = answers[0].metric, [answer.score for answer in answers]
    fields = [answer.fields for answer in answers if answer.fields is not None]
    return TaskScore(
        metric=metric,
        n=len(answers),
        score=math.fsum(scores) / len(scores),
        ci=interval(scores, is_right_or_wrong=metric in RIGHT_OR_WRONG, seed=seed),
        num_invalid=sum(not answer.is_valid for answer in answers),
        fields=_field_score(fields) if fields else None,
        constant=_best_constant(answers, section) if section is not None else None,
        before=_compare(answers, before, seed=seed),
    )


def _field_score(fields: Sequence[FieldCounts]) -> FieldScore:
    total = FieldCounts(*(sum(getattr(each, name) for each in fields) for name in ("right", "given", "expected")))
    precision = total.right / total.given if total.given else float(not total.expected)
    recall = total.right / total.expected if total.expected else 1.0
    return FieldScore(precision, recall, f1(total))


def _compare(answers: Sequence[Scored], before: Sequence[Scored | None], *, seed: int) -> Earlier | None:
    pairs = [(old.score, new.score) for old, new in zip(before, answers, strict=True) if old is not None]
    if not pairs:
        return None
    was, now = zip(*pairs, strict=True)
    is_right_or_wrong = answers[0].metric in RIGHT_OR_WRONG
    p_value, test = paired_test(was, now, is_right_or_wrong=is_right_or_wrong, seed=seed)
    return Earlier(
        score=math.fsum(was) / len(was),
        ci=interval(was, is_right_or_wrong=is_right_or_wrong, seed=seed),
        p_value=p_value,
        test=test,
        wins=sum(new > old for old, new in pairs),
        losses=sum(new < old for old, new in pairs),
    )


def _best_constant(answers: Sequence[Scored], section: EvaluateSection) -> tuple[str, float] | None:
    """The best of the most frequent truths as an answer to every question: what needs no prompt. Not for summaries."""
    if answers[0].metric == "summary":
        return None
    truths = Counter(" ".join(answer.truth.split()) for answer in answers)
    found = []
    for truth, _ in truths.most_common(NUM_CONSTANTS):
        scores = [
            score_answer(
                truth,
                answer.truth,
                section.task(answer.task),
                prompt=answer.prompt[-1]["content"] if answer.prompt else "",
                name=answer.task,
                where=answer.id,
            ).value
            for answer in answers
        ]
        found.append((truth, math.fsum(scores) / len(scores)))
    return max(found, key=lambda each: each[1])
