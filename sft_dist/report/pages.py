"""`sft-dist report`: a run as one self-contained page, or several beside each other; and the curve as a PNG.

No script, no request; everything that comes from files is escaped by the template.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sft_dist import __version__
from sft_dist.data.page_template import page_template
from sft_dist.data.shown import safe
from sft_dist.errors import ConfigError
from sft_dist.report import charts, evaluation, numbers, parts
from sft_dist.report.data import RunData, read_run
from sft_dist.report.figures import Chart, Line, exact_text, smoothed
from sft_dist.report.png import write_png
from sft_dist.run_files import CURVE, REPORT
from sft_dist.status import duration

MAX_RUNS = 8
"""So many colours can still be told apart."""


def write_report(run_dirs: Sequence[Path], *, output: Path | None = None) -> list[str]:
    """Write the page of one run, with its PNG, or the page that compares several. Returns a line for each file.

    output: default: report.html of the run, or here for several. Raises ConfigError where there is no run to tell of.
    """
    if len(run_dirs) > MAX_RUNS:
        raise ConfigError(f"{len(run_dirs)} runs were given; {MAX_RUNS} at most can be told apart on one page")
    runs = told_apart([read_run(run_dir) for run_dir in run_dirs])
    if len(runs) > 1:
        path = output or Path(REPORT)
        path.write_text(render_comparison(runs), encoding="utf-8")
        return [_written("report", path)]
    path = output or run_dirs[0] / REPORT
    path.write_text(render_report(runs[0]), encoding="utf-8")
    png = path.with_name(CURVE)
    missing = write_png(png, runs[0])
    return [_written("report", path), missing or _written("curve", png)]


def told_apart(runs: Sequence[RunData]) -> list[RunData]:
    """Runs that share their name go by their path."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.run_dir)) if names.count(run.name) > 1 else run for run in runs]


def _written(what: str, path: Path) -> str:
    return f"{what}: {path} ({path.stat().st_size / 1e3:,.0f} kB)"


def render_report(run: RunData) -> str:
    """The page of one run as text."""
    found = evaluation.evaluation_parts(run)
    return page_template("report/page.html").render(
        **_frame(),
        title=safe(run.name),
        run_dir=safe(str(run.run_dir)),
        lede=safe(_lede(run)),
        tiles=numbers.tiles(run),
        warnings=[safe(text) for text in run.warnings()],
        curves_intro=_curves_intro(run),
        loss_chart=charts.loss_chart(run).drawn(),
        other_charts=_drawn(charts.other_charts(run)),
        evaluation=found,
        evaluation_intro=_evaluation_intro(run),
        score_charts=_drawn(charts.score_charts(run)),
        questions=evaluation.shown_questions(run),
        answers_intro=_answers_intro(run),
        speed_intro=_speed_intro(run),
        speed_charts=_drawn(charts.speed_charts(run)),
        memory=parts.memory_part(run),
        data_intro="Counts are of the training data when the run started.",
        **parts.data_part(run),
        samples=parts.mask_samples(run),
        environment=parts.environment_facts(run),
        starts=parts.shown_starts(run),
        recipe=parts.recipe_text(run),
    )


def render_comparison(runs: Sequence[RunData]) -> str:
    """The page of several runs as text."""
    figures = [_figures(run) for run in runs]
    return page_template("report/compare.html").render(
        **_frame(),
        title=f"{len(runs)} runs compared",
        lede=safe(", ".join(run.name for run in runs)),
        columns=[name for name, _ in figures[0]],
        runs=[
            {"number": number, "name": safe(run.name), "state": safe(run.state()), "figures": own}
            for number, (run, own) in enumerate(zip(runs, figures, strict=True), start=1)
        ],
        charts=_drawn(_compared_charts(runs)),
        evaluation=evaluation.compared_evaluation(runs),
        differences=parts.differences(runs),
    )


def _frame() -> dict[str, str]:
    return {"version": __version__, "written": time.strftime("%Y-%m-%d %H:%M %Z")}


