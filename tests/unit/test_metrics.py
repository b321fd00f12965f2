"""What is written of each step is read back, and a step that is trained again is compared with what was written."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from sft_dist.metrics import (
    ChangeMetrics,
    CommitMetrics,
    Replay,
    StepMetrics,
    last_commit,
    read_counted,
    read_held_out,
    read_lines,
    read_steps,
    to_line,
)
from sft_dist.trackers import JsonlTracker


def step(number: int, loss: float = 2.0, **changed: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "epoch": 0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "applied": True,
        "withheld": None,
        "examples": 8,
        "batch": f"{number:016x}",
        "tokens": 100,
        "response_tokens": 50,
        "tokens_per_s": 1.0,
        "seconds": 1.0,
        "pack_fill": 1.0,
        "imbalance": 1.0,
        "peak_memory_bytes": 1,
        "attempt": 1,
    }
    return StepMetrics(step=number, loss=loss, **values | changed)


def write(path: Path, *metrics: StepMetrics | CommitMetrics | ChangeMetrics) -> Path:
    tracker = JsonlTracker(path)
    for one in metrics:
        tracker.log(one)
    tracker.close()
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_the_last_attempt_of_a_step_counts(path: Path) -> None:
    write(path, step(1, 2.0), step(2, 3.0), step(1, 1.0, attempt=2))
    assert {number: line["loss"] for number, line in read_steps(path).items()} == {1: 1.0, 2: 3.0}
    assert read_held_out(path) == {}


@pytest.mark.parametrize(
    ("starts", "losses"),
    [
        ([], [1.0, 2.0, 2.0, 1.0, 1.0]),
        ([(1, 0), (2, 1)], [1.0, 2.0, 2.0]),
        ([(1, 0), (2, 1), (3, 0)], [1.0, 2.0, 2.0]),  # the third has not trained yet
    ],
)
def test_steps_that_a_later_start_went_back_behind_do_not_count(
    path: Path, starts: list[tuple[int, int]], losses: list[float]
) -> None:
    write(path, *(step(number, 1.0) for number in range(1, 6)), step(2, 2.0, attempt=2), step(3, 2.0, attempt=2))
    write(path, CommitMetrics(3, 1, 0.0, 0.0, 2))
    lines = read_counted(path, [{"attempt": attempt, "after_step": after} for attempt, after in starts])
    assert [line["loss"] for line in lines if line["event"] == "step"] == losses
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


def test_a_torn_last_line_is_ignored_and_repaired(path: Path) -> None:
    path.write_text('{"event": "step", "step": 1, "loss": 1.0}\n{"event": "st')
    assert read_steps(path) == {1: {"event": "step", "step": 1, "loss": 1.0}}
    write(path, step(2))
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_what_is_not_finite_is_null(path: Path) -> None:
    write(path, step(1, math.nan, grad_norm=math.inf))
    assert "NaN" not in path.read_text()
    (line,) = read_lines(path)
    assert (line["loss"], line["grad_norm"]) == (None, None)


def test_the_last_commit_is_known_without_the_checkpoint(path: Path) -> None:
    assert last_commit(path) is None
    write(path, step(1))
    assert last_commit(path) is None
    write(path, *(CommitMetrics(number, 1, 0.0, 0.0, 1) for number in (4, 8, 6)))
    assert last_commit(path) == 8, "one that was gone back behind counts too"


def test_events_are_told_apart() -> None:
    assert json.loads(json.dumps(to_line(CommitMetrics(3, 1, 0.0, 0.0, 2))))["event"] == "commit"
    assert to_line(ChangeMetrics(3, ("optim.lr",), 2))["event"] == "change"


def test_a_step_that_comes_out_as_before_is_no_difference(path: Path) -> None:
    replay = Replay(write(path, step(1), step(2)), after_step=0, tolerance=0.0)
    assert replay.difference(step(1)) is None
    assert replay.difference(step(2, seconds=9.0, tokens=7, pack_fill=0.5, attempt=2)) is None
    assert replay.difference(step(3)) is None, "it was never trained before"


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (step(1, batch="f" * 16), "batch was 0000000000000001, is ffffffffffffffff"),
        (step(1, lr=2e-3), "lr was 0.001, is 0.002"),
        (step(1, examples=7), "examples was 8, is 7"),
        (step(1, response_tokens=7), "response_tokens was 50, is 7"),
        (step(1, 2.1), "loss was 2, is 2.1"),
        (step(1, math.nan), "loss was 2.0, is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_differs_is_said_with_both_values(path: Path, now: StepMetrics, said: str) -> None:
    replay = Replay(write(path, step(1)), after_step=0, tolerance=0.01)
    assert replay.difference(now) == said


def test_rounding_is_no_difference_of_losses_but_one_of_rates(path: Path) -> None:
    replay = Replay(write(path, step(1), step(2)), after_step=0, tolerance=1e-5)
    assert replay.difference(step(1, 2.0 + 2e-5)) is None
    assert replay.difference(step(2, lr=1e-3 + 1e-12)) is not None


def test_a_withheld_step_must_be_withheld_again(path: Path) -> None:
    write(path, step(1, math.nan), step(2, math.nan))
    replay = Replay(path, after_step=0, tolerance=0.0)
    assert replay.difference(step(1, math.nan)) is None
    assert replay.difference(step(2, 2.0)) == "loss was None, is 2.0"


def test_only_steps_that_are_trained_again_are_compared_and_each_once(path: Path) -> None:
    replay = Replay(write(path, step(1), step(2)), after_step=1, tolerance=0.0)
    assert replay.difference(step(1, 9.0)) is None
    assert replay.difference(step(2, 9.0)) is not None
    assert replay.difference(step(2, 9.0)) is None


def test_the_last_attempt_is_the_measure(path: Path) -> None:
    replay = Replay(write(path, step(1, 5.0), step(1, 2.0, attempt=2)), after_step=0, tolerance=0.0)
    assert replay.difference(step(1, 2.0)) is None


def test_what_was_trained_under_other_settings_is_no_measure(path: Path) -> None:
    write(path, step(1), step(2), step(3), ChangeMetrics(1, ("optim.lr",), 2), step(2, 5.0, attempt=2))
    replay = Replay(path, after_step=0, tolerance=0.0)
    assert replay.difference(step(1, 2.0)) is None
    assert replay.difference(step(2, 5.0)) is None
    assert replay.difference(step(3, 9.0)) is None, "it was not trained since the change"


def test_lines_that_a_full_disk_does_not_take_are_written_when_it_does(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk takes half a line, then nothing, then all again: no line is torn, and it is said once."""
    tracker = JsonlTracker(path)
    tracker.log(step(1))
    whole = path.stat().st_size
    disk = LittleDisk(path, whole + 100)
    monkeypatch.setattr(tracker, "_file", disk)
    for number in (2, 3, 4):
        tracker.log(step(number))
        assert path.stat().st_size == whole, "half a line would spoil the next"
    disk.room = 10**6
    tracker.log(step(5))
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3, 4, 5]
    tracker.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: No space left on device; lines are kept until it can be written again"
    ]


