"""What a report is made of: curves that lose no peak, the attempts that count, and files that may not be there."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sft_dist.errors import ConfigError
from sft_dist.metrics import HeldOutMetrics
from sft_dist.report.apart import write_report_apart
from sft_dist.report.charts import other_charts, speed_charts
from sft_dist.report.data import read_run
from sft_dist.report.evaluation import evaluation_parts, shown_questions
from sft_dist.report.figures import NUM_BUCKETS, Axis, decimate, smoothed, value_axis
from sft_dist.report.pages import render_comparison, render_report, told_apart, write_report
from sft_dist.report.parts import differences
from sft_dist.report.png import write_png
from tests.unit.test_status import MadeRun, step_line


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "clinic")
    made.start(num_steps=100)
    return made


def config(run: MadeRun, text: str) -> None:
    (run.directory / "config.yaml").write_text(text)


def test_decimation_keeps_every_extreme_and_few_points() -> None:
    rng = np.random.default_rng(0)
    steps, values = np.arange(1, 10_001), rng.normal(size=10_000)
    values[[17, 5_000, 9_998]] = 50, -50, 40
    kept_steps, kept = decimate((steps, values))
    assert len(kept) <= 2 * NUM_BUCKETS + 2
    assert {50, -50, 40} <= set(kept)
    assert (kept_steps[0], kept_steps[-1]) == (1, 10_000)
    assert (np.diff(kept_steps) > 0).all()
    for step, value in zip(kept_steps, kept, strict=True):
        assert values[step - 1] == value
    for first in range(0, 10_000, 1000):  # no stretch loses its own
        inside = (kept_steps > first) & (kept_steps <= first + 1000)
        assert kept[inside].max() == values[first : first + 1000].max()
        assert kept[inside].min() == values[first : first + 1000].min()


def test_smoothing_is_a_weighted_mean_of_what_came_before() -> None:
    """Against the sum written out: weights fall by a constant factor, and those of the first values sum to one."""
    values = np.array([5.0, 1.0, np.nan, 2.0, 8.0, 3.0])
    steps, smooth = smoothed((np.arange(1, 7), values))
    finite = values[np.isfinite(values)]
    assert steps.tolist() == [1, 2, 4, 5, 6]
    for place in range(len(finite)):
        weights = 0.8 ** np.arange(place, -1, -1)
        assert smooth[place] == pytest.approx((weights * finite[: place + 1]).sum() / weights.sum())


def test_axes_hold_all_values_and_round_ticks() -> None:
    axis = value_axis([np.array([0.3, 2.2])], is_log=False, from_zero=True)
    assert axis.low == 0
    assert axis.ticks() == [0, 1, 2]
    log = value_axis([np.array([0.02, 700.0])], is_log=True, from_zero=False)
    assert log.low < 0.02 < 700 < log.high
    assert log.ticks() == [0.1, 1.0, 10.0, 100.0]
    assert log.place(np.array([log.low, log.high])) == pytest.approx([0, 1])
    one = value_axis([np.array([3.0])], is_log=False, from_zero=False)
    assert one.low < 3 < one.high
    assert Axis(0.9, 3.0, is_log=True).ticks() == [1, 2]


def test_what_a_later_start_went_back_behind_is_gone(run: MadeRun) -> None:
    run.log_steps(1, 50, loss=1.0)
    run.start(after_step=40)
    run.log_steps(41, 43, loss=2.0, attempt=2)
    found = read_run(run.directory)
    steps, losses = found.series("loss")
    assert steps.tolist() == list(range(1, 44))
    assert losses.tolist() == [1.0] * 40 + [2.0] * 3
    assert found.restarts() == [40]
    assert found.state() == "step 43 of 1,000"


def test_a_loss_that_is_not_finite_breaks_nothing(run: MadeRun) -> None:
    run.log_steps(1, 3)
    run.log(step_line(4, loss=float("nan"), grad_norm=float("inf"), applied=False, withheld="loss not finite"))
    page = render_report(read_run(run.directory))
    assert "Updates withheld" in page
    assert 'class="mark withheld" data-step="4"' in page
    assert "nan" not in page.split("<main>")[1].split('<section id="setup"')[0].lower()


def test_a_page_of_ten_thousand_steps_is_small(run: MadeRun) -> None:
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"event": "step"} | vars(step_line(step, loss=float(loss), grad_norm=float(norm), attempt=1)))
        for step, (loss, norm) in enumerate(rng.lognormal(size=(10_000, 2)), start=1)
    ]
    (run.directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert len(render_report(read_run(run.directory)).encode()) < 500_000


def test_scores_have_intervals_and_losses_a_before(run: MadeRun) -> None:
    run.log_steps(1, 2)
    task = {"metric": "exact", "n": 50, "score": 0.5, "ci": [0.36, 0.64], "before": {"score": 0.1, "ci": [0.04, 0.21]}}
    part = {"example_mean": 1.5, "perplexity": None, "before": {"example_mean": 3.0}, "tasks": {"qa": task}}
    (run.directory / "evaluation.json").write_text(json.dumps({"sets": {"held_out": part}}))
    (found,) = evaluation_parts(read_run(run.directory))
    (row,) = found["tasks"]
    assert (row["before"]["text"], row["after"]["text"]) == ("10.0%", "50.0%")
    assert row["after"]["interval"] == "36.0% to 64.0%"
    assert row["p_value"] == "–"
    assert found["losses"] == [{"name": "Loss per example, nats", "before": "3", "after": "1.5"}]
    (run.directory / "evaluation.json").write_text(json.dumps({"sets": {"held_out": part | {"example_mean": None}}}))
    (broken,) = evaluation_parts(read_run(run.directory))
    assert broken["losses"] == [{"name": "Loss per example, nats", "before": "3", "after": "–"}]
    (run.directory / "evaluation.json").write_text(json.dumps({"example_mean": 1.25, "token_mean": 1.0}))
    (old,) = evaluation_parts(read_run(run.directory))
    assert [row["after"] for row in old["losses"]] == ["1.25", "1"], "as it was before sets had names"


def test_answers_are_of_many_tasks_and_of_first_and_last_steps(run: MadeRun) -> None:
    run.log_steps(1, 2)
    (run.directory / "answers").mkdir()
    for step in range(10, 110, 10):
        rows: list[dict[str, Any]] = [
            {"set": "s", "id": f"{task}{i}", "task": task, "prompt": [], "truth": "t", "answer": f"{step}"}
            for task in "ab"
            for i in range(9)
        ]
        path = run.directory / "answers" / f"step-{step:08d}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = shown_questions(read_run(run.directory))
    assert [question["task"] for question in questions] == ["a", "b"] * 3
    assert [answer["step"] for answer in questions[0]["answers"]][:: len(questions[0]["answers"]) - 1] == [10, 100]


def test_secrets_of_the_recipe_and_of_this_machine_stay_out(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abracadabra")
    run.log_steps(1, 2)
    run.start(after_step=2, earlier_reason="cannot reach https://ann:opensesame@host")
    config(run, "model: {path: 'https://ann:opensesame@host/m'}\ndata: {train: /x/abracadabra}\n")
    page = render_report(read_run(run.directory))
    assert "https://ann:***@host/m" in page
    assert "opensesame" not in page
    assert "abracadabra" not in page


def test_differences_are_those_of_the_recipes_but_names(tmp_path: Path) -> None:
    runs = []
    for name, lr in (("a", 1e-5), ("b", 2e-5)):
        made = MadeRun(tmp_path / name / "same")
        made.start()
        made.log_steps(1, 3)
        data = f"{{train: [{{path: x, weight: {len(runs)}}}]}}"
        config(made, f"run: {{name: {name}}}\noptim: {{lr: {lr}}}\ndata: {data}\n")
        runs.append(read_run(made.directory))
    apart = told_apart(runs)
    assert [run.name for run in apart] == [str(run.run_dir) for run in runs], "both are called `same`"
    assert [(row["key"], [value for _, value in row["cells"]]) for row in differences(apart)] == [
        ("optim.lr", ["1e-05", "2e-05"]),
        ("data.train[0].weight", ["0", "1"]),
    ]
    assert "2 runs compared" in render_comparison(apart)


def test_a_table_has_every_line_of_its_chart_but_smoothed_ones(run: MadeRun) -> None:
    run.log_steps(1, 3, lr=1e-3, grad_norm=0.0, peak_memory_bytes=2**31, memory_bytes=2**30)
    found = read_run(run.directory)
    drawn = {chart.title: chart.drawn() for chart in other_charts(found) + speed_charts(found)}
    assert drawn["Learning rate"]["table"] == {"names": ["lr"], "rows": [[str(step), "0.001"] for step in (1, 2, 3)]}
    assert drawn["Memory"]["table"]["names"] == ["peak so far", "after a step"]
    assert drawn["Memory"]["table"]["rows"][0] == ["1", "2", "1"]
    assert drawn["Gradient norm"]["table"]["names"] == ["each step"]
    assert not drawn["Gradient norm"]["is_log"], "zeros have no logarithm: the axis is linear"


def test_the_png_has_every_held_out_set(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    run.log_steps(1, 3)
    names = [f"set {number}" for number in range(9)]
    run.log(*(HeldOutMetrics(3, 1.0, 10, 100, 1.0, 1, set=name) for name in names))
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    write_png(run.directory / "curve.png", read_run(run.directory))
    lines = {line.get_label(): (line.get_marker(), line.get_color()) for line in drawn[0].axes[0].lines}
    assert [f"held out: {name}" in lines for name in names] == [True] * 9
    assert len({lines[f"held out: {name}"] for name in names}) == 9


def test_without_matplotlib_the_page_is_whole_and_says_how_to_get_the_png(
    run: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.log_steps(1, 3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page, png = write_report([run.directory])
    assert page.startswith(f"report: {run.directory / 'report.html'} (")
    assert png == "curve: curve.png is left out, it needs matplotlib; pip install 'sft-dist[report]'"
    assert (run.directory / "report.html").read_text().rstrip().endswith("</html>")
    assert not (run.directory / "curve.png").exists()


def test_what_is_no_run_and_too_many_runs_are_refused(run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl is here"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="9 runs were given; 8 at most"):
        write_report([run.directory] * 9)


def test_a_report_that_cannot_be_written_is_said_and_no_more(run: MadeRun, caplog: pytest.LogCaptureFixture) -> None:
    run.log_steps(1, 3)
    (run.directory / "report.html").mkdir()
    write_report_apart(run.directory, Console())
    (record,) = (record for record in caplog.records if record.name == "sft_dist.report.apart")
    assert record.levelno == logging.WARNING
    assert "no report was written: error: " in record.getMessage()
    assert f"`sft-dist report {run.directory}` tries again" in record.getMessage()
