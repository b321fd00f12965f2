"""What a resumed run says, refuses and goes on from: the whole command, in this process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sft_dist import cli, commits, train
from sft_dist.job import Job
from sft_dist.metrics import read_lines, read_steps
from tests import tiny


@pytest.fixture
def recipe(tmp_path: Path, tied_model: Path) -> Callable[..., Path]:
    def write(name: str = "r", **train: object) -> Path:
        often = {"steps": 6, "save_every": 2, "keep_checkpoints": 9} | train
        return tiny.write_recipe(tmp_path, tied_model, name=name, optim={"schedule": "constant"}, train=often)

    return write


def directory(recipe_path: Path) -> Path:
    section = yaml.safe_load(recipe_path.read_text())["run"]
    return Path(section["dir"]) / section["name"]


def names(recipe_path: Path) -> list[str]:
    return sorted(path.name for path in (directory(recipe_path) / "checkpoints").iterdir())


def losses(recipe_path: Path) -> dict[int, float]:
    return {step: line["loss"] for step, line in read_steps(directory(recipe_path) / "metrics.jsonl").items()}


def test_a_newest_one_without_its_mark_is_named_and_passed_over(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    before = losses(path)
    (directory(path) / "checkpoints" / "step-00000006" / "COMMITTED").unlink()
    assert cli.main(["checkpoints", str(directory(path))]) == 1
    capsys.readouterr()
    assert cli.main(["train", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "resumed after step 4" in said
    assert "step-00000006: not a committed checkpoint: COMMITTED is missing" in said
    assert "aside-step-00000006" in names(path)
    assert losses(path) == before
    assert cli.main(["checkpoints", str(directory(path))]) == 0


def test_one_that_has_vanished_is_missed(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    (directory(path) / "checkpoints" / "step-00000006").rename(path.parent / "lost")
    assert cli.main(["train", str(path)]) == 0
    assert "step 6 was committed, and is not here any more" in " ".join(capsys.readouterr().out.split())


def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    (directory(path) / "checkpoints").rename(path.parent / "lost")
    for flags in ([], ["--resume-from", "latest"], ["--resume-from", "4"]):
        assert cli.main(["train", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl says that step 6 was committed") == 2
    assert "--resume-from 4: there is no" in said


def test_a_begun_run_is_known_by_any_trace_of_it(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    run = directory(path)
    assert cli.main(["train", str(path), "--resume-from", "latest"]) == 2
    assert "leave it out to start at step 1" in capsys.readouterr().err
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path)]) == 0
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints").rename(path.parent / "lost")
    (run / "checkpoints").mkdir()
    traces = {
        "run.json says that it went on after step 6": run / "run.json",
        "aside-step-00000006 was set aside": run / "checkpoints" / "aside-step-00000006",
        "a finished model is in": run / "model",
    }
    (run / "checkpoints" / "aside-step-00000006").mkdir()
    for said, trace in traces.items():
        assert cli.main(["train", str(path)]) == 2
        assert said in capsys.readouterr().err
        trace.rename(path.parent / f"lost-{trace.name}")
    assert cli.main(["train", str(path)]) == 0


def test_a_run_that_was_moved_goes_on_from_its_own_checkpoint(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe()
    assert cli.main(["train", str(path), "train.steps=4"]) == 0

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop", crash)
        with pytest.raises(RuntimeError, match="crash"):
            cli.main(["train", str(path), "--allow-change"])
    moved = path.parent / "moved" / "r"
    moved.parent.mkdir()
    directory(path).rename(moved)
    path.parent.joinpath("linked").symlink_to(moved.parent)
    for place in ("moved", "linked"):
        assert cli.main(["train", str(path), f"run.dir={path.parent}/{place}", "--allow-change"]) == 0


def test_a_run_is_not_cut_behind_its_checkpoint(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(path), "train.steps=5", "--allow-change"]) == 2
    assert "stands after step 6, and the recipe ends at step 5; raise train.steps" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"starts": 3}', '{"starts": [{}]}', '{"starts": [{"after_step": "2"}]}'])
def test_a_damaged_record_of_starts_is_named(
    text: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    directory(path).mkdir(parents=True)
    (directory(path) / "run.json").write_text(text)
    assert cli.main(["train", str(path)]) == 2
    assert "run.json: is not the record of a run's starts any more" in capsys.readouterr().err


def test_lost_metrics_are_missed(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    (directory(path) / "metrics.jsonl").unlink()
    assert cli.main(["train", str(path)]) == 0
    assert "metrics.jsonl is gone" in " ".join(capsys.readouterr().out.split())


def test_a_job_that_is_started_again_with_the_same_words_does_not_go_back_again(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path), "--resume-from", "2"]) == 0
    assert cli.main(["train", str(path), "--resume-from", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("resumed after step 2") == 1
    assert said.count("resumed after step 6") == 1


def test_a_run_that_went_on_from_another_and_saved_nothing_does_not_start_at_step_1(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = recipe("first"), recipe("second")
    assert cli.main(["train", str(first)]) == 0
    start = str(directory(first) / "checkpoints" / "step-00000002")

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop", crash)
        with pytest.raises(RuntimeError, match="crash"):
            cli.main(["train", str(second), "--resume-from", start])
    assert cli.main(["train", str(second)]) == 2
    assert f"give --resume-from {start} again" in capsys.readouterr().err
    assert cli.main(["train", str(second), "--resume-from", start]) == 0
    assert losses(second) == {step: loss for step, loss in losses(first).items() if step > 2}


def test_what_another_job_saved_meanwhile_is_not_trained_over(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks of a launcher that died are still saving while the next job looks for checkpoints."""
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    newest = directory(path) / "checkpoints" / "step-00000006"
    newest.rename(path.parent / "late")
    check = Job.require_same_checkpoints

    def appear_and_check(job: Job) -> None:
        (path.parent / "late").rename(newest)
        check(job)

    monkeypatch.setattr(Job, "require_same_checkpoints", appear_and_check)
    assert cli.main(["train", str(path)]) == 2
    assert "another job saved here while this one was starting" in capsys.readouterr().err
    assert newest.is_dir()


