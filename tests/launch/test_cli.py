"""Verbs that show things."""

import io
from pathlib import Path

import pytest
import yaml

from sft_dist import cli
from tests import tiny


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Path:
    return tiny.write_recipe(tmp_path, tied_model, num_examples=12, batch={"examples": 4}, train={"steps": 1})


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_config_prints_the_resolved_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = yaml.safe_load(said(capsys, "config", str(recipe), "optim.lr=0.5"))
    assert resolved["optim"]["lr"] == 0.5
    assert resolved["loss"] == "example_mean"
    run_dir = said(capsys, "config", str(recipe), "run.name=other", "--run-dir")
    assert run_dir == f"{recipe.parent}/runs/other\n"
    assert "qwen3-8b-8x80gb" in said(capsys, "config", "--list")
    assert yaml.safe_load(said(capsys, "config", "qwen3-8b-8x80gb"))["train"]["engine"] == "zero3"
    assert '"additionalProperties": false' in said(capsys, "config", "--schema")


def test_inspect_marks_what_is_trained(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", str(recipe), "--example", "1")
    assert out.count("⟦") == out.count("⟧") == 1
    assert "<|e|>⟧" in out, "the stop token is trained"
    assert "example 1" in out
    assert cli.main(["inspect", str(recipe), "--example", "12"]) == 2
    assert "the store holds examples 0 to 11" in capsys.readouterr().err


def test_overrides_may_follow_flags(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "inspect", str(recipe), "--example", "0", "data.max_tokens=41")
    assert "example 0" in out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["inspect", str(recipe), "--example", "0", "surplus"])


def test_generate_answers_from_an_export(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said(capsys, "train", str(recipe))
    model_dir = str(tmp_path / "runs" / "r" / "model")
    first = said(capsys, "generate", model_dir, "--prompt", "abc", "--max-new-tokens", "5")
    assert set(first) <= set("abcdefghijklmnopqrstuvwxyz ?\n"), "no control tokens in an answer"
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\nd\n"))
    answers = said(capsys, "chat", str(tmp_path / "runs" / "r"), "--max-new-tokens", "5").splitlines()
    assert answers[0] == first.rstrip("\n"), "a chat's first turn is the single answer"
    assert len(answers) == 2
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "no model here" in capsys.readouterr().err


def test_wandb_logs_offline(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Offline it writes its own files beside ours."""
    out = said(capsys, "train", str(recipe), "wandb={project: p, mode: offline}")
    assert "done: step 1" in out
    assert list((tmp_path / "runs" / "r" / "wandb").glob("offline-run-*"))


def test_a_template_that_asks_otherwise_than_it_trains_is_said_before_step_1(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "asks.jinja"
    template.write_text(
        tiny.TEMPLATE.replace("{% if add_generation_prompt %}<|a|>", "{% if add_generation_prompt %}<|a|>?")
    )
    assert cli.main(["train", str(recipe), "train.steps=1", "run.name=own"]) == 0
    assert "asked_otherwise" not in capsys.readouterr().out
    assert cli.main(["train", str(recipe), "train.steps=1", "run.name=asks", f"data.chat_template={template}"]) == 0
    (noted,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("noted"))
    assert "12 asked_otherwise, e.g. " in noted
    assert noted.endswith("turn 2: inference asks with '?' where training has nothing before the answer")
