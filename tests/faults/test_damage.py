"""Damaged files: the newest checkpoint that is whole is gone on from, and never less than that in silence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from sft_dist.run_files import CHECKPOINTS
from tests.faults.scenes import EPOCH, STEPS, reseal, shared_stage
from tests.faults.table import engines, fault

RANK_FILE, STATE, MANIFEST, MARK = "rank-00001.safetensors", "run_state.json", "manifest.json", "COMMITTED"


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    os.truncate(file, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "one bit flipped": flip,
    "empty": empty,
    "missing": Path.unlink,
}
FULL = os.environ.get("FAULTS") == "full"
# Half of them on each of two engines is quick; all of them on every engine takes minutes.
DAMAGED = [(file, how) for file in (RANK_FILE, STATE, MANIFEST) for how in DAMAGES] + [
    (MARK, "empty"),
    (MARK, "missing"),
]
CASES = [
    (file, how, engine)
    for index, (file, how) in enumerate(DAMAGED)
    for engine in (engines() if FULL else (("zero2", "ddp")[index % 2],))
]


@pytest.mark.parametrize(("file", "how", "engine"), CASES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_gone_on_from(
    file: str, how: str, engine: str
) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine)
    with fault(f"newest checkpoint: {file} {how}", engine=run.layout) as outcome:
        DAMAGES[how](run.checkpoint(8) / file)
        played = run.train()
        assert played.code == 0, str(played)
        assert f"broken: {run.checkpoint(8)}" in played.text, str(played)
        assert file in played.text
        assert run.resumed_after() == 6
        assert (run.path / CHECKPOINTS / "aside-step-00000008").is_dir(), "kept for whoever wants to look"
        equal = run.requires_equal(whole)
        outcome.text = f"named and set aside, went on after step 6; {equal}"


@pytest.mark.parametrize("engine", engines("zero2"))
@pytest.mark.parametrize("asked", ["8", "path"])
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(asked: str, engine: str) -> None:
    run = shared_stage().killed(engine)
    with fault(f"--resume-from {asked}, and a bit of it flipped", engine=run.layout) as outcome:
        flip(run.checkpoint(8) / RANK_FILE)
        where = str(run.checkpoint(8)) if asked == "path" else asked
        refused = run.requires_refused(
            run.train("--resume-from", where), RANK_FILE, "Leave --resume-from out to take the newest good one"
        )
        assert run.committed() == [6, 8], "nothing is set aside"
        outcome.text = f"{refused}, names the file; nothing is set aside"


def test_the_latest_is_the_newest_that_is_whole() -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault("--resume-from latest, and a bit of the newest flipped", engine=run.layout) as outcome:
        flip(run.checkpoint(8) / RANK_FILE)
        played = run.train("--resume-from", "latest")
        assert played.code == 0, str(played)
        assert f"broken: {run.checkpoint(8) / RANK_FILE}" in played.text
        assert run.resumed_after() == 6
        outcome.text = f"named and set aside, went on after step 6; {run.requires_equal(whole)}"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_when_every_checkpoint_is_damaged_the_run_does_not_start_at_step_1(engine: str) -> None:
    run = shared_stage().killed(engine)
    with fault("every checkpoint damaged", engine=run.layout) as outcome:
        truncate(run.checkpoint(8) / RANK_FILE)
        (run.checkpoint(6) / STATE).unlink()
        refused = run.requires_refused(
            run.train(), f"step-00000008/{RANK_FILE}", f"step-00000006/{STATE}", "begin again under another run.name"
        )
        assert run.committed() == [6, 8]
        outcome.text = f"{refused}, names what is wrong with each"


@pytest.mark.parametrize("how", ["the directory is gone", "it is empty", "no COMMITTED is left"])
def test_when_the_checkpoints_are_gone_the_run_does_not_start_at_step_1(how: str) -> None:
    run = shared_stage().killed("zero2")
    with fault(f"checkpoints lost: {how}", engine=run.layout) as outcome:
        checkpoints = run.path / CHECKPOINTS
        if how == "no COMMITTED is left":
            for mark in checkpoints.glob(f"*/{MARK}"):
                mark.unlink()
        else:
            shutil.rmtree(checkpoints)
            if how == "it is empty":
                checkpoints.mkdir()
        lost = "no checkpoint is here, but metrics.jsonl says that step 8 was committed"
        said = "COMMITTED is missing" if how == "no COMMITTED is left" else lost
        refused = run.requires_refused(run.train(), said)
        run.requires_refused(run.train("--resume-from", "latest"), said)
        run.requires_refused(run.train("--resume-from", "8"), "step-00000008")
        outcome.text = f"{refused}, says what is missing"


def test_no_pointer_is_followed() -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault("bogus `latest` files planted", engine=run.layout) as outcome:
        for place in (run.path, run.path / CHECKPOINTS):
            (place / "latest").write_text("step-00000006")
        (run.path / CHECKPOINTS / "step-99999999").mkdir()
        (run.path / CHECKPOINTS / "step-last").symlink_to("step-00000006")
        assert run.train("--resume-from", "latest").code == 0
        assert run.resumed_after() == 8
        outcome.text = f"ignored, went on after step 8; {run.requires_equal(whole)}"


# ---------------------------------------------------------------- believed, and yet not enough


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq", "master"])
@pytest.mark.parametrize("engine", engines("zero3"))
def test_a_checkpoint_that_lacks_optimizer_state_is_refused(kind: str, engine: str) -> None:
    """Its manifest vouches for it: only what is inside tells."""
    run = shared_stage().killed(engine)
    with fault(f"{kind} of one weight left out, manifest rewritten to match", engine=run.layout) as outcome:
        stored = safetensors.torch.load_file(run.checkpoint(8) / RANK_FILE)
        lost = next(key for key in sorted(stored) if key.startswith(f"{kind}/"))
        del stored[lost]
        safetensors.torch.save_file(stored, run.checkpoint(8) / RANK_FILE)
        reseal(run.checkpoint(8), RANK_FILE)
        refused = run.requires_refused(run.train(), f"{kind} of {lost.split('/', 2)[2]}: elements", "are in no file")
        assert run.committed() == [6, 8]
        outcome.text = f"{refused}, names weight and elements: no fresh moments"


def test_a_checkpoint_that_lacks_a_ranks_file_is_refused() -> None:
    run = shared_stage().killed("zero2")
    with fault("a rank's file left out, manifest rewritten to match", engine=run.layout) as outcome:
        (run.checkpoint(8) / RANK_FILE).unlink()
        reseal(run.checkpoint(8), RANK_FILE)
        refused = run.requires_refused(run.train(), "are in no file of the checkpoint")
        outcome.text = f"{refused}, names weight and elements"


@pytest.mark.parametrize("key", ["step", "num_updates", "segments"])
def test_a_state_that_lacks_its_position_is_not_gone_on_from(key: str) -> None:
    run = shared_stage().killed("zero2")
    with fault(f"{key} left out of run_state.json, manifest rewritten to match", engine=run.layout) as outcome:
        state = json.loads((run.checkpoint(8) / STATE).read_text())
        del state[key]
        (run.checkpoint(8) / STATE).write_text(json.dumps(state))
        reseal(run.checkpoint(8), STATE)
        refused = run.requires_refused(run.train("--resume-from", "8"), "is no state of this version", key)
        outcome.text = f"{refused}, names what is missing"


def test_a_checkpoint_of_another_model_is_refused() -> None:
    run = shared_stage().killed("zero2")
    with fault("a weight of another shape in shapes.json, manifest rewritten", engine=run.layout) as outcome:
        shapes = json.loads((run.checkpoint(8) / "shapes.json").read_text())
        name = sorted(shapes)[0]
        shapes[name] = [shapes[name][0] + 1, *shapes[name][1:]]
        (run.checkpoint(8) / "shapes.json").write_text(json.dumps(shapes))
        reseal(run.checkpoint(8), "shapes.json")
        outcome.text = f"{run.requires_refused(run.train(), name)}, names the weight"


# ---------------------------------------------------------------- undamaged


WHERE = {2: "mid-epoch 1", 4: "one step before the end of epoch 1", 6: "one step into epoch 2",
         8: "mid-epoch 2", 10: "at the end of epoch 2"}  # fmt: skip


@pytest.mark.parametrize("step", WHERE)
@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_run_goes_on_bit_for_bit_from_anywhere_in_an_epoch(engine: str, step: int) -> None:
    """Every step but the epoch's last accumulates over micro-batches of each rank."""
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine, last=step)
    epochs, examples = whole.column("epoch"), whole.column("examples")
    assert [epochs[n] for n in (EPOCH, EPOCH + 1, STEPS)] == [0, 1, 2]
    assert (examples[EPOCH - 1], examples[EPOCH]) == (12, 2)
    with fault(f"killed after step {step}: {WHERE[step]}, accumulating", engine=run.layout) as outcome:
        assert run.train().code == 0
        assert run.resumed_after() == step
        outcome.text = f"went on after step {step}; {run.requires_equal(whole)}"


def test_going_back_to_a_named_step_sets_newer_ones_aside() -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2", keep=3)
    with fault("--resume-from an older step", engine=run.layout) as outcome:
        played = run.train("--resume-from", "4")
        assert played.code == 0, str(played)
        assert run.resumed_after() == 4
        aside = sorted(path.name for path in (run.path / CHECKPOINTS).glob("aside-*"))
        assert aside == ["aside-step-00000006", "aside-step-00000008"]
        assert "was trained before" not in played.text, "the replayed steps are the same"
        outcome.text = f"newer ones set aside; {run.requires_equal(whole)}"
