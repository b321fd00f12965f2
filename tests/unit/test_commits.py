"""Checkpoints are whole or do not exist: the files, whatever is in them."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from sft_dist import commits, durable
from sft_dist.commits import NUM_RECENT, RunState, Segment
from sft_dist.errors import CheckpointError

STATE = RunState(
    step=3,
    num_updates=2,
    curve={"optim.lr": 1e-3},
    segments=(Segment(0, "f", "d"), Segment(2, "g", "e")),
    layout={"processes": 2},
    code={"sft_dist": "1"},
    loss=0.1 + 0.2,
    recent_losses=(1 / 3, 2.0),
)
TENSORS = b"x" * 1000


def write(directory: Path, step: int, **changed: Any) -> Path:
    """What ranks do before the commit: returns the directory they wrote into."""
    writing = commits.make_room(directory, step, size_bytes=1000)
    (writing / "rank-00000.safetensors").write_bytes(TENSORS)
    (writing / commits.STATE).write_text(dataclasses.replace(STATE, step=step, **changed).to_json())
    return writing


def save(directory: Path, step: int, *, keep: int = 2, every: int | None = None, best: int = 0, **changed: Any) -> Path:
    writing = write(directory, step, **changed)
    path = commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=commits.read_umask()))
    assert commits.prune(directory, keep=keep, keep_every=every, keep_best=best) == []
    return path


def reseal(path: Path, file: str, content: str) -> None:
    """Change a file and everything that vouches for it."""
    (path / file).write_text(content)
    if file != commits.MANIFEST:
        manifest = json.loads((path / commits.MANIFEST).read_text())
        manifest["files"] |= commits.flush([path / file], umask=commits.read_umask())
        (path / commits.MANIFEST).write_text(json.dumps(manifest))
    digest = xxhash.xxh3_128_hexdigest((path / commits.MANIFEST).read_bytes())
    (path / commits.COMMITTED).write_text(digest + "\n")


def steps_in(directory: Path) -> list[int]:
    return [commits.step_of(path) for path in commits.committed(directory)]


# ---------------------------------------------------------------- commit


def test_a_committed_checkpoint_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert commits.read_state(path) == STATE, "floats too, bit for bit"
    commits.verify(path)


def test_old_ones_go_only_after_a_newer_commit(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    writing = write(tmp_path, 3)
    assert steps_in(tmp_path) == [1, 2]
    commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=commits.read_umask()))
    assert steps_in(tmp_path) == [1, 2, 3]
    commits.prune(tmp_path, keep=2, keep_every=None, keep_best=0)
    assert steps_in(tmp_path) == [2, 3]


def test_every_nth_and_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 1.0, 4: None, 5: 4.0, 6: 3.0, 7: None}
    for step, loss in losses.items():
        save(tmp_path, step, keep=1, every=5, best=1, held_out_loss=loss)
    assert steps_in(tmp_path) == [2, 5, 7], "of two equal ones the earlier; without a held-out loss none is best"


def test_the_best_is_finite_and_of_the_curve_that_is_trained(tmp_path: Path) -> None:
    """Losses of other settings say nothing of these, and a NaN is not less than anything."""
    save(tmp_path, 1, keep=1, best=1, held_out_loss=0.1, curve={"optim.lr": 9.0})
    for step, loss in ((2, float("nan")), (3, 0.5), (4, 0.7), (5, 0.9)):
        save(tmp_path, step, keep=1, best=1, held_out_loss=loss)
    assert steps_in(tmp_path) == [3, 5]


def test_the_best_can_be_those_with_the_highest_score(tmp_path: Path) -> None:
    """Scores of another measure are no competition, and the held-out loss does not decide then."""
    save(tmp_path, 1, keep=1, best=1, best_by="general/loss", best_value=5.0)
    for step, score in ((2, 0.9), (3, 0.5), (4, None)):
        save(tmp_path, step, keep=1, best=1, best_by="score", best_value=score, held_out_loss=1 / step)
    assert steps_in(tmp_path) == [2, 4]


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 1, loss=1.0)
    path = save(tmp_path, 1, loss=2.0)
    assert commits.read_state(path).loss == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_crashed_save_left_is_swept_by_the_next(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".old-step-00000000").mkdir()
    save(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000002"]


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    usage = type(shutil.disk_usage(tmp_path))(2 * 10**9, 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"step 2 needs 2,001\.0 MB and 1,000\.0 MB are free; make room"):
        commits.make_room(tmp_path, 2, size_bytes=2 * 10**9)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    writing = commits.make_room(tmp_path, 2, size_bytes=10**8)
    writing.rmdir()
    save(tmp_path, 3, keep=9)
    with pytest.raises(CheckpointError, match=r"delete what you can spare yourself, such as step-00000001$"):
        commits.make_room(tmp_path, 4, size_bytes=2 * 10**9)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_modes_that_the_umask_allows(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        writing = write(tmp_path, 1)
        (writing / "rank-00000.safetensors").chmod(0o600)  # as safetensors leaves it
        path = commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=commits.read_umask()))
        assert os.umask(umask) == umask, "flush puts it back"
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


# ---------------------------------------------------------------- delete


@pytest.fixture
def undeletable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of checkpoints whose deletion fails half-way."""
    names: set[str] = set()
    original = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if Path(path).name not in names:
            return original(path, ignore_errors=ignore_errors)
        if not ignore_errors:
            raise OSError(errno.EPERM, "Operation not permitted", str(path))
        return None

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return names


