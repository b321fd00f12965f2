"""Checkpoints are whole or do not exist."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist import checkpoint
from sft_dist.checkpoint import RunState
from sft_dist.config import parse_recipe
from sft_dist.errors import CheckpointError
from sft_dist.metrics import read_lines, read_steps
from sft_dist.trackers import JsonlTracker
from sft_dist.world import World

STATE = RunState(step=3, data_fingerprint="f", curve={"optim.lr": 1e-3}, engine="single", world_size=1)


class FileEngine:
    """An engine whose state is one file: commit needs no more."""

    world, device = World(), torch.device("cpu")

    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def save(self, directory: Path) -> None:
        (directory / "state.bin").write_bytes(b"x" * 1000)
        if self.fail:
            raise OSError(28, "No space left on device")


def commit(directory: Path, step: int, *, keep: int = 2, fail: bool = False) -> Path:
    return checkpoint.commit(FileEngine(fail), dataclasses.replace(STATE, step=step), directory, keep=keep)  # type: ignore[arg-type]


def test_a_committed_checkpoint_is_read_back(tmp_path: Path) -> None:
    assert checkpoint.read_state(commit(tmp_path, 3)) == STATE


def test_old_ones_go_only_after_a_newer_commit(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        commit(tmp_path, step)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000002", "step-00000003"]


def test_a_failed_write_leaves_the_one_before_it(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left.*untouched"):
        commit(tmp_path, 2, fail=True)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001"]
    commit(tmp_path, 2)
    assert not list(tmp_path.glob(".step-*")), "the next commit sweeps what a failed one left"


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    (path / "COMMITTED").unlink()
    assert checkpoint.committed(tmp_path) == []
    with pytest.raises(CheckpointError, match="not a committed checkpoint"):
        checkpoint.read_state(path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    file = path / "state.bin"
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(b"y" + b"x" * 999 if damage == "flip" else b"x" * 999)
    with pytest.raises(CheckpointError, match=r"state\.bin"):
        checkpoint.read_state(path)


def test_another_run_is_refused_key_by_key(tmp_path: Path) -> None:
    now = dataclasses.replace(STATE, curve={"optim.lr": 2e-3}, data_fingerprint="g", world_size=2)
    with pytest.raises(
        CheckpointError,
        match=r"optim\.lr: 0\.001 then, 0\.002 now; data_fingerprint: 'f' then, 'g' now; world_size: 1 then, 2 now",
    ):
        checkpoint.require_same_run(STATE, now, tmp_path)


def test_what_decides_the_draws_is_compared_key_by_key(tmp_path: Path) -> None:
    def state(train: dict[str, Any], draws: str, **data: Any) -> RunState:
        raw = {"model": {"path": "m"}, "batch": {"examples": 8}, "optim": {"lr": 1e-3}, "run": {"name": "r"}}
        recipe = parse_recipe(raw | {"data": {"train": {"path": "a.jsonl", **train}} | data}, origin="r")
        curve = checkpoint.curve_of(recipe, num_steps=9, dtype="float32", draws=draws)
        return dataclasses.replace(STATE, curve=curve)

    then = state({}, "0a")
    checkpoint.require_same_run(then, state({}, "0a", held_out_seed=4), tmp_path)  # without a share it decides nothing
    now = state({"cap": 5}, "0b", order="source", held_out_share=0.1, held_out_seed=4)
    with pytest.raises(
        CheckpointError,
        match=r"data\.train\.cap: \[None\] then, \[5\] now; data\.order: 'shuffle' then, 'source' now; "
        r"data\.held_out_share: 0\.0 then, 0\.1 now; data\.held_out_seed: None then, 4 now; draws: '0a' then, '0b' now",
    ):
        checkpoint.require_same_run(then, now, tmp_path)


def test_a_key_that_the_checkpoint_does_not_know_is_a_difference(tmp_path: Path) -> None:
    now = dataclasses.replace(STATE, curve=STATE.curve | {"data.order": "source"})
    with pytest.raises(CheckpointError, match=r"data\.order: None then, 'source' now"):
        checkpoint.require_same_run(STATE, now, tmp_path)


def test_a_torn_last_line_is_ignored_and_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"event": "step", "step": 1, "loss": 2.0}\n{"event": "step", "step": 1, "loss": 1.0}\n{"event": "st'
    )
    assert read_steps(path) == {1: {"event": "step", "step": 1, "loss": 1.0}}, "the last attempt of a step counts"
    JsonlTracker(path).close()
    assert path.read_text().endswith("}\n")
    assert len(list(read_lines(path))) == 2


def test_a_failed_write_leaves_the_only_one(tmp_path: Path) -> None:
    commit(tmp_path, 1, keep=1)
    with pytest.raises(CheckpointError, match="untouched"):
        commit(tmp_path, 2, keep=1, fail=True)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000001"]


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(tmp_path, 1)
    calls, original = 0, os.fsync

    def crash_at(limit: int) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Crash
            original(handle)

        return fsync

    for limit in range(100):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crash_at(limit))
            try:
                commit(tmp_path, 2 + limit, keep=100)
            except Crash:
                pass
            else:
                break
        assert all(checkpoint.read_state(path) for path in checkpoint.committed(tmp_path))
    assert limit >= 4, "files, manifest, COMMITTED and directories are all flushed"
