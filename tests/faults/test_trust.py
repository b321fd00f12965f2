"""What is foreign is not believed, not executed, and cannot lead outside of the run directory."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from sft_dist.run_files import CHECKPOINTS, CONFIG, HEARTBEATS, LOGS, RUN_JSON
from tests.faults.scenes import Played, Run, reseal, shared_stage
from tests.faults.table import engines, fault

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def payload(marker: Path) -> bytes:
    return pickle.dumps(Payload(f"touch {marker}"))


def test_the_payload_of_these_tests_would_go_off(tmp_path: Path) -> None:
    pickle.loads(payload(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_pickle_beside_the_checkpoint_is_never_executed(engine: str, tmp_path: Path) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine)
    names = ("mp_rank_00_model_states.pt", "optimizer.pt", "rank-00002.safetensors", "zero_pp_rank_0_optim_states.pt")
    with fault("pickles planted beside a checkpoint's files", engine=run.layout) as outcome:
        for name in names:
            (run.checkpoint(8) / name).write_bytes(payload(tmp_path / "marker"))
        played = run.train()
        assert played.code == 0, str(played)
        assert run.resumed_after() == 8
        assert not (tmp_path / "marker").exists()
        outcome.text = f"never opened; {run.requires_equal(whole)}"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_pickle_in_the_place_of_a_ranks_file_is_refused_unexecuted(engine: str, tmp_path: Path) -> None:
    run = shared_stage().killed(engine)
    with fault("a rank's file replaced by a pickle, manifest rewritten to match", engine=run.layout) as outcome:
        name = "rank-00000.safetensors"
        (run.checkpoint(8) / name).write_bytes(payload(tmp_path / "marker"))
        reseal(run.checkpoint(8), name)
        refused = run.requires_refused(run.train("--trust-checkpoint"), "step-00000008", "cannot be read")
        assert not (tmp_path / "marker").exists()
        outcome.text = f"{refused}, not executed, even with --trust-checkpoint"


@needs_root
@pytest.mark.parametrize("what", ["directory", "rank-00001.safetensors", "COMMITTED"])
def test_a_checkpoint_that_another_user_owns_is_refused_unless_it_is_trusted(what: str) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault(f"checkpoint of another user ({what})", engine=run.layout) as outcome:
        owned = run.checkpoint(8) if what == "directory" else run.checkpoint(8) / what
        os.chown(owned, 4242, -1)
        said = f"{owned}: belongs to another user (uid 4242)"
        refused = run.requires_refused(run.train(), said, "--trust-checkpoint")
        assert run.train("--trust-checkpoint").code == 0
        assert run.resumed_after() == 8
        outcome.text = f"{refused}; with --trust-checkpoint: {run.requires_equal(whole)}"


@pytest.mark.parametrize("what", ["directory", "run_state.json"])
def test_a_checkpoint_that_everybody_may_write_is_refused_unless_it_is_trusted(what: str) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault(f"checkpoint that everybody may write ({what})", engine=run.layout) as outcome:
        writable = run.checkpoint(8) if what == "directory" else run.checkpoint(8) / what
        writable.chmod(writable.stat().st_mode | 0o002)
        refused = run.requires_refused(run.train(), f"{writable}: everybody may write it", "--trust-checkpoint")
        assert run.train("--trust-checkpoint").code == 0
        outcome.text = f"{refused}; with --trust-checkpoint: {run.requires_equal(whole)}"


@pytest.mark.parametrize("name", ["../x", "/abs", "a/../../b", "a/b", "..", ".", "", "~/x", "-rf", "x\n../y", "a\0b"])
def test_a_run_name_that_leads_out_of_the_run_directory_is_refused(name: str) -> None:
    run = shared_stage().run("zero2", at=shared_stage().directory / "names")
    run.recipe["run"]["name"] = name
    before = tree(shared_stage().directory)
    with fault(f"run.name {name!r}", engine=run.layout) as outcome:
        refused = run.requires_refused(run.train(), "run.name")
        assert tree(shared_stage().directory) - before <= {run.path.parent / f"{run.path.name}.yaml"}
        outcome.text = f"{refused}, nothing written"


def tree(directory: Path) -> set[Path]:
    """All that is there, beside what the ranks of these tests talk through."""
    return {path for path in directory.rglob("*") if "ranks" not in path.relative_to(directory).parts}


SECRET = "hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4"


def test_a_secret_in_the_recipe_is_in_nothing_that_is_written(tmp_path: Path) -> None:
    """Paths that work, for a directory may have any name; then one that does not."""
    stage = shared_stage()
    run = stage.run("ddp", steps=2)
    place = tmp_path / f"https:/user:{SECRET}@host"
    place.mkdir(parents=True)
    with fault("a token in model.path and data.train", engine=run.layout) as outcome:
        shutil.copytree(stage.model, place / "model")
        shutil.copy(run.recipe["data"]["train"], place / "train.jsonl")
        run.recipe["model"]["path"] = str(place / "model")
        run.recipe["data"] |= {"train": str(place / "train.jsonl"), "store": str(tmp_path / "stores")}
        played = run.train()
        assert played.code == 0, str(played)
        written = {file.relative_to(run.path) for file in run.path.rglob("*") if file.is_file()}
        assert {Path(CONFIG), Path(RUN_JSON)} < written
        assert {file.parts[0] for file in written} >= {LOGS, CHECKPOINTS, HEARTBEATS}
        assert_untold(run, played)
        assert run.recipe["model"]["path"].replace(SECRET, "***") in (run.path / CONFIG).read_text()

        again = stage.run("ddp", steps=2)
        again.recipe |= {"model": run.recipe["model"], "data": run.recipe["data"]}
        (place / "model" / "model.safetensors").unlink()
        played = again.train()
        again.requires_refused(played, "model.path", "***")
        assert_untold(again, played)
        outcome.text = "files of the run, heartbeats and logs included, the screen and errors hold *** in its place"


def assert_untold(run: Run, played: Played) -> None:
    assert [file for file in run.path.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in str(played)


def test_remote_code_needs_a_pinned_revision() -> None:
    run = shared_stage().run("zero2")
    with fault("model.trust_remote_code without a revision", engine=run.layout) as outcome:
        refused = run.requires_refused(run.train("model.trust_remote_code=true"), "model.revision")
        assert not run.path.exists()
        outcome.text = f"{refused} before anything is read"


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    stage = shared_stage()
    run = stage.run("ddp", steps=2)
    with fault("a model directory that brings its own code", engine=run.layout) as outcome:
        model = tmp_path / "model"
        shutil.copytree(stage.model, model)
        config = json.loads((model / "config.json").read_text())
        own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
        (model / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "auto_map": own}))
        (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'marker')!r}).touch()\n")
        run.recipe["model"]["path"] = str(model)
        refused = run.requires_refused(run.train(), "model.path")
        assert not (tmp_path / "marker").exists()
        outcome.text = f"{refused}, not run"