def test_what_cannot_be_deleted_is_told_and_tried_again_and_stops_no_save(
    tmp_path: Path, undeletable: set[str]
) -> None:
    undeletable.add(".old-step-00000001")
    for step in (1, 2, 3):
        writing = write(tmp_path, step)
        commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=commits.read_umask()))
        failed = commits.prune(tmp_path, keep=1, keep_every=None, keep_best=0)
        assert failed == ([f"{tmp_path / '.old-step-00000001'}: Operation not permitted"] if step > 1 else [])
    assert steps_in(tmp_path) == [3], "half deleted, it does not look committed"
    undeletable.clear()
    assert commits.prune(tmp_path, keep=1, keep_every=None, keep_best=0) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


def test_what_cannot_even_be_renamed_stays_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "step-00000001":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    failed = commits.prune(tmp_path, keep=1, keep_every=None, keep_best=0)
    assert failed == [f"{tmp_path / 'step-00000001'}: Operation not permitted"]
    assert steps_in(tmp_path) == [1, 3], "one that stays does not keep the others"


def test_one_that_is_set_aside_is_out_of_the_row_and_kept(tmp_path: Path) -> None:
    for number in ("", ".2", ".3"):
        path = save(tmp_path, 4)
        assert commits.set_aside(path) == tmp_path / f"aside-step-00000004{number}"
        assert steps_in(tmp_path) == []
    save(tmp_path, 5, keep=1)
    assert len(list(tmp_path.glob("aside-*"))) == 3, "nobody deletes them but the user"


# ---------------------------------------------------------------- read


def test_what_was_not_committed_does_not_count(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "COMMITTED").unlink()
    assert commits.committed(tmp_path) == []
    with pytest.raises(CheckpointError, match="not a committed checkpoint: COMMITTED is missing"):
        commits.read_state(path)


def test_only_steps_are_looked_at_and_no_pointer_is_followed(tmp_path: Path) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    (tmp_path / "latest").write_text("step-00000009")
    (tmp_path / "step-best").mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    (tmp_path / "step-00000012").mkdir()
    (tmp_path / "step-²").mkdir()
    assert steps_in(tmp_path) == [9, 10]


