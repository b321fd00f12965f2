"""Full disks and files that cannot be deleted: what was committed stays whole, and the run ends or goes on as asked.

The run directory lies on a small file system in memory, which a file takes all space of.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_dist.run_files import CHECKPOINTS, METRICS, MODEL
from tests.faults.scene_worker import fill
from tests.faults.scenes import STEPS, Run, shared_stage
from tests.faults.table import engines, fault

SIZE_MB = 12
"""Five checkpoints, logs and a model."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own; what is mounted is unmounted whatever happens."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m,mode=755", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def leave_free(disk: Path, num_bytes: int) -> Path:
    """Take all but so many bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - num_bytes)
    return filler


def full_at(step: int, run: Run, filler: Path) -> dict[str, object]:
    return {"file": str(filler), "step": step, "tail": str(run.path / METRICS)}


def assert_whole(run: Run, *steps: int) -> None:
    assert run.committed() == run.good() == list(steps)
    left = sorted(path.name for path in (run.path / CHECKPOINTS).iterdir())
    assert left == [run.checkpoint(step).name for step in steps], "nothing half is left"


def assert_lines_whole(run: Run) -> None:
    """Each step once, none torn."""
    assert [line["step"] for line in run.lines() if line["event"] == "step" and line["attempt"] > 1] == list(
        range(9, STEPS + 1)
    )


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_disk_with_too_little_space_is_refused_before_a_byte_is_written(engine: str, small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine, at=small_disk)
    with fault("too little space for the next checkpoint", engine=run.layout) as outcome:
        filler = leave_free(small_disk, 2**20)
        refused = run.requires_refused(
            run.train(), "the checkpoint of step 10 could not be written", "step 10 needs", "MB are free; make room",
            "the checkpoints before it are untouched",
        )  # fmt: skip
        assert_whole(run, 6, 8)
        filler.unlink()
        assert run.train().code == 0
        assert run.resumed_after() == 8
        outcome.text = f"{refused} before a byte is written; with space again: {run.requires_equal(whole)}"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_run_that_may_go_on_does_so_on_a_full_disk_and_still_gives_its_model(engine: str, small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine, at=small_disk)
    with fault("too little space for any checkpoint, train.on_save_error: go_on", engine=run.layout) as outcome:
        leave_free(small_disk, 2**20)
        played = run.train("train.on_save_error=go_on")
        assert played.code == 0, str(played)
        assert played.text.count("could not be written") == 3, "steps 10, 12 and 14"
        assert_whole(run, 6, 8)
        outcome.text = f"said at each save, run went on; {run.requires_equal(whole)}"


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("engine", engines("zero2"))
def test_space_that_vanishes_while_writing_ends_the_run_and_keeps_what_there_was(
    engine: str, in_background: bool, small_disk: Path
) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine, at=small_disk)
    behind = "behind the training" if in_background else "in the loop"
    with fault(f"disk full in the middle of a save, written {behind}", engine=run.layout) as outcome:
        filler = small_disk / "filler"
        played = run.train(
            f"train.save_in_background={str(in_background).lower()}",
            effects={"fill": full_at(10, run, filler)},
        )
        refused = run.requires_refused(
            played, "the checkpoint of step 10 could not be written: rank 0: ", "No space left on device", "untouched"
        )
        assert_whole(run, 6, 8)
        filler.unlink()
        assert run.train().code == 0
        assert run.resumed_after() == 8
        outcome.text = f"{refused}, both ranks; with space again: {run.requires_equal(whole)}"


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_run_that_may_go_on_commits_again_when_there_is_space(engine: str, small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine, at=small_disk)
    with fault("disk full in the middle of a save, free two steps later, go_on", engine=run.layout) as outcome:
        filler = small_disk / "filler"
        effects = {"fill": full_at(10, run, filler), "free": {"file": str(filler), "step": 12}}
        played = run.train("train.on_save_error=go_on", effects=effects)
        assert played.code == 0, str(played)
        assert played.text.count("could not be written") == 1, str(played)
        assert_whole(run, 6, 8, 12, 14)
        assert_lines_whole(run)
        outcome.text = f"said once, committed at step 12 again, no metric lost; {run.requires_equal(whole)}"


def test_metrics_wait_for_a_disk_that_is_full_between_saves(small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2", at=small_disk)
    with fault("disk full between two saves, for one step", engine=run.layout) as outcome:
        filler = small_disk / "filler"
        effects = {"spill": full_at(11, run, filler), "free": {"file": str(filler), "step": 12}}
        played = run.train("train.save_in_background=false", effects=effects)
        assert played.code == 0, str(played)
        assert played.text.count(METRICS) == 1, "said once"
        assert_lines_whole(run)
        outcome.text = f"said once, lines written when there is space; {run.requires_equal(whole)}"


def test_a_start_on_a_full_disk_is_refused_by_name(small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2", at=small_disk)
    with fault("disk full before the start", engine=run.layout) as outcome:
        filler = small_disk / "filler"
        run.write_recipe()
        fill(filler)
        refused = run.requires_refused(run.play(), "No space left on device", str(run.path))
        filler.unlink()
        assert_whole(run, 6, 8)
        assert run.train().code == 0
        outcome.text = f"{refused}, names the file; with space again: {run.requires_equal(whole)}"


def test_a_request_to_stop_that_cannot_be_saved_does_not_say_it_was_obeyed(small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2", at=small_disk)
    with fault("asked to stop on a full disk, go_on", engine=run.layout) as outcome:
        filler = leave_free(small_disk, 2**20)
        stop = {"touch": {"file": str(run.path / "STOP"), "step": 11}}
        played = run.train("train.on_save_error=go_on", effects=stop)
        refused = run.requires_refused(
            played, "stopped on request after step 11, but its checkpoint could not be written"
        )
        assert not (run.path / "INTERRUPTED").exists()
        assert_whole(run, 6, 8)
        filler.unlink()
        (run.path / "STOP").unlink()
        assert run.train().code == 0
        outcome.text = f"{refused}: no INTERRUPTED; with space again: {run.requires_equal(whole)}"


def test_a_model_that_cannot_be_exported_is_told_and_exported_by_the_next_start(small_disk: Path) -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2", at=small_disk)
    with fault("disk full before the export", engine=run.layout) as outcome:
        filler = small_disk / "filler"
        played = run.train("train.on_save_error=go_on", effects={"fill": full_at(14, run, filler)})
        refused = run.requires_refused(played, "No space left on device")
        assert not (run.path / MODEL).exists()
        filler.unlink()
        assert run.train().code == 0
        assert run.resumed_after() == 12
        outcome.text = f"{refused}, no half model; with space again: {run.requires_equal(whole)}"


# ---------------------------------------------------------------- deleting


@contextlib.contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Nobody can change or delete it, not even root."""
    made = subprocess.run(["chattr", "+i", str(path)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"chattr does not work here: {made.stderr.strip()}")
    try:
        yield
    finally:
        renamed = path.parent.parent / f".old-{path.parent.name}" / path.name
        for place in (path, renamed, path.parent / f".old-{path.name}"):
            if place.exists():
                subprocess.run(["chattr", "-i", str(place)], check=True)


@pytest.mark.parametrize("what", ["directory", "rank-00001.safetensors"])
@pytest.mark.parametrize("engine", engines("zero2"))
def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing_and_is_said_once(engine: str, what: str) -> None:
    whole, run = shared_stage().undisturbed(engine), shared_stage().killed(engine)
    run.recipe["train"]["keep_checkpoints"] = 1
    with fault(f"an old checkpoint that cannot be deleted ({what})", engine=run.layout) as outcome:
        stuck = run.checkpoint(6) if what == "directory" else run.checkpoint(6) / what
        with immutable(stuck):
            played = run.train()
            assert played.code == 0, str(played)
            assert played.text.count("could not be deleted") == 1, str(played)
            assert "Operation not permitted" in played.text
            left = sorted(path.name for path in (run.path / CHECKPOINTS).iterdir())
            kept = "step-00000006" if what == "directory" else ".old-step-00000006"
            assert left == sorted([kept, "step-00000014"])
        outcome.text = f"said once, the others deleted; {run.requires_equal(whole)}"


def test_a_leftover_that_cannot_be_swept_does_not_stop_the_next_start() -> None:
    whole, run = shared_stage().undisturbed("zero2"), shared_stage().killed("zero2")
    with fault("a half-written checkpoint that cannot be swept", engine=run.layout) as outcome:
        leftover = run.path / CHECKPOINTS / ".step-00000009"
        leftover.mkdir()
        (leftover / "rank-00000.safetensors").write_bytes(b"half")
        with immutable(leftover / "rank-00000.safetensors"):
            assert run.train().code == 0
        outcome.text = f"left alone; {run.requires_equal(whole)}"
