"""Held-out rows as questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist.config import Recipe, parse_recipe
from sft_dist.data.chat import ChatTokenizer
from sft_dist.data.held_out import open_held_out
from sft_dist.data.prepare import open_or_prepare
from sft_dist.data.questions import Questions, read_questions, require_best_task
from sft_dist.errors import ConfigError
from tests import tiny

CONSOLE = Console(quiet=True)


def turns(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    roles = roles if first == "user" else roles[1:]
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def write_rows(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_tokenizer(tmp_path / "model")


def ask(
    directory: Path, *, limit: int | None = None, positions: int | None = None, evaluate: Any = None, **data: Any
) -> tuple[Recipe, Questions]:
    train = directory / "train.jsonl"
    if not train.exists():
        write_rows(train, *({"messages": turns(f"{a}{b}", "x"), "task": a} for a in "abc" for b in "defghi"))
    raw = {
        "run": {"name": "r", "dir": str(directory / "runs")},
        "model": {"path": str(directory / "model")},
        "data": {"train": str(train), "workers": 1, **data},
        "batch": {"examples": 2},
        "optim": {"lr": 1e-3},
        "evaluate": evaluate or {},
    }
    recipe = parse_recipe(raw, origin="recipe")
    store = open_or_prepare(recipe, recipe.data.train, console=CONSOLE)
    sets = open_held_out(recipe, store, console=CONSOLE)
    tokenizer = ChatTokenizer.load(directory / "model")
    return recipe, read_questions(recipe, sets, tokenizer, limit=limit, max_positions=positions)


def test_the_prompt_is_all_before_the_last_answer_and_rows_name_their_task(tmp_path: Path, model: Path) -> None:
    rows = [
        {"messages": turns("ab", "cd"), "task": "qa"},
        {"messages": turns("ab", "cd", "ef", "gh"), "task": 7},
        {"messages": turns("ab", "cd", "ef")},
        {"messages": turns("ab", "z")},
        {"instruction": "ab", "output": "cd"},
    ]
    held_out = write_rows(tmp_path / "h.jsonl", *rows[:4])
    alpaca = write_rows(tmp_path / "a.jsonl", rows[4])
    _, found = ask(tmp_path, held_out=[held_out, alpaca])
    assert [(q.set_name, q.id, q.task, q.truth, len(q.messages)) for q in found.asked] == [
        ("held_out", f"{held_out}:1", "qa", "cd", 1),
        ("held_out", f"{held_out}:2", "7", "gh", 3),
        ("held_out", f"{held_out}:4", "all", "z", 1),
        ("held_out", f"{alpaca}:1", "all", "cd", 1),
    ]
    assert found.left_out == {"held_out": {"last_turn_is_no_answer": 1}}
    expected = ChatTokenizer.load(model).encode_prompt(found.asked[1].messages)
    assert list(found.asked[1].ids) == expected
    assert found.asked[1].asks == "ef"


def test_named_sets_are_asked_apart_and_a_nested_field_can_name_the_task(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": turns(f"q{letter}", "y"), "meta": {"kind": "k" + letter}} for letter in "abcdef"]
    one, two = write_rows(tmp_path / "one.jsonl", *rows[:4]), write_rows(tmp_path / "two.jsonl", *rows[4:])
    recipe, found = ask(
        tmp_path, held_out={"clinic": one, "general": [two]}, evaluate={"task_field": "meta.kind"}, limit=3
    )
    assert recipe.set_names == ("clinic", "general")
    assert [question.set_name for question in found.asked] == ["clinic"] * 3 + ["general"] * 2
    assert [question.task for question in found.asked[3:]] == ["ke", "kf"]
    subsets = {
        tuple(q.id for q in ask(tmp_path, held_out={"clinic": one}, evaluate={"seed": seed}, limit=2)[1].asked)
        for seed in (*range(5), 0)
    }
    assert 1 < len(subsets) <= 5, "another seed, another subset; the same seed, the same"


def test_a_held_out_share_asks_the_rows_that_are_not_trained(tmp_path: Path, model: Path) -> None:
    recipe, found = ask(tmp_path, held_out_share=0.3)
    store = open_or_prepare(recipe, recipe.data.train, console=CONSOLE)
    (held_out,) = open_held_out(recipe, store, console=CONSOLE)
    assert 0 < len(found.asked) < len(store)
    assert [question.id for question in found.asked] == [str(store.origin(int(index))) for index in held_out.ids]


def test_prompts_that_are_too_long_are_counted_or_refused(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": turns("abcdefgh", "y", "k", "z")}, {"messages": turns("ab", "y")}]
    held_out = write_rows(tmp_path / "h.jsonl", *rows)
    _, found = ask(tmp_path, held_out=held_out, max_tokens=8, too_long="truncate")
    assert (len(found.asked), found.left_out) == (1, {"held_out": {"prompt_too_long": 1}})
    with pytest.raises(
        ConfigError, match=r"evaluate.max_new_tokens=256 and the longest prompt, of 15 tokens .*h.jsonl:1"
    ):
        ask(tmp_path, held_out=held_out, positions=260)


def test_the_best_task_must_be_asked(tmp_path: Path, model: Path) -> None:
    settings = {"keep_best_by": "held_out/b", "generate_every": 1}
    recipe, found = ask(tmp_path, held_out_share=0.5, evaluate=settings)
    require_best_task(recipe, found.asked)
    with pytest.raises(ConfigError, match="no question of the set 'held_out' has the task 'b'; its tasks are a"):
        require_best_task(recipe, [question for question in found.asked if question.task == "a"])