FILES = ["rank-00000.safetensors", commits.STATE, commits.MANIFEST]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "empty", "delete"])
def test_a_damaged_file_is_named(damage: str, file: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = (path / file).read_bytes()
    damaged = {
        "flip": content[:50] + bytes([content[50] ^ 1]) + content[51:],
        "truncate": content[:-1],
        "append": content + b"\0",
        "empty": b"",
    }
    (path / file).unlink()
    if damage != "delete":
        (path / file).write_bytes(damaged[damage])
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        commits.verify(path)
    if file != FILES[0]:
        with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
            commits.read_state(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"0" * 32, b"\xff\xfe", b"COMMITTED"])
def test_a_commit_mark_that_names_another_manifest_is_refused(content: bytes, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "COMMITTED").write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)):
        commits.verify(path)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_ranks_that_share_the_reading_leave_no_file_out(tmp_path: Path, num_parts: int) -> None:
    """Whichever file is broken, exactly one of them finds it."""
    writing = write(tmp_path, 1)
    for rank in range(1, 6):
        (writing / f"rank-{rank:05d}.safetensors").write_bytes(TENSORS)
    path = commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=commits.read_umask()))
    for file in commits.named_files(path):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        found = 0
        for part in range(num_parts):
            try:
                commits.verify(path, part=part, num_parts=num_parts)
            except CheckpointError:
                found += 1
        assert found == 1, file
        file.write_bytes(whole)


