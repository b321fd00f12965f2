"""How a run stands, from its files alone: no lock is taken and nothing is written, so that the run is not disturbed.

heartbeats/      which processes live, and what each is doing
metrics.jsonl    the newest lines: loss, rate, withheld updates
run.json         starts and why they ended; how many steps the run has
checkpoints/     the last commit; only its small files are read
INTERRUPTED STOP model/
"""

import difflib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sft_dist import commits, heartbeat
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.hang import suspects_of
from sft_dist.heartbeat import DEAD_AFTER_S, LEFT, NOBODY, Heartbeat
from sft_dist.run_files import CHECKPOINTS, HEARTBEATS, METRICS, MODEL, RUN_JSON, STOP_FILE
from sft_dist.run_record import read_interrupted, read_starts

TAIL_BYTES = 4 * 2**20
"""So much of metrics.jsonl is read, from its end: some nine thousand steps."""

RATE_STEPS = 50
"""The newest steps of this start that the rate is the median of."""

HANG_S, HANG_S_BEFORE_A_STEP = 60.0, 300.0
"""Nobody got on for so long, and for so many of the last steps: it hangs."""
HANG_STEPS = 5

SLOW_SHARE, SLOW_S = 1.25, 0.005
"""A rank is slow whose forward passes take so much longer than the median's, beyond what uneven packs explain."""

LOOK_AGAIN_S = 2.5 * heartbeat.BEAT_S
NO_SKEW_S = 3600.0
"""By so much no two clocks differ."""

State = Literal["starting", "running", "stopping", "hanging", "stopped", "finished", "failed", "lost", "unknown"]


@dataclass(frozen=True)
class RankStatus:
    """What one process is doing. state: a heartbeat's, or "dead", or "silent" where only its silence is known."""

    rank: int
    host: str
    pid: int
    state: str
    step: int
    phase: str
    silent_s: float
    """Seconds since its last beat."""
    idle_s: float
    """Seconds without progress, those included in which it was silent."""
    forward_s: float | None
    """Seconds a step in its own forward passes; None before there are enough steps."""
    is_slow: bool
    reason: str
    """Its last words: why the run cannot go on."""


@dataclass(frozen=True)
class Start:
    """One start of the run. ended: why it could not go on, or None where nobody could say."""

    attempt: int
    time: str
    age_s: float
    host: str
    after_step: int
    ended: str | None


@dataclass(frozen=True)
class RunStatus:
    """How a run stands. What is not known is None."""

    run_dir: Path
    state: State
    detail: str
    """The state in words: what it is doing, or why it ended."""
    step: int
    """The last step that was logged."""
    num_steps: int | None
    steps_per_s: float | None
    tokens_per_s: float | None
    left_s: float | None
    """Seconds to the last step, saves and held-out losses included; None for a run that does not train."""
    loss: float | None
    loss_step: int | None
    held_out_loss: float | None
    held_out_step: int | None
    num_withheld: int
    commit_step: int | None
    commit_age_s: float | None
    starts: tuple[Start, ...]
    world_size: int
    ranks: tuple[RankStatus, ...]

    @property
    def slow_ranks(self) -> tuple[RankStatus, ...]:
        return tuple(rank for rank in self.ranks if rank.is_slow)


@dataclass(frozen=True)
class Seen:
    """A heartbeat and what is known of its process. silent_s: by this host's clock. state: as in RankStatus."""

    beat: Heartbeat
    silent_s: float
    state: str

    @property
    def idle_s(self) -> float:
        return self.beat.idle_s + self.silent_s

    @property
    def who(self) -> str:
        return f"rank {self.beat.rank} on {self.beat.host} (pid {self.beat.pid})"


def is_run(directory: Path) -> bool:
    """Whether a run has written here."""
    return any((directory / name).exists() for name in (RUN_JSON, METRICS, HEARTBEATS, CHECKPOINTS))


def runs_at(directory: Path) -> list[Path]:
    """The directory itself if it is a run's, else the runs directly in it. Raises ConfigError when there are none."""
    if is_run(directory):
        return [directory]
    runs = [path for path in _folders_in(directory) if is_run(path)]
    if runs:
        return runs
    near = [path for folder in (directory.parent, *_folders_in(directory)) for path in _folders_in(folder)]
    others = [str(path) for path in (directory.parent, *near) if is_run(path)]
    nearest = difflib.get_close_matches(str(directory), others, n=8, cutoff=0)
    what = "no run, and none is in it" if directory.is_dir() else "no such directory"
    known = f"; runs near it: {', '.join(nearest)}{', ...' * (len(others) > 8)}" if others else ""
    raise ConfigError(
        f"{directory}: {what}{known}; name a run's directory, such as runs/<name>, which is there once its data is "
        "prepared, or one that holds runs"
    )


