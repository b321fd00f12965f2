"""The curves of the report: which lines each has, over the steps of the run."""

import numpy as np

from sft_dist.data.shown import safe
from sft_dist.report.data import RunData
from sft_dist.report.figures import Chart, Line, Mark, smoothed

GIB = 2**30
NUM_TASKS_A_CHART = NUM_COLOURS = 8
"""Lines that the page has colours for."""


def marks_of(run: RunData) -> list[Mark]:
    changes = set(run.changes())
    return [
        *(Mark("restart", step) for step in sorted({*run.restarts()} - changes) if step),
        *(Mark("change", step) for step in sorted(changes)),
        *(Mark("withheld", step) for step in run.withheld()),
    ]


def last_step(run: RunData) -> int:
    return int(run.steps[-1]["step"]) if run.steps else 1


def held_out_label(name: str) -> str:
    """What the set is called beside other lines."""
    return "held out" if name == "held_out" else f"held out: {safe(name)}"


def loss_chart(run: RunData) -> Chart:
    raw = run.series("loss")
    lines = [Line("each step", "raw", raw), Line("smoothed", "smooth", smoothed(raw))]
    for number, (name, series) in enumerate(run.held_out().items(), start=1):
        lines.append(Line(held_out_label(name), "dots" if number == 1 else f"dots-{1 + number % NUM_COLOURS}", series))
    objective = run.recipe.get("loss", "example_mean")
    first = 0 if any(len(series[0]) and series[0][0] == 0 for series in run.held_out().values()) else 1
    return Chart(
        "loss",
        "Loss",
        f"Nats, {safe(str(objective))}, of the whole global batch.",
        lines,
        marks_of(run),
        first_step=first,
        last_step=last_step(run),
    )


def other_charts(run: RunData) -> list[Chart]:
    marks, last = marks_of(run), last_step(run)
    norm = run.series("grad_norm")
    return [
        Chart("lr", "Learning rate", "As it was applied.", [Line("lr", "smooth", run.series("lr"))], marks,
              from_zero=True, last_step=last),
        Chart("grad-norm", "Gradient norm", "Global L2 norm before clipping.",
              [Line("each step", "raw", norm), Line("smoothed", "smooth", smoothed(norm))], marks,
              is_log=True, last_step=last),
    ]  # fmt: skip


def speed_charts(run: RunData) -> list[Chart]:
    marks, last = marks_of(run), last_step(run)
    speed, fill, uneven = (run.series(key) for key in ("tokens_per_s", "pack_fill", "imbalance"))
    charts = [
        Chart("tokens-per-s", "Tokens per second", "Of all processes together; saves and held-out losses not counted.",
              [Line("each step", "raw", speed), Line("smoothed", "smooth", smoothed(speed))], marks,
              from_zero=True, last_step=last),
        Chart("imbalance", "Rank imbalance", "Cost of the slowest rank over the mean; 1 is perfect.",
              [Line("each step", "raw", uneven), Line("smoothed", "smooth", smoothed(uneven))], marks, last_step=last),
        Chart("pack-fill", "Pack fill", "Tokens over the room of all packs. There is no padding: a low fill wastes "
              "nothing.", [Line("each step", "raw", fill), Line("smoothed", "smooth", smoothed(fill))], marks,
              from_zero=True, last_step=last),
    ]  # fmt: skip
    now = run.series("memory_bytes")
    peak = run.series("peak_memory_bytes")
    if np.isfinite(peak[1]).any():
        lines = [
            Line("peak so far", "smooth", (peak[0], peak[1] / GIB)),
            Line("after a step", "raw", (now[0], now[1] / GIB)),
        ]
        charts.append(
            Chart("memory-over-time", "Memory", "GiB of rank 0.", lines, marks, from_zero=True, last_step=last)
        )
    return charts


def score_charts(run: RunData) -> list[Chart]:
    """One chart a held-out set, its tasks as lines."""
    scores = run.scores()
    charts = []
    for index, name in enumerate(dict.fromkeys(name for name, _ in scores), start=1):
        of_set = [(task, series) for (of, task), series in scores.items() if of == name]
        drawn = of_set[:NUM_TASKS_A_CHART]
        more = f" {len(of_set) - len(drawn)} more tasks are in the table of the evaluation." * (
            len(of_set) > len(drawn)
        )
        lines = [Line(safe(task), f"run-{place}", series) for place, (task, series) in enumerate(drawn, start=1)]
        charts.append(
            Chart(f"scores-{index}", f"Scores: {safe(name)}", f"Answers against the truth, 0 to 1.{more}", lines,
                  marks_of(run), to_one=True, first_step=0, last_step=last_step(run))
        )  # fmt: skip
    return charts
