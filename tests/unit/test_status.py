"""The status of runs, from files that the run's own writers have written."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist import commits, heartbeat, status
from sft_dist.commits import RunState, Segment
from sft_dist.errors import ConfigError
from sft_dist.heartbeat import FINISHED, LEFT, NOBODY, Heartbeat
from sft_dist.metrics import CommitMetrics, HeldOutMetrics, StepMetrics
from sft_dist.run_record import record_end, record_start
from sft_dist.status import RunStatus, duration, read_status, read_statuses, slow_ranks
from sft_dist.status_report import print_status, print_statuses, to_json
from sft_dist.trackers import JsonlTracker

ROOT = Path(__file__).parents[2]
NUM_STEPS = 1000
NOBODYS_PID = 2**22 + 1


def state_at(step: int, *, withheld: int = 0) -> RunState:
    return RunState(step=step, num_updates=step - withheld, curve={}, segments=(Segment(0, "data", "draws"),))


def step_line(step: int, **values: Any) -> StepMetrics:
    usual = {
        "step": step, "epoch": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "applied": True, "withheld": None,
        "examples": 8, "batch": "0", "tokens": 800, "response_tokens": 400, "tokens_per_s": 1600.0, "seconds": 0.5,
        "pack_fill": 1.0, "imbalance": 1.0, "peak_memory_bytes": 1, "attempt": 1,
    }  # fmt: skip
    return StepMetrics(**usual | values)


class MadeRun:
    """A run's directory, filled by the writers that a run uses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True)

    def start(self, *, after_step: int = 0, num_steps: int = NUM_STEPS, earlier_reason: str = "") -> None:
        record_start(
            self.directory, state_at(after_step), num_steps=num_steps, came_from=None, asked=None, changed=[],
            config="", earlier_reason=earlier_reason,
        )  # fmt: skip

    def log(self, *metrics: Any) -> None:
        tracker = JsonlTracker(self.directory / "metrics.jsonl")
        for line in metrics:
            tracker.log(line)
        tracker.close()

    def log_steps(self, first: int, last: int, **values: Any) -> None:
        self.log(*(step_line(step, **values) for step in range(first, last + 1)))

    def beat(self, *, rank: int = 0, world_size: int = 2, ago_s: float = 0.0, **values: Any) -> Heartbeat:
        """By a process of this host that lives, unless it is said otherwise."""
        (self.directory / "heartbeats").mkdir(exist_ok=True)
        first = heartbeat.first_heartbeat(rank, "here", world_size=world_size)
        then = time.time() - ago_s
        own = replace(first, **{"beat": 7, "step": 1, "phase": "saving", "began": then - 60, "time": then} | values)
        heartbeat.write(self.directory / "heartbeats", own)
        return own

    def beats(self, **values: Any) -> None:
        for rank in range(2):
            self.beat(rank=rank, **values)

    def commit(self, step: int, *, withheld: int = 0, ago_s: float = 0.0) -> None:
        writing = commits.make_room(self.directory / "checkpoints", step, size_bytes=1)
        (writing / commits.STATE).write_text(state_at(step, withheld=withheld).to_json())
        (writing / "rank-00000.safetensors").write_bytes(b"weights")
        final = commits.commit(writing, commits.flush(sorted(writing.iterdir()), umask=0o022))
        then = time.time() - ago_s
        os.utime(final / commits.COMMITTED, (then, then))

    def end(self) -> None:
        (self.directory / "model").mkdir()
        self.beats(state=FINISHED)

    @property
    def status(self) -> RunStatus:
        return read_status(self.directory)


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "runs" / "clinic")


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LOOK_AGAIN_S", 0.1)


def elsewhere(**values: Any) -> dict[str, Any]:
    """Values of a heartbeat of another host."""
    return {"host": "gpu-7", "pid_namespace": "another boot"} | values


def text_of(found: RunStatus, *, width: int = 80, with_ranks: bool = False) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_status(found, console, with_ranks=with_ranks)
    return console.export_text()


# ---------------------------------------------------------------- states