@pytest.mark.parametrize("field", ["step", "num_updates", "curve", "segments", "recent_losses"])
def test_a_sealed_state_that_lacks_a_field_is_refused_by_its_name(field: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    raw = json.loads((path / commits.STATE).read_text())
    del raw[field]
    reseal(path, commits.STATE, json.dumps(raw))
    commits.verify(path)
    with pytest.raises(CheckpointError, match=rf"run_state\.json: is no state of this version: .*{field}"):
        commits.read_state(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", '{"segments": []}', '{"segments": 3}'])
def test_a_sealed_state_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reseal(path, commits.STATE, text)
    with pytest.raises(CheckpointError, match="is no state of this version"):
        commits.read_state(path)


@pytest.mark.parametrize(("field", "value"), [("step", "9"), ("num_updates", -1), ("step", True), ("curve", [])])
def test_a_sealed_state_whose_values_make_no_sense_is_refused(field: str, value: object, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    raw = json.loads((path / commits.STATE).read_text()) | {field: value}
    reseal(path, commits.STATE, json.dumps(raw))
    with pytest.raises(CheckpointError, match=rf"is no state of this version: .*{field}"):
        commits.read_state(path)


def test_a_state_without_segments_is_none(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    raw = json.loads((path / commits.STATE).read_text())
    reseal(path, commits.STATE, json.dumps(raw | {"segments": []}))
    with pytest.raises(CheckpointError, match="is no state of this version"):
        commits.read_state(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2}', '{"version": 2, "files": []}'])
def test_a_sealed_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    reseal(path, commits.MANIFEST, text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is no manifest"):
        commits.verify(path)


def test_another_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    text = (path / commits.MANIFEST).read_text()
    reseal(path, commits.MANIFEST, text.replace('"version": 2', '"version": 3'))
    with pytest.raises(CheckpointError, match="a checkpoint of format 3, this version reads format 2"):
        commits.read_state(path)


def test_what_others_own_or_may_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, 1)
    commits.require_trusted(path)
    (path / FILES[0]).chmod(0o666)
    with pytest.raises(CheckpointError, match=rf"{FILES[0]}: everybody may write it; .*--trust-checkpoint"):
        commits.require_trusted(path)
    (path / FILES[0]).chmod(0o664)
    commits.require_trusted(path)  # a group of one's own, as many systems set it up
    path.chmod(0o777)
    with pytest.raises(CheckpointError, match=f"{path}: everybody may write it"):
        commits.require_trusted(path)
    path.chmod(0o755)
    (path / "link.safetensors").symlink_to("/nowhere")
    with pytest.raises(CheckpointError, match=r"link\.safetensors: is a link"):
        commits.require_trusted(path)
    (path / "link.safetensors").unlink()
    if os.getuid() == 0:
        os.chown(path / FILES[0], 4242, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(CheckpointError, match=r"belongs to another user \(uid \d+\); --trust-checkpoint"):
        commits.require_trusted(path)


def test_the_list_has_every_checkpoint_with_its_verdict(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=9)
    commits.set_aside(tmp_path / "step-00000001")
    (tmp_path / "step-00000002" / FILES[0]).write_bytes(TENSORS[:-1] + b"y")
    (tmp_path / "step-00000003" / commits.STATE).unlink()
    (tmp_path / "step-00000004" / "COMMITTED").unlink()
    write(tmp_path, 6)
    found = {entry.path.name: entry for entry in commits.list_checkpoints(tmp_path)}
    assert list(found) == [*(f"step-0000000{n}" for n in (2, 3, 4, 5)), "aside-step-00000001", ".step-00000006"]
    verdicts = [entry.verdict for entry in found.values()]
    assert verdicts[0].startswith("rank-00000.safetensors: is {")
    assert verdicts[1] == "run_state.json: No such file or directory, and the manifest names it"
    assert verdicts[2] == "not a committed checkpoint: COMMITTED is missing"
    assert verdicts[3:] == ["good", "set aside; not used", "not committed: being written, or left by a crash"]
    assert [entry.is_good for entry in found.values()] == [False, False, False, True, False, False]
    good = found["step-00000005"]
    assert good.state == dataclasses.replace(STATE, step=5)
    assert good.size_bytes > 1000


# ---------------------------------------------------------------- state


def test_a_withheld_step_advances_and_counts_and_an_applied_one_ends_the_count() -> None:
    state = dataclasses.replace(STATE, held_out_loss=1.0)
    for number in (1, 2):
        state = state.after(float("nan"), applied=False)
        assert (state.step, state.num_updates, state.withheld_in_a_row) == (3 + number, 2, number)
        assert (state.loss, state.held_out_loss, state.recent_losses) == (None, None, STATE.recent_losses)
    state = state.after(0.5, applied=True)
    assert (state.step, state.num_updates, state.withheld_in_a_row, state.loss) == (6, 3, 0, 0.5)
    assert state.recent_losses == (*STATE.recent_losses, 0.5)


def test_only_so_many_losses_are_remembered_and_they_survive_the_disk() -> None:
    state = STATE
    for number in range(50):
        state = state.after(number / 7, applied=True)
    assert state.recent_losses == tuple(number / 7 for number in range(50 - NUM_RECENT, 50))
    assert RunState.from_json(state.to_json()) == state


# ---------------------------------------------------------------- crash


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each flush, rename and deletion; after it the next start saves as if nothing had been."""
    save(tmp_path, 1, keep=1)
    calls, limit = 0, 0

    def crashing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Crash
            return original(*arguments, **named)

        return call

    newest = 1
    for limit in range(100):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crashing(os.fsync))
            patch.setattr(Path, "rename", crashing(Path.rename))
            patch.setattr(shutil, "rmtree", crashing(shutil.rmtree))
            try:
                save(tmp_path, 2 + limit, keep=1)
            except Crash:
                crashed = True
            else:
                crashed = False
        found = commits.committed(tmp_path)
        assert found, f"nothing is left after a crash at call {limit + 1}"
        for path in found:
            commits.verify(path)
            assert commits.read_state(path).step == commits.step_of(path)
        assert commits.step_of(found[-1]) >= newest, "a checkpoint that was committed is gone"
        newest = commits.step_of(found[-1])
        if not crashed:
            break
    assert limit >= 8, "files, manifest, mark and directories are flushed, one renamed, an old one deleted"
    assert newest == 2 + limit
    assert [path.name for path in tmp_path.iterdir()] == [commits.name_of(newest)]


def test_a_text_file_is_replaced_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    durable.replace_durably(file, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            durable.replace_durably(file, "new")
    assert file.read_text() == "old"
    durable.replace_durably(file, "new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
