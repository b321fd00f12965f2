"""Answers on disk, scores by task, and what is printed of them."""

import io
import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sft_dist.data.conversation import Message
from sft_dist.data.questions import Question
from sft_dist.data.shown import UNSAFE
from sft_dist.errors import ConfigError, DataError
from sft_dist.evaluate_section import EvaluateSection
from sft_dist.evaluation.answers import AnswerLog, Scored, fingerprint_answers, read_scored, score_answers, write_scored
from sft_dist.evaluation.comparison import Comparison, compare, print_comparison
from sft_dist.evaluation.record import Evaluation, Losses, SetResult
from sft_dist.evaluation.report import print_evaluation
from sft_dist.evaluation.task_scores import mean_score, task_scores, worst_answers
from sft_dist.significance import mcnemar, wilson

SECTION = EvaluateSection.model_validate({"tasks": {"calc": "numeric", "fields": "json"}, "worst": 3})
TRUTHS = [("calc", "5 mg"), ("calc", "6 mg"), ("calc", "5 mg"), ("fields", '{"a": 1, "b": 2}'), ("qa", "yes")]
QUESTIONS = [
    Question("clinic", f"d.jsonl:{line}", task, (Message("user", f"question {line}"),), truth, (line, 7))
    for line, (task, truth) in enumerate(TRUTHS, start=1)
]


def scored(*answers: str) -> list[Scored]:
    return score_answers(QUESTIONS, answers, SECTION)


BEFORE = scored("5", "5", "no", "{}", "no")
AFTER = scored("5", "6", "5 mg", '{"a": 1, "b": 3, "c": 4}', "no")


def test_scores_are_means_by_task_with_intervals_and_a_paired_test() -> None:
    found = task_scores(AFTER, seed=0, before=BEFORE, section=SECTION)["clinic"]
    assert list(found) == ["calc", "fields", "qa"]
    calc, fields = found["calc"], found["fields"]
    assert (calc.metric, calc.n, calc.score, calc.ci, calc.num_invalid) == ("numeric", 3, 1.0, wilson(3, 3), 0)
    assert calc.constant == ("5 mg", pytest.approx(2 / 3)), "5 mg to every question"
    assert calc.before is not None
    assert (calc.before.score, calc.before.wins, calc.before.losses) == (pytest.approx(1 / 3), 2, 0)
    assert (calc.before.p_value, calc.before.test) == (mcnemar(2, 0), "mcnemar")
    assert fields.score == pytest.approx(2 / 5)  # one of three given, of two expected
    assert fields.fields is not None
    assert (fields.fields.precision, fields.fields.recall) == (pytest.approx(1 / 3), 0.5)
    assert fields.before is not None
    assert fields.before.test == "permutation"
    assert mean_score(found.values()) == pytest.approx((1 + 2 / 5 + 0) / 3)


def test_answers_of_another_model_count_only_to_the_same_prompt() -> None:
    found = task_scores(AFTER, seed=0, before=BEFORE[1:2])["clinic"]
    assert found["calc"].before is not None
    assert (found["calc"].before.score, found["calc"].before.wins) == (0.0, 1)
    assert found["qa"].before is None


def test_the_worst_answers_are_taken_from_each_task_in_turn() -> None:
    worst = worst_answers(BEFORE, count=4)
    assert [answer.id for answer in worst] == ["d.jsonl:2", "d.jsonl:4", "d.jsonl:5", "d.jsonl:3"]
    assert worst_answers(AFTER, count=9)[0].task == "fields", "right ones are none of them"


def test_scored_answers_are_read_back(tmp_path: Path) -> None:
    write_scored(tmp_path / "a" / "model.jsonl", AFTER)
    assert read_scored(tmp_path / "a" / "model.jsonl") == AFTER
    line = json.loads((tmp_path / "a" / "model.jsonl").read_text().splitlines()[0])
    assert {"set", "id", "task", "prompt", "truth", "answer", "score"} <= set(line)
    assert line["prompt"] == [{"role": "user", "content": "question 1"}]
    (tmp_path / "b.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: no scored answer"):
        read_scored(tmp_path / "b.jsonl")


def test_a_log_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    log, other = (AnswerLog(tmp_path / "model-0a", rank=rank) for rank in (0, 1))
    log.append({3: "three", 1: "o\nne"})
    other.append({2: "two"})
    file = tmp_path / "model-0a" / "rank-00000.jsonl"
    file.write_bytes(file.read_bytes() + b'{"index": 5, "answer": "fi')
    assert other.read() == {3: "three", 1: "o\nne", 2: "two"}
    log.append({4: "four"})
    assert other.read() == {3: "three", 1: "o\nne", 2: "two", 4: "four"}
    (tmp_path / "model-0b").mkdir()
    (tmp_path / "base-0b").mkdir()
    log.remove_older()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base-0b", "model-0a"]


def test_the_fingerprint_covers_prompts_and_settings_but_no_truth() -> None:
    def changed(**values: object) -> list[Question]:
        return [replace(QUESTIONS[0], **values), *QUESTIONS[1:]]  # type: ignore[arg-type]

    same = fingerprint_answers(QUESTIONS, model="m", max_new_tokens=5)
    assert fingerprint_answers(changed(truth="7 mg", task="qa"), model="m", max_new_tokens=5) == same
    others = [
        fingerprint_answers(changed(ids=(1, 8)), model="m", max_new_tokens=5),
        fingerprint_answers(QUESTIONS[::-1], model="m", max_new_tokens=5),
        fingerprint_answers(QUESTIONS, model="n", max_new_tokens=5),
        fingerprint_answers(QUESTIONS, model="m", max_new_tokens=6),
    ]
    assert len({same, *others}) == 5