def test_lines_that_are_lost_in_the_end_are_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = JsonlTracker(path)
    monkeypatch.setattr(tracker, "_file", LittleDisk(path, 0))
    tracker.log(step(1))
    tracker.log(step(2))
    tracker.close(failed=True)
    assert caplog.records[-1].getMessage() == f"{path}: No space left on device; its last 2 lines are lost"
    assert path.read_bytes() == b""


class LittleDisk:
    """A file on a disk that has `room` bytes in all."""

    def __init__(self, path: Path, room: int) -> None:
        self._file, self.room = path.open("ab", buffering=0), room
        self.fileno, self.close = self._file.fileno, self._file.close

    def write(self, data: memoryview) -> int:
        free = self.room - os.fstat(self.fileno()).st_size
        if free <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data[:free])


def test_a_damaged_line_is_told_and_left_out(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a power cut leaves it: zeros where a line was. It must not end every resume."""
    damaged = [b"\0" * 40, b"5", b"{}", b'{"event": "commit"}', b'{"event": "step", "step": "2"}']
    path.write_bytes(b"\n".join([b'{"event": "step", "step": 1}', *damaged, b'{"event": "step", "step": 3}', b""]))
    assert sorted(read_steps(path)) == [1, 3]
    assert last_commit(path) is None
    assert "5 lines cannot be read, the first is line 2" in caplog.text
