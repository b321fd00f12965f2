"""Saving beside the training, going on from what is good, and refusing what would change the curve."""

import dataclasses
import errno
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sft_dist import checkpoint, commits
from sft_dist.checkpoint import Saver, changes_since, continued, curve_of, find_good, first_state, restore
from sft_dist.commits import RunState, Segment
from sft_dist.config import TrainSection, parse_recipe
from sft_dist.engine.fragments import KINDS, Fragment
from sft_dist.errors import CheckpointError, SftDistError
from sft_dist.world import World

STATE = RunState(
    step=3,
    num_updates=3,
    curve={"optim.lr": 1e-3},
    segments=(Segment(0, "f", "d"),),
    layout={"processes": 1, "train.engine": "single"},
    code={"sft_dist": "1"},
)


class TensorEngine:
    """An engine whose state is tensors that nobody trains: a save and a restore need no more."""

    world, device, is_replicated = World(), torch.device("cpu"), True

    def __init__(self, value: float = 0.0, **sizes: int) -> None:
        sizes = sizes or {"a": 5, "b": 3}
        self.model = SimpleNamespace(causal_lm=nn.Module())
        self.tensors = {}
        for name, size in sizes.items():
            self.model.causal_lm.register_parameter(name, nn.Parameter(torch.zeros(size)))
            self.tensors[name] = {kind: torch.full((size,), value + index) for index, kind in enumerate(KINDS)}
        self.num_updates: int | None = None

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, tensors) for name, tensors in self.tensors.items()]

    def restored(self, num_updates: int) -> None:
        self.num_updates = num_updates


def saver(engine: TensorEngine, directory: Path, **settings: Any) -> Saver:
    return Saver(engine, directory, settings=TrainSection(**settings))  # type: ignore[arg-type]


def save(directory: Path, step: int, *, value: float = 0.0, **settings: Any) -> None:
    made = saver(TensorEngine(value), directory, **settings)
    made.start(dataclasses.replace(STATE, step=step, num_updates=step))
    assert made.finish() is not None


def steps_in(directory: Path) -> list[int]:
    return [commits.step_of(path) for path in commits.committed(directory)]


def candidates(directory: Path) -> list[Path]:
    return commits.committed(directory)[::-1]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- save