def _folders_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def read_statuses(run_dirs: Sequence[Path], *, now: float | None = None) -> list[RunStatus]:
    """How each run stands. now: Unix time, for tests.

    It takes LOOK_AGAIN_S longer when a process of another host seems silent: this host's clock may be wrong.
    """
    seen = {run_dir: _look(run_dir / HEARTBEATS, time.time() if now is None else now) for run_dir in run_dirs}
    doubtful = {
        run_dir
        for run_dir, ranks in seen.items()
        if any(rank.state == "silent" and rank.silent_s < NO_SKEW_S for rank in ranks)
    }
    if doubtful:
        time.sleep(LOOK_AGAIN_S)
        for run_dir in doubtful:
            seen[run_dir] = [_look_again(rank, run_dir / HEARTBEATS) for rank in seen[run_dir]]
    return [_status(run_dir, seen[run_dir], time.time() if now is None else now) for run_dir in run_dirs]


def read_status(run_dir: Path, *, now: float | None = None) -> RunStatus:
    """How one run stands; see read_statuses."""
    return read_statuses([run_dir], now=now)[0]


# ---------------------------------------------------------------- processes


def _look(directory: Path, now: float) -> list[Seen]:
    """Every rank of the newest start, by rank."""
    seen = [_judge(beat, directory, now) for beat in heartbeat.read_all(directory)]
    # Until they train, some ranks' files may be those of the start before.
    begun = [rank.beat.began for rank in seen if rank.state == heartbeat.RUNNING and rank.beat.step == 0]
    return [rank for rank in seen if rank.state == heartbeat.RUNNING or rank.beat.time >= max(begun, default=0)]


def _judge(beat: Heartbeat, directory: Path, now: float) -> Seen:
    """What became of the process of a heartbeat."""
    silent_s = max(0.0, now - beat.time)
    alive = heartbeat.is_alive(beat) if beat.state == heartbeat.RUNNING else None
    if alive is False:  # it may have written that it leaves between the look at its file and the look at its pid
        beat = heartbeat.read(directory, beat.rank) or beat
    state = beat.state
    if state == heartbeat.RUNNING and alive is False:
        state = "dead"
    elif state == heartbeat.RUNNING and alive is None and silent_s > DEAD_AFTER_S:
        state = "silent"
    return Seen(beat, silent_s, state)


def _look_again(before: Seen, directory: Path) -> Seen:
    """The same rank a while later: one that has beaten since is not silent, whatever the clocks say."""
    beat = heartbeat.read(directory, before.beat.rank)
    if before.state != "silent" or beat is None or beat.beat == before.beat.beat:
        return before
    return Seen(beat, 0.0, beat.state)


def _rank_status(rank: Seen, *, is_slow: bool) -> RankStatus:
    beat = rank.beat
    return RankStatus(
        rank=beat.rank,
        host=beat.host,
        pid=beat.pid,
        state=rank.state,
        step=beat.step,
        phase=beat.phase,
        silent_s=rank.silent_s,
        idle_s=rank.idle_s,
        forward_s=beat.forward_s or None,
        is_slow=is_slow,
        reason=beat.reason,
    )


def slow_ranks(forward_s: Mapping[int, float], *, imbalance: float) -> set[int]:
    """Ranks whose forward passes take longer than the median's, by more than uneven packs explain.

    forward_s: seconds a step, by rank. imbalance: the costliest rank's work over the mean's, as metrics.jsonl has it.
    With two ranks, one of which has x times the mean, the other has 2 - x times it.
    """
    if len(forward_s) < 2 or not all(forward_s.values()):
        return set()
    median = statistics.median_low(forward_s.values())
    limit = max(SLOW_SHARE * median * imbalance / max(2 - imbalance, 0.1), median + SLOW_S)
    return {rank for rank, seconds in forward_s.items() if seconds > limit}


# ---------------------------------------------------------------- metrics


