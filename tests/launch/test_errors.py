"""What a user did wrong is one clear line, exit code 2, no traceback, before any process group forms."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
import yaml
from filelock import FileLock

from sft_dist import cli, package_files
from tests import tiny

GOOD_ROW = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]}


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Callable[..., Path]:
    """Writes a recipe on a small data set; keyword arguments replace whole sections."""
    tiny.write_chats(tmp_path / "train.jsonl", num_examples=40, seed=0, longest=60)

    def write(**sections: Any) -> Path:
        raw = {
            "run": {"name": "r", "dir": str(tmp_path / "runs"), "report": False},
            "model": {"path": str(tied_model)},
            "data": {"train": str(tmp_path / "train.jsonl")},
            "batch": {"examples": 8},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw | sections))
        return path

    return write


def rows(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def fails(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    """The error lines of a training command that must be refused before anything starts."""
    code = cli.main(["train", str(path), *overrides])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    assert not torch.distributed.is_initialized()
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert lines, error
    return lines


def test_unknown_key(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = fails(recipe(), capsys, "optim.weigth_decay=0.1")
    assert "recipe.yaml: unknown key 'optim.weigth_decay' (value 0.1); did you mean 'optim.weight_decay'?" in line


def test_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = fails(tmp_path / "nowhere.yaml", capsys)
    assert "nowhere.yaml: no such recipe" in line


def test_missing_data_file(recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = fails(recipe(data={"train": str(tmp_path / "none.jsonl")}), capsys)
    assert "none.jsonl" in line
    assert "no such file" in line


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"messages": [', "malformed_json"),
        (
            json.dumps({"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            "unknown_role",
        ),
        (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "no_assistant_turn"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    bad: str, reason: str, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps(GOOD_ROW)
    path = rows(tmp_path / "bad.jsonl", good, good, bad, good)
    summary, row = fails(recipe(data={"train": path}), capsys)
    assert f"1 bad rows of 4 (1 {reason})" in summary
    assert "data.bad_rows: drop" in summary
    assert f"{path}:3: " in row


def test_only_the_first_twenty_bad_rows_are_listed(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = rows(tmp_path / "bad.jsonl", json.dumps(GOOD_ROW), *["{"] * 30)
    lines = fails(recipe(data={"train": path}), capsys)
    assert len(lines) == 1 + 20 + 1
    assert "10 more" in lines[-1]


def test_pack_tokens_below_the_longest_example(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = fails(recipe(batch={"examples": 8, "pack_tokens": 20}), capsys)
    assert "batch.pack_tokens=20 is shorter than an example of" in line
    assert "train.jsonl:" in line
    assert "raise it" in line


def test_fewer_examples_a_step_than_ranks(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    (line,) = fails(recipe(batch={"examples": 3}), capsys)
    assert "batch.examples=3 is fewer examples a step than the 4 ranks" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.engine=zero7", "train.engine='zero7': input should be 'auto', 'single', 'ddp', 'zero1'"),
        ("model.attention=flash_attention", "model.attention='flash_attention' cannot run here"),
        ("model.attention=eager", "model.attention='eager': input should be"),
        ("model.path=/nowhere/model", "/nowhere/model"),
        ("train.deepspeed=/nowhere/z.json", "/nowhere/z.json: cannot be read as a DeepSpeed file"),
    ],
)
def test_what_cannot_run_here(
    override: str, message: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["train.engine=zero2"] if "deepspeed" in override else []
    (line,) = fails(recipe(), capsys, override, *engine)
    assert message in line


def test_an_engine_for_one_process_started_as_two(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    (line,) = fails(recipe(), capsys, "train.engine=single")
    assert "train.engine=single was started as 2 processes" in line


def test_a_model_with_missing_weights(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_model(tmp_path / "short")
    config = json.loads((path / "config.json").read_text())
    deeper = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (path / "config.json").write_text(json.dumps(config | deeper))
    (line,) = fails(recipe(model={"path": str(path)}), capsys)
    assert "12 weights are missing and would start at random, model.layers.2." in line


def test_a_model_without_config_or_with_broken_weights(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_model(tmp_path / "broken")
    (path / "model.safetensors").write_bytes(b"no weights")
    (line,) = fails(recipe(model={"path": str(path)}), capsys)
    assert "cannot be loaded" in line
    (path / "config.json").unlink()
    (line,) = fails(recipe(model={"path": str(path)}), capsys)
    assert "no model config" in line


def test_a_context_shorter_than_an_example(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_model(tmp_path / "small", max_position_embeddings=32)
    (line,) = fails(recipe(model={"path": str(path)}), capsys)
    assert "the model 32 positions; set data.max_tokens=32" in line


def test_a_second_job_in_a_run_directory(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs" / "r").mkdir(parents=True)
    with FileLock(tmp_path / "runs" / "r" / ".lock"):
        (line,) = fails(recipe(), capsys)
    assert "another process is training here" in line


def test_the_demo_deletes_nothing_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "recipe.yaml").write_text("mine")
    assert cli.main(["demo", "--dir", str(tmp_path)]) == 2
    assert "exists and is not a demo" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize("flag", ["--steps", "--examples"])
def test_a_demo_of_nothing_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--dir", str(tmp_path), flag, "0"])
    assert "'0' is no whole number of 1 or more" in capsys.readouterr().err


def test_a_model_whose_logits_disagree(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.write_model(tmp_path / "gemma", architecture="gemma2", hidden_activation="gelu_pytorch_tanh")
    (line,) = fails(recipe(model={"path": str(path)}), capsys)
    assert "Gemma2ForCausalLM computes a packed loss of" in line
    assert "this model is not supported" in line
    assert not list((tmp_path / "runs" / "r").glob("metrics.jsonl")), "refused before step 1"


def test_an_error_of_all_ranks_is_said_once(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Two real processes: both refuse, one speaks, neither shows a traceback."""
    recipe_path = recipe()
    root = Path(__file__).parents[2]
    environ = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(tiny.free_port()),
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "sft_dist", "train", str(recipe_path), "loss=mean"]
    ranks = [
        subprocess.Popen(
            command,
            env=environ | {"RANK": r, "LOCAL_RANK": r},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in "01"
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said[0].count("loss='mean'") == 1
    assert said[1] == ""


def test_a_bad_row_under_a_launcher_is_said_once(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """accelerate and two ranks: one of them reads the data and says what is wrong; the launcher ends the other."""
    path = rows(tmp_path / "bad.jsonl", json.dumps(GOOD_ROW), "{")
    config = str(package_files.find("accelerate/cpu-2.yaml"))
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [
        accelerate,
        "launch",
        "--config_file",
        config,
        "-m",
        "sft_dist",
        "train",
        str(recipe(data={"train": path})),
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, "the launcher's code: it does not pass a rank's own on"
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2
    assert f"{path}:2: " in said[1]
    assert "sft_dist/" not in result.stderr, "no traceback of ours"
