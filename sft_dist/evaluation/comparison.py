"""`sft-dist evaluate --compare A B`: two models on the prompts that both were asked, from their answers on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from sft_dist.data.shown import safe
from sft_dist.errors import ConfigError, DataError
from sft_dist.evaluation.answers import ANSWERS, Scored, read_scored
from sft_dist.evaluation.report import print_tasks, print_worst
from sft_dist.evaluation.task_scores import TaskScore, task_scores

NUM_WORSE = 5


@dataclass(frozen=True)
class Comparison:
    """tasks: by set, of the second model, each with the first one's scores. num_unpaired: answers without a partner.

    worse: answers that were better before, the largest falls first.
    """

    tasks: dict[str, dict[str, TaskScore]]
    num_unpaired: int
    worse: Sequence[Scored]


def compare(first: Path, second: Path) -> Comparison:
    """Compare the answers of two runs, or two files of scored answers, as before and after.

    Raises ConfigError where there are no answers or none in common; DataError for a prompt that was not scored by one
    metric against one truth.
    """
    before, after = (read_scored(_answers_of(path)) for path in (first, second))
    was = {(answer.set, answer.id, answer.task): answer for answer in before}
    pairs = [(was[key], new) for new in after if (key := (new.set, new.id, new.task)) in was]
    if not pairs:
        raise ConfigError(
            f"{first} and {second} answer no prompt in common: sets, rows and tasks must have the same names"
        )
    for old, new in pairs:
        if (old.metric, old.truth) != (new.metric, new.truth):
            raise DataError(
                f"{safe(new.id)}: was scored as {old.metric} against {old.truth!r}, "
                f"and as {new.metric} against {new.truth!r}; evaluate both again under one recipe"
            )
    old_ones, new_ones = [old for old, _ in pairs], [new for _, new in pairs]
    fallen = sorted((new.score - old.score, index) for index, (old, new) in enumerate(pairs) if new.score < old.score)
    return Comparison(
        tasks=task_scores(new_ones, seed=0, before=old_ones),
        num_unpaired=len(before) + len(after) - 2 * len(pairs),
        worse=[pairs[index][1] for _, index in fallen[:NUM_WORSE]],
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """A table a set, and answers that became worse."""
    for name, tasks in comparison.tasks.items():
        console.rule(Text(safe(name)))
        print_tasks(tasks, console)
    if comparison.num_unpaired:
        console.print(
            f"{comparison.num_unpaired:,} answers of one to prompts that the other was not asked", highlight=False
        )
    if comparison.worse:
        console.rule("answers that became worse")
        print_worst(comparison.worse, console)


def _answers_of(path: Path) -> Path:
    file = path / ANSWERS / "model.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file}: no scored answers; `sft-dist evaluate` writes them where the recipe has `evaluate`")
    return file
