"""A finished run's model, measured; a model fetched for machines without a network."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_dist import cli
from sft_dist.metrics import read_lines
from tests import tiny
from tests.unit import hub_server

ROOT = Path(__file__).parents[2]


def write_recipe(directory: Path, model: Path | str, **data: Any) -> Path:
    return tiny.write_recipe(directory, model, num_examples=12, data=data, batch={"examples": 4}, optim={"lr": 1e-2})


@pytest.mark.parametrize("held_out", [{"held_out_share": 0.5}, {"held_out": "{}/other.jsonl"}])
def test_a_finished_model_has_the_loss_that_the_run_ended_with(
    held_out: dict[str, Any], tmp_path: Path, tied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_chats(tmp_path / "other.jsonl", num_examples=5, seed=1, longest=30)
    held_out = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in held_out.items()}
    recipe = write_recipe(tmp_path, tied_model, **held_out)
    assert cli.main(["evaluate", str(recipe)]) == 2
    assert "exports its model when its last step is done" in capsys.readouterr().err
    assert cli.main(["train", str(recipe)]) == 0
    measured = [line for line in read_lines(tmp_path / "runs" / "r" / "metrics.jsonl") if line["event"] == "held_out"]
    capsys.readouterr()
    report = tmp_path / "runs" / "r" / "report.html"
    assert not report.exists()
    assert cli.main(["evaluate", str(recipe), "run.report=true"]) == 0
    assert '<section id="evaluation"' in report.read_text(), "the report is written again, with what was found"
    found = json.loads((tmp_path / "runs" / "r" / "evaluation.json").read_text())
    assert found["example_mean"] == pytest.approx(measured[-1]["held_out_loss"], rel=1e-6)
    assert found["example_mean"] < measured[0]["held_out_loss"], "measured on the trained weights"
    assert (found["examples"], found["response_tokens"]) == (measured[-1]["examples"], measured[-1]["response_tokens"])
    assert found["perplexity"] == pytest.approx(math.exp(found["token_mean"]))
    assert f"perplexity {found['perplexity']:,.2f}" in capsys.readouterr().out


def test_evaluate_needs_held_out_data(tmp_path: Path, tied_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tied_model)
    (tmp_path / "runs" / "r" / "model").mkdir(parents=True)
    assert cli.main(["evaluate", str(recipe)]) == 2
    assert "nothing is held out: set data.held_out" in capsys.readouterr().err


def test_a_fetched_model_trains_without_a_network(tmp_path: Path, tied_model: Path) -> None:
    """prepare --with-model downloads once; training then asks nobody."""
    files = {path.name: path.read_bytes() for path in tied_model.iterdir()} | {"pytorch_model.bin": b"not needed"}
    files["README.md"] = b"---\nlicense: apache-2.0\n---\nA tiny model."
    recipe = write_recipe(tmp_path, "org/tiny")
    with hub_server.serve({"models/org/tiny": {"main": files}}) as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
            environment.pop(name, None)
        out = sft_dist(environment, "prepare", str(recipe), "--with-model")
        assert "model: " in out
        fetched = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched
        assert "pytorch_model.bin" not in fetched
        num_requests = len(hub.requests)
        out = sft_dist(environment | {"HF_HUB_OFFLINE": "1"}, "train", str(recipe))
        assert "done: step 3" in out
        assert len(hub.requests) == num_requests
    card = (tmp_path / "runs" / "r" / "model" / "README.md").read_text()
    assert "base_model: org/tiny\nbase_model_relation: finetune\nlicense: apache-2.0\n" in card


def test_a_model_without_safetensors_is_not_fetched(
    tmp_path: Path, tied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tied_model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    recipe = write_recipe(tmp_path, bare)
    assert cli.main(["prepare", str(recipe), "--with-model"]) == 2
    assert f"{bare}: no *.safetensors" in capsys.readouterr().err


def sft_dist(environment: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "sft_dist", *words]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout
