"""An answer's score by the metric of its task."""

from sft_dist.errors import DataError
from sft_dist.evaluate_section import TaskSection
from sft_dist.scoring.choice import score_choice
from sft_dist.scoring.dates import score_date
from sft_dist.scoring.json_fields import score_json
from sft_dist.scoring.numeric import score_numeric
from sft_dist.scoring.result import Score, TruthError
from sft_dist.scoring.texts import score_exact, score_summary


def score_answer(answer: str, truth: str, task: TaskSection, *, prompt: str, name: str, where: str) -> Score:
    """Score one answer.

    prompt: the last turn of the prompt, which lists the options of a choice. name, where: of the task and of the row.
    Raises DataError, naming the row, for a truth that the metric cannot compare.
    """
    try:
        return _score(answer, truth, task, prompt)
    except TruthError as error:
        raise DataError(
            f"{where}: the ground truth {truth[:80]!r} {error}, and the task {name!r} is scored as {task.metric}; "
            "mend the row, or give the task another metric"
        ) from None


def _score(answer: str, truth: str, task: TaskSection, prompt: str) -> Score:
    match task.metric:
        case "exact":
            return score_exact(answer, truth, ignore_case=bool(task.ignore_case))
        case "numeric":
            return score_numeric(
                answer,
                truth,
                absolute=task.absolute,
                relative=task.relative,
                unit_required=task.unit == "required",
                marker=task.marker,
                take=task.take,
                decimal=task.decimal,
            )
        case "choice":
            return score_choice(answer, truth, prompt=prompt, marker=task.marker)
        case "json":
            return score_json(answer, truth, ignore_case=task.ignore_case is not False)
        case "summary":
            return score_summary(answer, truth)
        case "date":
            return score_date(answer, truth, day_first=task.day_first, marker=task.marker)
