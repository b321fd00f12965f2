"""`sft-dist evaluate` with answers: by task, before and after, on two processes, killed and gone on, compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist import cli
from sft_dist.evaluation.answers import read_scored
from sft_dist.metrics import read_held_out, read_lines
from tests import tiny

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sft_dist")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tied_model: Path) -> Path:
    """A finished run of three steps with two held-out sets, answered on the way."""
    directory = tmp_path_factory.mktemp("evaluate")
    for name, count, seed in (("clinic", 7, 1), ("general", 4, 2)):
        tiny.write_chats(directory / f"{name}.jsonl", num_examples=count, seed=seed, longest=30)
        rows = [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]
        tagged = [row | {"task": "even" if index % 2 else "odd"} for index, row in enumerate(rows)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    path = tiny.write_recipe(
        directory,
        tied_model,
        data={"held_out": {"clinic": str(directory / "clinic.jsonl"), "general": str(directory / "general.jsonl")}},
        train={"steps": 3, "eval_every": 2, "save_every": 1, "keep_checkpoints": 1, "keep_best": 1},
        evaluate={
            "tasks": {"even": "summary"},
            "max_new_tokens": 12,
            "batch_size": 2,
            "generate_every": 2,
            "generate_examples": 3,
            "keep_best_by": "general/loss",
        },
        optim={"lr": 1e-2},
    )
    assert cli.main(["train", str(path)]) == 0
    return path


def run_dir(recipe: Path) -> Path:
    return recipe.parent / "runs" / "r"


def start(*words: str) -> "subprocess.Popen[str]":
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *words], env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_losses_and_scores_are_logged_set_by_set_and_decide_what_is_kept(recipe: Path) -> None:
    metrics = run_dir(recipe) / "metrics.jsonl"
    lines = list(read_lines(metrics))
    losses = [(line["set"], line["step"]) for line in lines if line["event"] == "held_out"]
    assert losses == [(name, step) for step in (0, 2, 3) for name in ("clinic", "general")]
    assert read_held_out(metrics) == read_held_out(metrics, "clinic") != read_held_out(metrics, "general")
    scores = [line for line in lines if line["event"] == "score"]
    assert {line["step"] for line in scores} == {0, 2, 3}
    assert {(line["task"], line["metric"]) for line in scores} <= {("odd", "exact"), ("even", "summary")}
    assert sum(line["n"] for line in scores if line["step"] == 2) == 6
    answers = read_scored(run_dir(recipe) / "answers" / "step-00000002.jsonl")
    assert sorted(answer.set for answer in answers) == ["clinic"] * 3 + ["general"] * 3
    state = json.loads(next((run_dir(recipe) / "checkpoints").glob("step-*3/run_state.json")).read_text())
    general = read_held_out(metrics, "general")
    assert (state["best_by"], state["best_value"]) == ("general/loss", -general[3]["held_out_loss"])
    assert state["held_out_loss"] == read_held_out(metrics)[3]["held_out_loss"]


def test_two_processes_find_what_one_finds_and_a_killed_evaluation_goes_on(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone; then on two ranks from nothing; then killed after a batch; each time with the same answers and scores."""
    assert cli.main(["evaluate", str(recipe), "--before"]) == 0
    printed = capsys.readouterr().out
    assert "mean of tasks" in printed
    alone, answers = found(recipe)
    assert [len(part["tasks"]) for part in alone["sets"].values()] == [2, 2]
    assert alone["sets"]["clinic"]["tasks"]["even"]["before"] is not None
    measured = read_held_out(run_dir(recipe) / "metrics.jsonl", "general")
    assert alone["sets"]["general"]["example_mean"] == pytest.approx(measured[3]["held_out_loss"], rel=1e-6)
    assert alone["sets"]["general"]["before"]["example_mean"] == pytest.approx(measured[0]["held_out_loss"], rel=1e-6)

    logs = sorted((run_dir(recipe) / "answers").glob("*/"))
    assert [log.name.partition("-")[0] for log in logs] == ["base", "model"]
    for log in logs:
        (log / "rank-00000.jsonl").unlink()
    out, _ = (process := start(*TORCHRUN, "evaluate", str(recipe), "--before")).communicate(timeout=150)
    assert process.returncode == 0, out
    assert all(len(list(log.glob("rank-*.jsonl"))) == 2 for log in logs), "both ranks have answered"
    two, answers_of_two = found(recipe)
    assert answers_of_two == answers
    assert two["processes"] == 2
    for name, part in alone["sets"].items():
        assert two["sets"][name]["tasks"] == part["tasks"]
        assert two["sets"][name]["token_mean"] == pytest.approx(part["token_mean"], abs=1e-6)

    model_log = logs[1] / "rank-00000.jsonl"
    (logs[1] / "rank-00001.jsonl").unlink()
    whole = model_log.read_bytes()
    torn = whole.splitlines(keepends=True)[0] + b'{"index": 5, "ans'
    model_log.write_bytes(torn)
    assert cli.main(["evaluate", str(recipe), "--before"]) == 0
    assert found(recipe)[1] == answers
    assert model_log.read_bytes().startswith(torn), "what was there is kept, and gone on from"


def found(recipe: Path) -> tuple[dict[str, Any], list[tuple[str, str, str, float]]]:
    evaluation = json.loads((run_dir(recipe) / "evaluation.json").read_text())
    answers = [
        (answer.set, answer.id, answer.answer, answer.score)
        for kind in ("base", "model")
        for answer in read_scored(run_dir(recipe) / "answers" / f"{kind}.jsonl")
    ]
    assert len(answers) == 22
    return evaluation, answers


def test_scores_follow_new_metrics_without_new_answers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(recipe)]) == 0
    before = {file: file.read_bytes() for file in (run_dir(recipe) / "answers").glob("model-*/rank-*.jsonl")}
    assert cli.main(["evaluate", str(recipe), "evaluate.tasks.odd=summary", "evaluate.worst=0"]) == 0
    evaluation = json.loads((run_dir(recipe) / "evaluation.json").read_text())
    assert evaluation["sets"]["clinic"]["tasks"]["odd"]["metric"] == "summary"
    assert evaluation["base"] is None
    assert {file: file.read_bytes() for file in before} == before
    assert cli.main(["evaluate", str(recipe), "evaluate.tasks.odd=numeric"]) == 2
    assert "has no number, and the task 'odd' is scored as numeric" in capsys.readouterr().err


def test_named_sets_are_prepared_and_inspected(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "held out clinic" in printed
    assert "held out general" in printed
    assert cli.main(["inspect", str(recipe), "--set", "general"]) == 0
    assert "general.jsonl" in capsys.readouterr().out
    assert cli.main(["inspect", str(recipe), "--set", "other"]) == 2
    assert "--set other: data.held_out has the sets clinic, general" in capsys.readouterr().err


def test_two_evaluations_are_compared(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(recipe), "--before"]) == 0
    capsys.readouterr()
    assert (
        cli.main(["evaluate", "--compare", str(run_dir(recipe) / "answers" / "base.jsonl"), str(run_dir(recipe))]) == 0
    )
    assert "before" in capsys.readouterr().out
    assert cli.main(["evaluate"]) == 2
    assert "name a recipe, or two runs with --compare" in capsys.readouterr().err