def read_tail(path: Path) -> list[dict[str, Any]]:
    """The newest lines of metrics.jsonl; torn and damaged ones are left out."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[1 if start else 0 : -1]:
        try:
            record = json.loads(line)
        except ValueError:  # a power cut leaves zeros where lines were
            continue
        if isinstance(record, dict) and "event" in record:
            found.append(record)
    return found


@dataclass(frozen=True)
class Pace:
    """How fast a start goes. step_s: median of a step. spent_s: a step with its share of saves and held-out losses."""

    step_s: float
    spent_s: float
    tokens_per_s: float


def _pace(lines: Sequence[Mapping[str, Any]]) -> Pace | None:
    """The pace of the steps in these lines, which are of one start. None before the first."""
    steps = [line for line in lines if line["event"] == "step"]
    if not steps:
        return None
    newest = steps[-RATE_STEPS:]
    step_s = statistics.median(line["seconds"] for line in newest)
    besides = sum(line["seconds"] for line in lines if line["event"] == "held_out")
    besides += sum(line["stall_s"] for line in lines if line["event"] == "commit")
    tokens_per_s = statistics.median(line["tokens_per_s"] for line in newest)
    return Pace(step_s, step_s + besides / len(steps), tokens_per_s)


def _last(lines: Sequence[Mapping[str, Any]], event: str) -> Mapping[str, Any]:
    return next((line for line in reversed(lines) if line["event"] == event), {})


# ---------------------------------------------------------------- the run


def _status(run_dir: Path, seen: Sequence[Seen], now: float) -> RunStatus:
    starts, damage = _starts(run_dir)
    lines = read_tail(run_dir / METRICS)
    last_start = starts[-1] if starts else {}
    of_start = [line for line in lines if line.get("attempt") == last_start.get("attempt", 1)]
    pace, steps = _pace(of_start), [line for line in of_start if line["event"] == "step"]
    commit_step, commit_age_s, num_withheld = _last_commit(run_dir / CHECKPOINTS, now)
    step, num_steps = steps[-1]["step"] if steps else last_start.get("after_step", 0), last_start.get("num_steps")
    state, detail = _state(run_dir, seen, step=step, num_steps=num_steps, pace=pace, now=now)
    if damage:
        state, detail = "unknown", damage
    if state == "starting":  # these are of the start before
        step, steps, pace = commit_step or 0, [], None
    num_withheld += sum(not line["applied"] for line in steps if line["step"] > (commit_step or 0))
    loss, held_out = _last(lines, "step"), _last(lines, "held_out")
    imbalances = [line["imbalance"] for line in steps[-RATE_STEPS:]]
    forward_s = {rank.beat.rank: rank.beat.forward_s for rank in seen}
    slow = slow_ranks(forward_s, imbalance=statistics.mean(imbalances)) if imbalances else set()
    left_s = None
    if state == "running" and pace is not None and num_steps is not None:
        left_s = (num_steps - step) * pace.spent_s
    return RunStatus(
        run_dir=run_dir,
        state=state,
        detail=detail,
        step=step,
        num_steps=num_steps,
        steps_per_s=1 / pace.step_s if pace else None,
        tokens_per_s=pace.tokens_per_s if pace else None,
        left_s=left_s,
        loss=loss.get("loss"),
        loss_step=loss.get("step"),
        held_out_loss=held_out.get("held_out_loss"),
        held_out_step=held_out.get("step"),
        num_withheld=num_withheld,
        commit_step=commit_step,
        commit_age_s=commit_age_s,
        starts=tuple(_start(recorded, now) for recorded in starts),
        world_size=max((rank.beat.world_size for rank in seen), default=0),
        ranks=tuple(_rank_status(rank, is_slow=rank.beat.rank in slow) for rank in seen),
    )


def _starts(run_dir: Path) -> tuple[list[dict[str, Any]], str]:
    """What run.json says of each start, or what is wrong with it: other runs can be told of all the same."""
    try:
        return read_starts(run_dir), ""
    except CheckpointError as error:
        return [], str(error)


def _start(recorded: Mapping[str, Any], now: float) -> Start:
    return Start(
        attempt=recorded["attempt"],
        time=recorded["time"],
        age_s=max(0.0, now - _unix(recorded["time"])),
        host=recorded["host"],
        after_step=recorded["after_step"],
        ended=recorded.get("ended"),
    )


def _last_commit(directory: Path, now: float) -> tuple[int | None, float | None, int]:
    """(step of the newest checkpoint, its age, updates that were withheld up to it)."""
    newest = commits.committed(directory)[-1:]
    if not newest:
        return None, None, 0
    try:
        age_s = max(0.0, now - (newest[0] / commits.COMMITTED).stat().st_mtime)
        state = commits.read_state(newest[0])
    except (OSError, CheckpointError):  # deleted since, or broken: `sft-dist checkpoints` says how
        return commits.step_of(newest[0]), None, 0
    return state.step, age_s, state.step - state.num_updates


def _state(
    run_dir: Path, seen: Sequence[Seen], *, step: int, num_steps: int | None, pace: Pace | None, now: float
) -> tuple[State, str]:
    """The state of a run, and in words what it is doing or why it ended."""
    running = [rank for rank in seen if rank.state == heartbeat.RUNNING]
    lost = [rank for rank in seen if rank.state in ("dead", "silent")]
    spoke = [rank for rank in seen if rank.beat.reason]
    interrupted = read_interrupted(run_dir)
    # A start removes INTERRUPTED before its first step: beside ranks that have taken one, it is of this start.
    has_stopped = interrupted is not None and all(rank.beat.step for rank in lost)
    if spoke:
        return "failed", _why_failed(spoke, now)
    if interrupted is not None and has_stopped and not running:
        when = _since(_unix(interrupted["time"]), now)
        return "stopped", f"on request after step {interrupted['step']} ({interrupted['reason']}){when}"
    if lost:
        return "lost", _why_lost(lost, num_ranks=len(seen))
    if running:
        return _state_alive(run_dir, running, pace)
    if seen or (num_steps is not None and step >= num_steps):
        has_model = (run_dir / MODEL).exists()
        return "finished", f"model in {run_dir / MODEL}" if has_model else f"{run_dir / MODEL} has gone since"
    return "unknown", "no process has left a word of how it ended"


def _state_alive(run_dir: Path, running: Sequence[Seen], pace: Pace | None) -> tuple[State, str]:
    """The state of a run none of whose processes is lost."""
    first = running[0].beat
    idle_s = min(rank.idle_s for rank in running)
    limit_s = HANG_S_BEFORE_A_STEP
    if first.step and pace is not None:  # before its first step, the pace is that of the start before
        limit_s = max(HANG_S, HANG_STEPS * pace.step_s)
    if idle_s > limit_s or any(rank.beat.where for rank in running):
        beating = [rank.beat for rank in running if rank.silent_s <= DEAD_AFTER_S]
        suspects = suspects_of(beating, [rank.beat for rank in running if rank.silent_s > DEAD_AFTER_S])
        who = ", ".join(f"rank {beat.rank} on {beat.host} ({beat.phase})" for beat in suspects[:3])
        return "hanging", f"nobody got on for {idle_s:.0f} s{f'; likely cause: {who}' * bool(who)}"
    if (run_dir / STOP_FILE).exists():
        return "stopping", f"{STOP_FILE} is there; now in step {first.step}, {first.phase}"
    if first.step == 0:
        return "starting", first.phase
    return "running", f"in step {first.step}, {first.phase}"


def _why_failed(spoke: Sequence[Seen], now: float) -> str:
    """The first cause, by the rank that is to blame where it could say it itself."""
    first = min(spoke, key=lambda rank: (rank.beat.blamed != rank.beat.rank, rank.beat.time))
    own = first.state == LEFT and first.beat.blamed in (first.beat.rank, NOBODY)
    return f"{f'{first.who}: ' * own}{first.beat.reason}{_since(first.beat.time, now)}"


def _why_lost(lost: Sequence[Seen], *, num_ranks: int) -> str:
    """Who gives no sign of life any more, since when, and where it was."""
    last = max(lost, key=lambda rank: rank.beat.time)
    where = f"after step {last.beat.step} (phase {last.beat.phase})"
    silent = f"no sign of life for {duration(last.silent_s)}"
    if len(lost) == num_ranks > 1:
        return f"all {num_ranks} processes, {where}: {silent}; killed, or their hosts are gone"
    names = ", ".join(rank.who for rank in lost[:3]) + f" and {len(lost) - 3} more" * (len(lost) > 3)
    return f"{names}, {where}: {silent}"


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _since(then: float, now: float) -> str:
    return f", {duration(now - then)} ago" if now > then else ""


def duration(seconds: float) -> str:
    """Two units at most: "42 s", "3 min", "2 h 05 min", "3 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