# ---------------------------------------------------------------- what is printed


def evaluation() -> Evaluation:
    losses = Losses(5, 40, 1.0, 0.5)
    tasks = task_scores(AFTER, seed=0, before=BEFORE, section=SECTION)["clinic"]
    result = SetResult(losses, Losses(5, 40, 2.0, 800.0), {"prompt_too_long": 2}, tasks, worst_answers(AFTER, count=2))
    return Evaluation("runs/r/model", "org/base", "float32", 2, 3.0, {"clinic": result})


@pytest.mark.parametrize("width", [80, 100])
def test_the_tables_fit_the_terminal(width: int) -> None:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_evaluation(evaluation(), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(
        line.split() == ["calc", "numeric", "3", "66.7%", "33.3%", "100.0%", "43.9", "to", "100.0", "0.5"]
        for line in lines
    )
    assert "2 rows are not asked: prompt too long" in lines
    assert any(line.startswith("truth") and '{"a": 1, "b": 2}' in line for line in lines)


def test_what_rows_and_models_say_cannot_steer_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J[bold]\n"
    answers = [
        replace(new, **{name: f"{getattr(new, name)}{hostile}" for name in ("set", "id", "task", "why", "answer")})
        for new in AFTER
    ]
    tasks = task_scores(answers, seed=0, before=answers)[f"clinic{hostile}"]
    losses = Losses(5, 40, 1.0, 0.5)
    result = SetResult(losses, None, {}, tasks, worst_answers(answers, count=2))
    comparison = Comparison({f"clinic{hostile}": tasks}, 0, answers)
    console = Console(width=100, record=True, file=io.StringIO())
    print_evaluation(Evaluation(f"m{hostile}", f"b{hostile}", "float32", 1, 3.0, {f"clinic{hostile}": result}), console)
    print_comparison(comparison, console)
    text = console.export_text()
    assert not UNSAFE.search(text)
    assert text.count("clinic\\x1b]0;owned\\x07\\x1b[2J[bold]") == 2, "shown as it is, not as markup"


@pytest.mark.parametrize("value", [math.nan, math.inf, 800.0])
def test_a_loss_that_is_not_finite_is_null_in_the_file(value: float) -> None:
    losses = Losses(5, 40, value, value)
    assert str(losses.perplexity) == ("nan" if math.isnan(value) else "inf")
    result = SetResult(losses, losses, {}, {}, ())
    text = Evaluation("m", None, "float32", 1, 3.0, {"clinic": result}).to_json()
    found = json.loads(text, parse_constant=pytest.fail)
    expected = {"example_mean": value if value == 800 else None, "perplexity": None, "examples": 5}
    for part in (found, found["sets"]["clinic"], found["sets"]["clinic"]["before"]):
        assert {name: part[name] for name in expected} == expected


def test_the_file_says_all_of_it() -> None:
    found = json.loads(evaluation().to_json())
    assert (found["model"], found["dtype"], found["examples"], found["token_mean"]) == (
        "runs/r/model",
        "float32",
        5,
        0.5,
    )
    clinic = found["sets"]["clinic"]
    assert clinic["perplexity"] == pytest.approx(1.6487, abs=1e-4)
    assert clinic["before"]["perplexity"] is None, "infinity is not JSON"
    assert clinic["tasks"]["calc"] | {"constant": 0, "ci": 0} == {
        "metric": "numeric", "n": 3, "score": 1.0, "ci": 0, "invalid": 0, "constant": 0,
        "before": {"score": pytest.approx(1 / 3), "ci": list(wilson(1, 3))},
        "p_value": 0.5, "test": "mcnemar", "better": 2, "worse": 0,
    }  # fmt: skip
    assert [worst["id"] for worst in clinic["worst"]] == ["d.jsonl:4", "d.jsonl:5"]
    assert {"prompt", "truth", "answer", "score", "task"} <= set(clinic["worst"][0])


# ---------------------------------------------------------------- two models


def run_with(path: Path, answers: Iterable[Scored]) -> Path:
    write_scored(path / "answers" / "model.jsonl", list(answers))
    return path


def test_two_runs_are_compared_on_what_both_answered(tmp_path: Path) -> None:
    first, second = run_with(tmp_path / "a", AFTER[1:]), run_with(tmp_path / "b", BEFORE)
    found = compare(first, second)
    assert found.num_unpaired == 1
    calc = found.tasks["clinic"]["calc"]
    assert calc.before is not None
    assert (calc.n, calc.score, calc.before.score, calc.before.losses) == (2, 0.0, 1.0, 2)
    assert [answer.id for answer in found.worse] == ["d.jsonl:2", "d.jsonl:3", "d.jsonl:4"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(found, console)
    assert "answers that became worse" in console.export_text()


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", AFTER[:2])
    with pytest.raises(ConfigError, match="answer no prompt in common"):
        compare(run, run_with(tmp_path / "b", AFTER[2:]))
    with pytest.raises(ConfigError, match="no scored answers"):
        compare(run, tmp_path / "c")
    for number, other in enumerate((replace(AFTER[0], metric="exact"), replace(AFTER[0], truth="7 mg"))):
        with pytest.raises(
            DataError, match=f"was scored as numeric against '5 mg', and as {other.metric} against '{other.truth}'"
        ):
            compare(run, run_with(tmp_path / f"d{number}", [other]))