def test_other_settings_are_refused_and_when_allowed_begin_a_new_curve(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path), "train.steps=4"]) == 0
    capsys.readouterr()
    assert cli.main(["train", str(path), "optim.lr=2e-3"]) == 2
    said = capsys.readouterr().err
    assert "optim.lr: 0.001 then, 0.002 now" in said
    assert "train.steps: 4 then, 6 now" in said
    assert cli.main(["train", str(path), "optim.lr=2e-3", "--allow-change"]) == 0
    lines = list(read_lines(directory(path) / "metrics.jsonl"))
    (change,) = [line for line in lines if line["event"] == "change"]
    assert (change["step"], len(change["changed"])) == (4, 2)
    assert {step["lr"] for step in lines if step["event"] == "step"} == {1e-3, 2e-3}
    starts = json.loads((directory(path) / "run.json").read_text())["starts"]
    assert starts[0]["curve"] != starts[1]["curve"]
    assert starts[1]["after_step"] == 4


def test_another_model_config_is_another_curve(
    recipe: Callable[..., Path], tmp_path: Path, tied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    tiny.write_model(tmp_path / "other", rms_norm_eps=1e-3)
    assert cli.main(["train", str(path), f"model.path={tmp_path / 'other'}"]) == 2
    assert "model's config: " in capsys.readouterr().err
    tiny.write_model(tmp_path / "moved")
    assert cli.main(["train", str(path), f"model.path={tmp_path / 'moved'}"]) == 0


def test_a_stop_file_that_came_too_late_stops_no_later_run(recipe: Callable[..., Path]) -> None:
    path = recipe()
    directory(path).mkdir(parents=True)
    (directory(path) / "STOP").touch()
    assert cli.main(["train", str(path), "train.steps=1"]) == 0
    assert not (directory(path) / "STOP").exists()
    assert not (directory(path) / "INTERRUPTED").exists()


def test_a_reader_that_goes_away_does_not_end_the_run(recipe: Callable[..., Path]) -> None:
    """`sft-dist train recipe.yaml | head -2`"""
    path = recipe("piped", steps=30)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "train", str(path)],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=90) == 0
    assert len(losses(path)) == 30


def test_a_manifest_that_names_a_file_elsewhere_is_refused(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe()
    assert cli.main(["train", str(path)]) == 0
    newest = directory(path) / "checkpoints" / "step-00000006"
    inside = newest / "rank-00000.safetensors"
    inside.rename(newest.parent / "elsewhere.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["../elsewhere.safetensors"] = manifest["files"].pop(inside.name)
    text = json.dumps(manifest)
    (newest / "manifest.json").write_text(text)
    (newest / "COMMITTED").write_text(commits.xxhash.xxh3_128_hexdigest(text.encode()))
    assert cli.main(["train", str(path), "--resume-from", "6"]) == 2
    assert "names '../elsewhere.safetensors', a file outside of the checkpoint" in capsys.readouterr().err