def test_a_run_that_trains_is_running(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beats(step=41, phase="micro-batch 2 of 3")
    found = run.status
    assert (found.state, found.detail) == ("running", "in step 41, micro-batch 2 of 3")
    assert (found.step, found.num_steps, found.world_size) == (40, NUM_STEPS, 2)


def test_before_the_first_step_it_is_starting_and_older_lines_do_not_make_a_rate(run: MadeRun) -> None:
    run.start()
    run.commit(30)
    run.log_steps(1, 40)
    run.beats(step=0, phase="loading the model")
    found = run.status
    assert (found.state, found.detail) == ("starting", "loading the model")
    assert (found.step, found.loss_step) == (30, 40), "it goes on from what was saved"
    assert (found.steps_per_s, found.left_s) == (None, None)


def test_a_file_of_the_start_before_is_nobodys_death(run: MadeRun) -> None:
    """Rank 1 is about to overwrite it."""
    run.start()
    run.beat(rank=0, step=0, phase="start", began=time.time())
    for state in ({}, {"state": LEFT, "reason": "old", "blamed": 1}):
        run.beat(rank=1, pid=NOBODYS_PID, ago_s=3600, **state)
        assert run.status.state == "starting"
        assert [rank.rank for rank in run.status.ranks] == [0]


def test_a_rank_that_dies_while_it_starts_is_lost(run: MadeRun) -> None:
    run.beat(rank=0, step=0)
    run.beat(rank=1, step=0, pid=NOBODYS_PID)
    assert run.status.state == "lost"


def test_with_a_stop_file_it_is_stopping(run: MadeRun) -> None:
    run.start()
    run.beats()
    (run.directory / "STOP").touch()
    assert run.status.state == "stopping"


def test_a_run_that_stopped_says_after_which_step_and_why(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beats(state=FINISHED)
    record_end(run.directory, interrupted_after=40, reason="SIGUSR1")
    found = read_status(run.directory, now=time.time() + 200)
    assert found.state == "stopped"
    assert found.detail == "on request after step 40 (SIGUSR1), 3 min ago"
    assert found.left_s is None


def test_ranks_killed_once_the_stop_was_noted_have_stopped(run: MadeRun) -> None:
    run.start()
    record_end(run.directory, interrupted_after=40, reason="SIGTERM")
    run.beats(step=40, pid=NOBODYS_PID)
    assert run.status.state == "stopped"
    run.beats(step=0, pid=NOBODYS_PID)
    assert run.status.state == "lost", "those of the start after, which died before it removed INTERRUPTED"


def test_a_run_is_finished_when_its_ranks_have_said_so(run: MadeRun) -> None:
    run.start(num_steps=40)
    run.log_steps(1, 40)
    run.end()
    assert run.status.state == "finished"
    assert "model in" in run.status.detail
    (run.directory / "model").rmdir()
    assert "has gone since" in run.status.detail


def test_without_heartbeats_the_last_step_and_the_model_tell_that_it_finished(run: MadeRun) -> None:
    run.start(num_steps=40)
    run.log_steps(1, 39)
    (run.directory / "model").mkdir()
    assert run.status.state == "unknown"
    run.log_steps(40, 40)
    assert run.status.state == "finished"


def test_a_run_that_failed_gives_the_reason_of_who_is_to_blame(run: MadeRun) -> None:
    run.start()
    seen = "rank 1 on here (pid 5) left after step 3 (phase saving): OutOfMemoryError: no room"
    run.beat(rank=0, state=LEFT, reason=seen, blamed=1, ago_s=301)
    run.beat(rank=1, state=LEFT, reason="OutOfMemoryError: no room", blamed=1, ago_s=300)
    found = run.status
    assert found.state == "failed"
    assert found.detail.startswith("rank 1 on here (pid ")
    assert found.detail.endswith("): OutOfMemoryError: no room, 5 min ago")
    assert "left after" not in found.detail, "what rank 0 saw of it"


def test_the_words_of_a_rank_that_met_a_death_speak_for_the_dead(run: MadeRun) -> None:
    run.start()
    run.beat(rank=0, state=LEFT, reason="rank 1 on here (pid 5) died after step 3", blamed=1)
    run.beat(rank=1, pid=NOBODYS_PID)
    assert run.status.state == "failed"
    assert run.status.detail.startswith("rank 1 on here (pid 5) died after step 3")


def test_a_dead_rank_of_this_host_is_lost_at_once(run: MadeRun) -> None:
    run.start()
    run.beat(rank=0)
    run.beat(rank=1, pid=NOBODYS_PID, step=12)
    found = run.status
    assert found.state == "lost"
    assert found.detail.startswith(f"rank 1 on here (pid {NOBODYS_PID}), after step 12 (phase saving)")
    assert [rank.state for rank in found.ranks] == ["running", "dead"]


def test_a_run_all_of_whose_ranks_are_gone_is_lost(run: MadeRun) -> None:
    run.start()
    run.beats(pid=NOBODYS_PID, ago_s=7500)
    assert run.status.state == "lost"
    assert "all 2 processes, after step 1 (phase saving): no sign of life for 2 h 05 min" in run.status.detail


def test_a_rank_that_finishes_while_it_is_looked_at_is_not_lost(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    own = run.beat()

    def ends(_: Heartbeat) -> bool:
        heartbeat.write(run.directory / "heartbeats", replace(own, state=FINISHED))
        return False

    monkeypatch.setattr(heartbeat, "is_alive", ends)
    assert run.status.state == "finished"


def test_a_rank_of_another_host_is_lost_when_it_beats_no_more(run: MadeRun) -> None:
    run.start()
    run.beats(**elsewhere())
    assert run.status.state == "running"
    run.beat(rank=1, **elsewhere(ago_s=40))
    found = run.status
    assert found.state == "lost"
    assert [rank.state for rank in found.ranks] == ["running", "silent"]
    assert "rank 1 on gpu-7" in found.detail


def test_a_host_whose_clock_is_behind_is_not_lost_while_it_beats(run: MadeRun) -> None:
    run.start()
    old = [run.beat(rank=rank, **elsewhere(ago_s=900)) for rank in range(2)]
    assert run.status.state == "lost"

    def beat_on() -> None:
        for own in old:
            heartbeat.write(run.directory / "heartbeats", replace(own, beat=own.beat + 1, time=own.time + 1))

    timer = threading.Timer(0.05, beat_on)
    timer.start()
    found = run.status
    timer.join()
    assert found.state == "running"
    assert [rank.silent_s for rank in found.ranks] == [0.0, 0.0]


def test_a_clock_ahead_makes_no_negative_age(run: MadeRun) -> None:
    run.beats(**elsewhere(ago_s=-100))
    assert run.status.state == "running"
    assert {rank.silent_s for rank in run.status.ranks} == {0.0}


def test_a_run_in_which_nobody_gets_on_hangs_and_the_rank_behind_is_named(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40, seconds=1.0)
    run.beat(rank=0, step=41, idle_s=90.0)
    run.beat(rank=1, step=40, idle_s=91.0, phase="micro-batch 1 of 2")
    found = run.status
    assert found.state == "hanging"
    assert "nobody got on for 90 s; likely cause: rank 1 on here (micro-batch 1 of 2)" in found.detail
    run.beat(rank=0, step=41, idle_s=50.0)
    assert run.status.state == "running", "as long as one gets on"


def test_long_steps_are_no_hang(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40, seconds=30.0)
    run.beats(idle_s=140.0)
    assert run.status.state == "running"
    run.beats(idle_s=160.0)
    assert run.status.state == "hanging"


def test_a_start_may_take_longer_than_the_steps_of_the_start_before(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beats(step=0, phase="checking the model", idle_s=200.0)
    assert run.status.state == "starting"
    run.beats(step=0, phase="checking the model", idle_s=310.0)
    assert run.status.state == "hanging"


def test_a_frozen_process_hangs_although_it_is_alive(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beat(rank=0, idle_s=70.0)
    run.beat(rank=1, ago_s=71)
    assert run.status.state == "hanging"
    assert "likely cause: rank 1" in run.status.detail


# ---------------------------------------------------------------- figures


def test_the_rate_is_the_median_of_the_newest_steps_of_this_start(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 100, seconds=9.0, tokens_per_s=1.0)
    run.start(after_step=60)
    run.log_steps(61, 80, seconds=5.0, tokens_per_s=2.0, attempt=2)
    run.log_steps(81, 129, seconds=0.25, tokens_per_s=3200.0, attempt=2)
    run.log_steps(130, 130, seconds=60.0, attempt=2)
    run.beats(step=131)
    found = run.status
    assert (found.steps_per_s, found.tokens_per_s) == (4.0, 3200.0)
    assert found.step == 130
    assert found.left_s == pytest.approx((NUM_STEPS - 130) * 0.25)


def test_the_time_left_counts_saves_and_held_out_losses(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 100, seconds=0.5)
    run.log(HeldOutMetrics(100, 1.5, 10, 100, 20.0, 1), CommitMetrics(100, 10, 5.0, 50.0, 1))
    run.beats(step=101)
    assert run.status.left_s == pytest.approx(900 * (0.5 + 25 / 100))


def test_losses_are_the_newest_and_say_their_step(run: MadeRun) -> None:
    run.start()
    run.log(HeldOutMetrics(0, 3.0, 10, 100, 1.0, 1), step_line(1, loss=2.5))
    run.log(HeldOutMetrics(1, 2.75, 10, 100, 1.0, 1), step_line(2, loss=2.25))
    run.beats()
    found = run.status
    assert (found.loss, found.loss_step) == (2.25, 2)
    assert (found.held_out_loss, found.held_out_step) == (2.75, 1)
    for name, loss in (("clinic", 1.5), ("general", 9.0)):
        run.log(HeldOutMetrics(2, loss, 10, 100, 1.0, 1, set=name))
    assert (run.status.held_out_loss, run.status.held_out_step) == (1.5, 2), "of several sets the first"
    run.log(step_line(3, loss=float("nan"), applied=False, withheld="loss not finite"))
    assert (run.status.loss, run.status.loss_step) == (None, 3)
    assert "loss not finite" in " ".join(text_of(run.status).split())


def test_withheld_updates_are_counted_over_the_whole_curve(run: MadeRun) -> None:
    """Up to the commit by the commit; behind it by this start's lines."""
    run.start()
    run.log_steps(1, 60, applied=False)
    run.commit(50, withheld=3)
    run.start(after_step=50)
    run.log_steps(51, 54, attempt=2)
    run.log_steps(55, 56, applied=False, attempt=2)
    run.beats(step=57)
    assert run.status.num_withheld == 5


def test_the_last_commit_is_told_with_its_age(run: MadeRun) -> None:
    run.start()
    run.beats()
    assert (run.status.commit_step, run.status.commit_age_s) == (None, None)
    run.commit(50, ago_s=900)
    run.commit(60, ago_s=600)
    found = run.status
    assert found.commit_step == 60
    assert found.commit_age_s == pytest.approx(600, abs=5)
    assert "commit step 60, 10 min ago" in " ".join(text_of(found).split())
    (run.directory / "checkpoints" / "step-00000060" / commits.STATE).write_text("{}")
    assert run.status.commit_step == 60, "broken: that is for `sft-dist checkpoints` to say"


def test_the_bytes_of_weights_are_not_read(run: MadeRun) -> None:
    run.start()
    run.commit(50)
    (run.directory / "checkpoints" / "step-00000050" / "rank-00000.safetensors").unlink()
    assert run.status.commit_age_s is not None


def test_restarts_say_why_the_start_before_ended(run: MadeRun) -> None:
    run.start()
    record_end(run.directory, interrupted_after=40, reason="SIGUSR1")
    run.start(after_step=40, earlier_reason="of an older start")
    run.start(after_step=50, earlier_reason="rank 1 on gpu-7 (pid 5) died after step 55")
    run.start(after_step=60)
    run.beats()
    assert [(start.after_step, start.ended) for start in run.status.starts] == [
        (0, "stopped on request after step 40 (SIGUSR1)"),
        (40, "rank 1 on gpu-7 (pid 5) died after step 55"),
        (50, None),
        (60, None),
    ]
    said = text_of(run.status, width=200)
    assert re.search(r"restarts +3 *\n", said)
    assert "rank 1 on gpu-7 (pid 5) died after step 55; then on from step 50" in said
    assert "ended without a word (killed, or finished); then on from step 60" in said


def test_a_torn_last_line_and_damaged_ones_are_left_out(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 3)
    with (run.directory / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 50 + b"\n7\n")
        file.write(json.dumps(asdict(step_line(4)) | {"event": "step"}).encode() + b"\n")
        file.write(json.dumps(asdict(step_line(5)) | {"event": "step"}).encode())
    assert run.status.step == 4


def test_of_a_long_file_only_the_end_is_read(run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start()
    run.log(HeldOutMetrics(0, 3.0, 10, 100, 1.0, 1))
    run.log_steps(1, 100)
    monkeypatch.setattr(status, "TAIL_BYTES", 10_000)
    run.beats(step=101)
    found = run.status
    assert (found.step, found.held_out_loss) == (100, None)
    assert found.steps_per_s == 2.0


# ---------------------------------------------------------------- slow ranks


def test_the_rank_above_the_median_is_slow() -> None:
    assert slow_ranks({0: 0.1, 1: 0.13}, imbalance=1.0) == {1}
    assert slow_ranks({0: 0.1, 1: 0.12}, imbalance=1.0) == set()
    assert slow_ranks({0: 0.1, 1: 0.1, 2: 0.2, 3: 0.1}, imbalance=1.0) == {2}
    assert slow_ranks({0: 0.3}, imbalance=1.0) == set()


def test_milliseconds_and_ranks_without_figures_prove_nothing() -> None:
    assert slow_ranks({0: 0.004, 1: 0.008}, imbalance=1.0) == set()
    assert slow_ranks({0: 0.0, 1: 0.5}, imbalance=1.0) == set()


def test_what_uneven_packs_explain_is_no_slowness() -> None:
    """One rank has 1.2 times the mean's work, so the other of the two has 0.8 times."""
    assert slow_ranks({0: 0.8, 1: 1.2}, imbalance=1.2) == set()
    assert slow_ranks({0: 0.8, 1: 1.9}, imbalance=1.2) == {1}
    assert slow_ranks({0: 0.8, 1: 1.2}, imbalance=2.5) == set()


def test_a_slow_rank_is_named_with_its_host(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beat(rank=0, forward_s=0.1)
    run.beat(rank=1, forward_s=0.35, **elsewhere())
    found = run.status
    assert [rank.rank for rank in found.slow_ranks] == [1]
    said = text_of(found, width=120)
    assert "2 on 2 hosts; slow: rank 1 on gpu-7 (350 ms of forward passes a step, the fastest 100 ms)" in said
    assert "last beat" in said, "something is wrong: each rank is shown"


# ---------------------------------------------------------------- what is shown


def test_json_has_every_field(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.commit(40)
    run.beats(forward_s=0.1)
    found = json.loads(to_json(run.status))
    assert found["run_dir"] == str(run.directory)
    assert found["ranks"][1]["forward_s"] == 0.1
    assert found["starts"][0]["attempt"] == 1
    assert found.keys() == asdict(run.status).keys()
    assert [one["state"] for one in json.loads(to_json([run.status]))] == ["running"]


def test_ranks_are_shown_when_asked_for_or_when_something_is_wrong(run: MadeRun) -> None:
    run.start()
    run.beats()
    assert "last beat" not in text_of(run.status)
    assert "last beat" in text_of(run.status, with_ranks=True)
    run.beat(rank=1, pid=NOBODYS_PID)
    assert "last beat" in text_of(run.status)


def test_what_files_hold_cannot_steer_the_terminal(run: MadeRun) -> None:
    run.start()
    run.beats(state=LEFT, reason="[bold]\x1b[2J", blamed=NOBODY)
    said = text_of(run.status, width=200)
    assert "[bold]\\x1b[2J" in said
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_statuses([run.status], console)
    assert "\x1b" not in said + console.export_text()


def test_durations_have_two_units_at_most() -> None:
    seconds = (0.4, 42, 99, 180, 3599, 7500, 86400 * 3 + 4 * 3600)
    assert [duration(s) for s in seconds] == ["0 s", "42 s", "99 s", "3 min", "1 h 00 min", "2 h 05 min", "3 d 4 h"]


# ---------------------------------------------------------------- directories, and the command


def sft_dist(*words: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    environ = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "sft_dist", *words]
    return subprocess.run(command, cwd=cwd, env=environ, timeout=60, capture_output=True, text=True)


def listing(directory: Path) -> dict[str, tuple[int, int, int, int]]:
    """Every name below, with what changes when anything is written, made or locked there."""
    files = [directory, *sorted(directory.rglob("*"))]
    stats = {str(path): path.lstat() for path in files}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats.items()}


def test_the_command_leaves_the_run_as_it_is_and_does_not_load_torch(run: MadeRun) -> None:
    run.start(num_steps=40)
    run.log_steps(1, 40)
    run.commit(40)
    run.end()
    (run.directory / ".lock").touch()
    before = listing(run.directory.parent)
    code = """
import sys
from sft_dist.cli import main
codes = [main(["status", sys.argv[1], flag]) for flag in ("--json", "--ranks")]
sys.exit(f"{codes} {'torch' in sys.modules}" if any(codes) or "torch" in sys.modules else 0)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(run.directory)], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "finished: model in" in found.stdout
    assert listing(run.directory.parent) == before


def test_a_directory_of_runs_is_listed_with_a_line_each(run: MadeRun) -> None:
    run.start()
    run.log_steps(1, 40)
    run.beats(**elsewhere(ago_s=10_000))
    other = MadeRun(run.directory.parent / "other")
    other.start(num_steps=30)
    other.end()
    (run.directory.parent / "stores").mkdir()
    found = sft_dist("status", cwd=run.directory.parents[1])
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert lines[0][:5] == ["run", "state", "step", "loss", "left"]
    assert lines[1][:4] == ["clinic", "lost", "40/1,000", "2.0000"]
    assert lines[2][:3] == ["other", "finished", "0/30"]
    assert len(lines) == 3
    as_json = sft_dist("status", "runs", "--json", cwd=run.directory.parents[1])
    assert [one["state"] for one in json.loads(as_json.stdout)] == ["lost", "finished"]


def test_lines_of_a_list_fit_on_a_terminal(run: MadeRun) -> None:
    run.start()
    run.beats(state=LEFT, reason="word " * 50, blamed=0)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_statuses([run.status], console)
    assert len(console.export_text().splitlines()) == 2


def test_of_many_silent_runs_all_are_looked_at_again_at_once(run: MadeRun) -> None:
    others = [MadeRun(run.directory.parent / f"run-{i}") for i in range(5)]
    for other in others:
        other.beats(**elsewhere(ago_s=100))
    started = time.monotonic()
    assert {found.state for found in read_statuses([other.directory for other in others])} == {"lost"}
    assert time.monotonic() - started < 3 * status.LOOK_AGAIN_S


@pytest.mark.parametrize("name", ["clinik", "clinic/checkpoints", "."])
def test_what_is_no_run_is_refused_and_the_nearest_are_named(run: MadeRun, name: str) -> None:
    run.start()
    (run.directory / "checkpoints").mkdir()
    asked = run.directory.parent / name if name != "." else run.directory.parents[1]
    with pytest.raises(ConfigError, match="name a run's directory") as refused:
        status.runs_at(asked)
    assert str(asked) in str(refused.value)
    assert f"runs near it: {run.directory}" in str(refused.value)


def test_the_command_refuses_with_exit_code_2(tmp_path: Path) -> None:
    found = sft_dist("status", str(tmp_path / "none"))
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: {tmp_path / 'none'}: no such directory; name a run's directory")


def test_a_damaged_run_json_is_named(run: MadeRun) -> None:
    (run.directory / "run.json").write_text("{")
    assert run.status.state == "unknown"
    assert run.status.detail.startswith(f"{run.directory / 'run.json'}: is not the record of a run's starts")