@pytest.mark.parametrize("in_background", [True, False])
def test_what_was_saved_is_restored(tmp_path: Path, in_background: bool) -> None:
    engine = TensorEngine(7.0)
    made = saver(engine, tmp_path, save_in_background=in_background)
    made.start(STATE)
    for tensors in engine.tensors.values():
        if in_background:
            tensors["master"].add_(1)  # training goes on while it is written
    commit = made.finish()
    assert commit is not None
    assert (commit.step, made.last_step) == (3, 3)
    assert 0 <= commit.stall_s <= commit.seconds
    (path,) = candidates(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == [
        "COMMITTED", "manifest.json", "rank-00000.safetensors", "run_state.json", "shapes.json",
    ]  # fmt: skip
    written = ("rank-00000.safetensors", "run_state.json", "shapes.json")
    assert commit.size_bytes == sum((path / name).stat().st_size for name in written)
    fresh = TensorEngine()
    restore(fresh, path, commits.read_state(path))  # type: ignore[arg-type]
    assert fresh.num_updates == 3
    for name, tensors in fresh.tensors.items():
        expected = TensorEngine(7.0).tensors[name]
        assert all(tensors[kind].equal(expected[kind]) for kind in KINDS), name


def test_a_save_is_committed_by_the_step_that_finds_all_ranks_done(tmp_path: Path) -> None:
    made = saver(TensorEngine(), tmp_path)
    assert made.flags() == [0.0, 0.0]
    assert made.settle(0.0, 0.0) is None
    made.start(STATE)
    assert made.settle(0.0, 0.0) is None, "a rank still writes"
    thread = made._pending and made._pending.thread
    assert thread is not None
    thread.join()
    assert made.flags() == [1.0, 0.0]
    assert steps_in(tmp_path) == [], "written, and not committed"
    commit = made.settle(1.0, 0.0)
    assert commit is not None
    assert steps_in(tmp_path) == [commit.step] == [3]
    assert made.flags() == [0.0, 0.0]
    assert made.finish() is None


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, original, order = threading.Event(), checkpoint.write_fragments, []

    def slowly(fragments: Any, file: Path) -> None:
        assert may_write.wait(30)
        original(fragments, file)
        order.append(file.parent.name)

    monkeypatch.setattr(checkpoint, "write_fragments", slowly)
    made = saver(TensorEngine(), tmp_path)
    assert made.start(STATE) is None
    assert made.flags() == [0.0, 0.0]
    threading.Timer(0.2, may_write.set).start()
    first = made.start(dataclasses.replace(STATE, step=4))
    assert first is not None
    assert first.step == 3
    assert first.stall_s >= 0.1, "the wait is told"
    second = made.finish()
    assert second is not None
    assert steps_in(tmp_path) == [3, 4]
    assert order == [".step-00000003", ".step-00000004"]


@pytest.mark.parametrize("where", ["write_fragments", "commits.make_room", "commits.flush", "commits.commit"])
@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_fails_anywhere_ends_the_run_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, in_background: bool
) -> None:
    save(tmp_path, 1, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        patch.setattr(f"sft_dist.checkpoint.{where}", full_disk)
        said = r"step 2 could not be written: rank 0: .*No space left.*untouched"
        with pytest.raises(CheckpointError, match=said):
            save(tmp_path, 2, keep_checkpoints=1, save_in_background=in_background)
    assert steps_in(tmp_path) == [1]
    commits.verify(candidates(tmp_path)[0])
    save(tmp_path, 2, keep_checkpoints=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"], "nothing half is left"


@pytest.mark.parametrize("where", ["write_fragments", "commits.make_room", "commits.flush", "commits.commit"])
def test_a_run_that_may_go_on_says_so_and_saves_again_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    made = saver(TensorEngine(), tmp_path, on_save_error="go_on")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(f"sft_dist.checkpoint.{where}", full_disk)
        made.start(STATE)
        assert made.finish() is None
    (record,) = caplog.records
    assert "step 3 could not be written" in record.getMessage()
    assert record.getMessage().endswith("the run goes on (train.on_save_error: go_on)")
    assert (steps_in(tmp_path), made.last_step) == ([], None)
    made.start(dataclasses.replace(STATE, step=4))
    assert made.finish() is not None
    assert steps_in(tmp_path) == [4]


def test_a_failed_save_does_not_hold_the_space_that_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saver(TensorEngine(), tmp_path, on_save_error="go_on")
    monkeypatch.setattr(commits, "flush", full_disk)
    made.start(STATE)
    made.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", ["stop", "go_on"])
@pytest.mark.parametrize("moment", ["start", "settle"])
def test_a_rank_that_only_hears_of_a_failure_does_as_the_one_that_met_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, moment: str
) -> None:
    """Else one would leave the run and the other train on."""

    def elsewhere(*_: Any, **__: Any) -> None:
        raise SftDistError("rank 0 failed; its message says why")

    made = saver(TensorEngine(), tmp_path, on_save_error=policy)
    if moment == "settle":
        made.start(STATE)
    monkeypatch.setattr(checkpoint, "on_main", elsewhere)
    if policy == "go_on":
        if moment == "start":
            made.start(STATE)
        assert made.finish() is None
    else:
        with pytest.raises(CheckpointError, match=r"rank 0 failed"):
            made.start(STATE) if moment == "start" else made.finish()


def test_what_cannot_be_deleted_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commits, "prune", lambda *_, **__: ["old: Operation not permitted"])
    made = saver(TensorEngine(), tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            made.start(dataclasses.replace(STATE, step=step))
            assert made.finish() is not None
    assert [record.getMessage() for record in caplog.records] == [
        "an old checkpoint could not be deleted: old: Operation not permitted"
    ]


# ---------------------------------------------------------------- go on


def damage(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def test_the_newest_good_one_is_found_and_what_is_wrong_with_newer_ones_told(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_checkpoints=9)
    damage(tmp_path / "step-00000004")
    (tmp_path / "step-00000003" / "run_state.json").unlink()
    path, state, wrong = find_good(TensorEngine(), candidates(tmp_path), may_fall_back=True)  # type: ignore[arg-type]
    assert (path.name, state.step) == ("step-00000002", 2)
    assert ["step-00000004/rank-00000" in wrong[0], "step-00000003/run_state" in wrong[1]] == [True, True]


def test_a_named_one_that_is_broken_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    damage(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match=r"step-00000002/rank-00000.*Leave --resume-from out to take the newest"):
        find_good(TensorEngine(), candidates(tmp_path), may_fall_back=False)  # type: ignore[arg-type]


def test_when_all_are_broken_nothing_is_gone_on_from(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        damage(tmp_path / commits.name_of(step))
    with pytest.raises(CheckpointError, match=r"step-00000002/.*; .*step-00000001/.* begin again under another"):
        find_good(TensorEngine(), candidates(tmp_path), may_fall_back=True)  # type: ignore[arg-type]


def test_only_what_the_manifest_names_is_restored(tmp_path: Path) -> None:
    """Nobody has verified another file."""
    save(tmp_path / "other", 1, value=99.0)
    save(tmp_path, 1, value=7.0)
    path = tmp_path / "step-00000001"
    planted = tmp_path / "other" / "step-00000001" / "rank-00000.safetensors"
    planted.rename(path / "rank-00000.planted.safetensors")
    engine = TensorEngine()
    restore(engine, path, commits.read_state(path))  # type: ignore[arg-type]
    assert engine.tensors["a"]["master"].tolist() == [7.0] * 5


def test_another_model_and_a_missing_moment_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    state = commits.read_state(path)
    with pytest.raises(CheckpointError, match=r"weight b: \[3\] in the checkpoint, \[4\] in the model"):
        restore(TensorEngine(a=5, b=4), path, state)  # type: ignore[arg-type]
    engine = TensorEngine()
    engine.tensors["a"]["exp_avg_max"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match=r"exp_avg_max of a: elements 0 to 5 are in no file"):
        restore(engine, path, state)  # type: ignore[arg-type]
    for text in ("[]", "", "3"):
        (path / "shapes.json").write_text(text)
        with pytest.raises(CheckpointError, match="shapes"):
            restore(TensorEngine(), path, state)  # type: ignore[arg-type]


# ---------------------------------------------------------------- changes


def test_settings_that_change_the_curve_are_refused_key_by_key(tmp_path: Path) -> None:
    now = dataclasses.replace(STATE, curve={"optim.lr": 2e-3}, segments=(Segment(0, "g", "e"),))
    with pytest.raises(
        CheckpointError,
        match=r"optim\.lr: 0\.001 then, 0\.002 now; data: 'f' then, 'g' now; draws: 'd' then, 'e' now\. .*--allow",
    ):
        continued(STATE, now, allow_change=False, path=tmp_path)


def test_what_does_not_change_the_curve_is_reported_and_taken_over(tmp_path: Path) -> None:
    now = dataclasses.replace(STATE, layout={"processes": 4, "train.engine": "zero2"}, code={"sft_dist": "2"})
    changes = changes_since(STATE, now)
    assert changes.curve == ()
    assert changes.other == (
        "processes: 1 then, 4 now",
        "train.engine: 'single' then, 'zero2' now",
        "sft_dist: '1' then, '2' now",
    )
    state = continued(STATE, now, allow_change=False, path=tmp_path)
    assert state == dataclasses.replace(STATE, layout=now.layout, code=now.code)


def test_a_key_that_the_checkpoint_does_not_know_is_a_difference(tmp_path: Path) -> None:
    now = dataclasses.replace(STATE, curve=STATE.curve | {"data.order": "source"})
    for found, other, said in ((STATE, now, "None then, 'source' now"), (now, STATE, "'source' then, None now")):
        with pytest.raises(CheckpointError, match=rf"data\.order: {said}"):
            continued(found, other, allow_change=False, path=tmp_path)


def test_a_change_that_is_allowed_keeps_the_draws_unless_they_changed(tmp_path: Path) -> None:
    found = dataclasses.replace(STATE, step=7, num_updates=6, withheld_in_a_row=1, recent_losses=(1.0,))
    rate = continued(found, dataclasses.replace(STATE, curve={"optim.lr": 2.0}), allow_change=True, path=tmp_path)
    assert rate == dataclasses.replace(found, curve={"optim.lr": 2.0}, recent_losses=(), withheld_in_a_row=0)
    now = dataclasses.replace(STATE, segments=(Segment(0, "g", "e"),))
    assert changes_since(found, now).new_draws
    drawn = continued(found, now, allow_change=True, path=tmp_path)
    segments = (Segment(0, "f", "d"), Segment(7, "g", "e"))
    assert drawn == dataclasses.replace(found, segments=segments, recent_losses=(), withheld_in_a_row=0)
    assert continued(drawn, now, allow_change=False, path=tmp_path) == drawn, "the last segment is what counts"


def test_what_decides_the_draws_is_compared_key_by_key(tmp_path: Path) -> None:
    def state(train: dict[str, Any], draws: str, **data: Any) -> RunState:
        raw = {"model": {"path": "m"}, "batch": {"examples": 8}, "optim": {"lr": 1e-3}, "run": {"name": "r"}}
        recipe = parse_recipe(raw | {"data": {"train": {"path": "a.jsonl", **train}} | data}, origin="r")
        curve = curve_of(recipe, dtype="float32", model="c")
        return first_state(curve=curve, segment=Segment(0, "f", draws), layout={}, code={})

    then = state({}, "0a")
    unused_seed = state({}, "0a", held_out_seed=4)
    assert continued(then, unused_seed, allow_change=False, path=tmp_path) == then, "without a share it decides nothing"
    now = state({"cap": 5}, "0b", order="source", held_out_share=0.1, held_out_seed=4)
    with pytest.raises(
        CheckpointError,
        match=r"data\.held_out_share: 0\.0 then, 0\.1 now; data\.held_out_seed: None then, 4 now; "
        r"data\.order: 'shuffle' then, 'source' now; data\.train\.cap: \[None\] then, \[5\] now; "
        r"draws: '0a' then, '0b' now",
    ):
        continued(then, now, allow_change=False, path=tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 1),
        ("loss", "token_mean"),
        ("batch.examples", 9),
        ("train.steps", 5),
        ("train.spike_guard", 3.0),
        ("optim.lr", 2e-3),
        ("optim.schedule", "linear"),
        ("optim.warmup_steps", 3),
        ("optim.betas", [0.8, 0.9]),
        ("optim.max_grad_norm", 2.0),
        ("optim.weight_decay", 0.5),
        ("optim.eps", 1e-6),
        ("optim.min_lr", 1e-4),
    ],
)
def test_every_setting_that_decides_the_curve_is_named_as_in_the_recipe(key: str, value: object) -> None:
    def curve(**changed: object) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "run": {"name": "r"},
            "model": {"path": "m"},
            "data": {"train": "a.jsonl"},
            "batch": {"examples": 8},
            "optim": {"lr": 1e-3},
            "train": {},
        }
        for name, new in changed.items():
            *section, last = name.split(".")
            (raw[section[0]] if section else raw)[last] = new
        return json.loads(json.dumps(curve_of(parse_recipe(raw, origin="r"), dtype="float32", model="c")))

    then, now = curve(), curve(**{key: value})
    assert [name for name in then if then[name] != now[name]] == [key]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "engine", "zero2"),
        ("train", "save_every", 5),
        ("train", "keep_checkpoints", 5),
        ("train", "max_withheld", 5),
        ("data", "held_out", {"clinic": "h.jsonl", "general": ["g.jsonl"]}),
        ("evaluate", "tasks", {"calculator": {"metric": "numeric", "relative": 0.05}}),
        ("train", "timeout_s", 5.0),
        ("batch", "pack_tokens", 5000),
        ("model", "checkpointing", "full"),
        ("model", "path", "elsewhere"),
        ("train", "epochs", 1),
    ],
)
def test_what_does_not_decide_the_curve_may_change(section: str, key: str, value: object) -> None:
    raw: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"path": "m"},
        "data": {"train": "a.jsonl"},
        "batch": {"examples": 8},
        "optim": {"lr": 1e-3},
    }
    changed = raw | {section: {**raw.get(section, {}), key: value}}
    then, now = (curve_of(parse_recipe(r, origin="r"), dtype="float32", model="c") for r in (raw, changed))
    assert then == now