def _drawn(drawable: Sequence[Chart]) -> list[dict[str, Any]]:
    return [chart.drawn() for chart in drawable if any(len(line.finite[0]) for line in chart.lines)]


def _lede(run: RunData) -> str:
    model = (run.recipe.get("model") or {}).get("path")
    where = run.environment
    on = f" Engine {where['engine']}, {where['world_size']} x {where['device_name']}." if "engine" in where else ""
    return f"{run.state()[0].upper()}{run.state()[1:]}.{f' Trained from {model}.' if model else ''}{on}"


def _curves_intro(run: RunData) -> str:
    text = f"{len(run.steps):,} steps, the last attempt of each."
    if run.restarts():
        text += f" Started again {len(run.restarts())} time{'s' * (len(run.restarts()) > 1)}."
    return text + (f" {len(run.withheld()):,} updates were withheld." if run.withheld() else "")


def _evaluation_intro(run: RunData) -> str:
    found = run.evaluation
    base = f", against {found['base']}" if found.get("base") else ""
    return safe(f"Of {found.get('model', 'the exported model')}{base}. Grey is before, green after, with intervals.")


def _answers_intro(run: RunData) -> str:
    shown = min(evaluation.NUM_QUESTIONS, len(run.questions))
    return f"{shown} of {len(run.questions):,} held-out prompts, with what the model answered on the way."


def _speed_intro(run: RunData) -> str:
    speed = numbers.mean_tokens_per_s(run)
    if speed is None:
        return "No step was done."
    words = [f"{speed:,.0f} tokens/s in steps", numbers.utilisation(run)]
    commits = run.lines.get("commit", ())
    stood = sum(line["stall_s"] for line in commits)
    if commits:
        words.append(f"{len(commits):,} checkpoints, for which training stood still {duration(stood)}")
    return ", ".join(filter(None, words)) + "."


def _figures(run: RunData) -> list[tuple[str, str]]:
    """A run's row in the comparison."""
    smooth = smoothed(run.series("loss"))
    held_out = next(iter(run.held_out().values()), None)
    least, at = numbers.least_of(held_out) if held_out is not None else ("–", "")
    speed, peak = numbers.mean_tokens_per_s(run), numbers.peak_memory(run)
    return [
        ("Loss", numbers.last_of(smooth)),
        ("Held out, last", numbers.last_of(held_out) if held_out is not None else "–"),
        ("Held out, least", least + (f" at {at}" if at else "")),
        ("Tokens/s", f"{speed:,.0f}" if speed is not None else "–"),
        ("Use of device", numbers.utilisation(run) or "–"),
        ("Peak GiB", exact_text(peak, 4) if peak is not None else "–"),
        ("Time in steps", duration(sum(line["seconds"] for line in run.steps))),
    ]


def _compared_charts(runs: Sequence[RunData]) -> list[Chart]:
    last = max(charts.last_step(run) for run in runs)
    named = list(enumerate(runs, start=1))
    losses = [Line(safe(run.name), f"run-{n}", smoothed(run.series("loss"))) for n, run in named]
    held_out = [
        Line(f"{safe(run.name)}, held out", f"dots-{n}", next(iter(run.held_out().values())))
        for n, run in named
        if run.held_out()
    ]
    norms = [Line(safe(run.name), f"run-{n}", smoothed(run.series("grad_norm"))) for n, run in named]
    rates = [Line(safe(run.name), f"run-{n}", run.series("lr")) for n, run in named]
    speeds = [Line(safe(run.name), f"run-{n}", smoothed(run.series("tokens_per_s"))) for n, run in named]
    marked = "Dots: the first held-out set. Runs of different loss settings have different losses."
    return [
        Chart("loss", "Loss", marked, [*losses, *held_out], first_step=0 if held_out else 1, last_step=last),
        Chart("lr", "Learning rate", "As it was applied.", rates, from_zero=True, last_step=last),
        Chart("grad-norm", "Gradient norm", "Smoothed.", norms, is_log=True, last_step=last),
        Chart("tokens-per-s", "Tokens per second", "Smoothed.", speeds, from_zero=True, last_step=last),
    ]
