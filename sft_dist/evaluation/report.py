"""An evaluation on the terminal: losses, a table of tasks, the worst answers."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sft_dist.data.shown import escape, safe
from sft_dist.evaluation.answers import Scored
from sft_dist.evaluation.record import Evaluation, Losses
from sft_dist.evaluation.task_scores import TaskScore, mean_score
from sft_dist.significance import p_text

NUM_PROMPT_LINES = 6
TESTS = {"mcnemar": "exact McNemar", "permutation": "paired permutation"}


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print all sets."""
    console.print(Text(safe(f"{evaluation.model} ({evaluation.dtype}, {evaluation.seconds:.0f} s)"), style="bold"))
    if evaluation.base is not None:
        console.print(Text(safe(f"before: {evaluation.base}")))
    for name, result in evaluation.sets.items():
        console.rule(Text(safe(name)))
        print_losses(result.losses, result.before, console)
        for cause, count in result.left_out.items():
            console.print(f"{count:,} rows are not asked: {cause.replace('_', ' ')}", highlight=False)
        if result.tasks:
            print_tasks(result.tasks, console)
        print_worst(result.worst, console)


def print_losses(losses: Losses, before: Losses | None, console: Console) -> None:
    """One line a model."""
    console.print(f"{losses.examples:,} held-out examples, {losses.response_tokens:,} response tokens", highlight=False)
    for name, each in (("before: ", before), ("after:  " if before else "", losses)):
        if each is not None:
            console.print(
                f"{name}loss per example {each.example_mean:.4f}, per token {each.token_mean:.4f}, "
                f"perplexity {each.perplexity:,.2f}",
                highlight=False,
            )


def print_tasks(tasks: Mapping[str, TaskScore], console: Console) -> None:
    """The table of tasks, and what it does not say."""
    has_before = any(task.before is not None for task in tasks.values())
    has_constant = any(task.constant is not None for task in tasks.values())
    columns = ["task", "metric", "n"]
    columns += ["constant"] * has_constant + ["before"] * has_before + ["score", "95%"] + ["p"] * has_before
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns:
        is_text = heading in ("task", "metric")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for name, task in tasks.items():
        cells = [name, task.metric, f"{task.n:,}"]
        cells += [f"{task.constant[1]:.1%}" if task.constant else ""] * has_constant
        cells += [f"{task.before.score:.1%}" if task.before else ""] * has_before
        cells += [f"{task.score:.1%}", f"{100 * task.ci[0]:.1f} to {100 * task.ci[1]:.1f}"]
        cells += [p_text(task.before.p_value) if task.before else ""] * has_before
        table.add_row(*(Text(safe(cell)) for cell in cells))
    if len(tasks) > 1:
        before = mean_score(task.before for task in tasks.values() if task.before is not None)
        cells = ["mean of tasks", "", f"{sum(task.n for task in tasks.values()):,}"] + [""] * has_constant
        cells += [f"{before:.1%}"] * has_before + [f"{mean_score(tasks.values()):.1%}", ""]
        table.add_row(*map(Text, cells + [""] * has_before), style="bold")
    console.print(table)
    for line in _remarks(tasks):
        console.print(Text(safe(line), style="dim"))


def print_worst(worst: Sequence[Scored], console: Console) -> None:
    """Prompt, truth and answer of the worst answers, cut where they are long."""
    for answer in worst:
        heading = safe(f"{answer.score:.0%}  {answer.task}  {answer.id}  ({answer.why})")
        console.print(Text(f"\n{heading}", style="bold"))
        lines = answer.prompt[-1]["content"].splitlines() if answer.prompt else []
        cut = [*lines[:2], "...", *lines[-NUM_PROMPT_LINES + 3 :]] if len(lines) > NUM_PROMPT_LINES else lines
        for label, text in (("prompt", "\n".join(cut)), ("truth", answer.truth), ("answer", answer.answer)):
            grid = Table.grid(padding=(0, 1))
            grid.add_column(width=7, style="dim")
            grid.add_column(overflow="fold")
            grid.add_row(label, Text(escape(text[:1200])))
            console.print(grid)


def _remarks(tasks: Mapping[str, TaskScore]) -> list[str]:
    lines = [
        f"{name}: all fields together, precision {task.fields.precision:.1%}, recall {task.fields.recall:.1%}, "
        f"F1 {task.fields.f1:.1%}"
        for name, task in tasks.items()
        if task.fields is not None
    ]
    invalid = [f"{name} {task.num_invalid}" for name, task in tasks.items() if task.num_invalid]
    lines += [f"not of the kind that was asked for: {', '.join(invalid)}"] * bool(invalid)
    lines += ["constant: the best of the most frequent truths as an answer to every prompt"] * any(
        task.constant is not None for task in tasks.values()
    )
    tests = dict.fromkeys(TESTS[task.before.test] for task in tasks.values() if task.before is not None)
    lines += [f"p: two-sided, before against after on the same prompts ({', '.join(tests)})"] * bool(tests)
    return lines
