"""The watchdog on real processes: who dies, leaves or hangs is named, and nobody waits for it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sft_dist import heartbeat
from sft_dist.errors import RankLostError
from sft_dist.heartbeat import FINISHED, LEFT, Heartbeat
from sft_dist.watchdog import Watchdog
from sft_dist.world import World
from tests import tiny

ROOT = Path(__file__).parents[2]

# A rank: beats, waits until all have, then does what the test says. Faster than real ones, in the same proportions.
RANK = """
import os, signal, socket, sys, time
from dataclasses import replace
from pathlib import Path
from sft_dist import heartbeat, watchdog
from sft_dist.errors import RankLostError
from sft_dist.rank_log import per_rank_log
from sft_dist.watchdog import Watchdog
from sft_dist.world import World
run_dir, rank, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
heartbeat.BEAT_S, watchdog.GRACE_S, watchdog.LEAVE_S = 0.2, 0.4, 0.6
def elsewhere():
    first = watchdog.heartbeat.first_heartbeat
    there = {"host": "far", "pid_namespace": "another boot"}
    heartbeat.first_heartbeat = lambda *own, **more: replace(first(*own, **more), **there)
def together():
    while sum(found.host != "old" for found in heartbeat.read_all(run_dir / "heartbeats")) < size:
        time.sleep(0.01)
def at_work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        dog.progress(phase="forward")
        time.sleep(0.01)
def wait_for_ever():
    time.sleep(60)
{before}
with per_rank_log(run_dir, World(rank, size, rank, size)), \\
     Watchdog(run_dir, World(rank, size, rank, size), timeout_s={timeout_s}, dead_after_s={dead_after_s}) as dog:
    together()
    dog.watch_peers()
    dog.progress(step=17, phase="forward")
    {body}
"""


@dataclass
class Ranks:
    """Processes of one run."""

    run_dir: Path
    processes: list["subprocess.Popen[str]"]

    def heartbeat(self, rank: int) -> Heartbeat:
        found = heartbeat.read(self.run_dir / "heartbeats", rank)
        assert found is not None
        return found

    def wait_until(self, rank: int, *, step: int) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            found = heartbeat.read(self.run_dir / "heartbeats", rank)
            if found is not None and found.step >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"rank {rank} never came to step {step}:\n" + "\n".join(self.end()[1]))

    def end(self, *, within_s: float = 15.0) -> tuple[list[int], list[str]]:
        """(exit codes, what each wrote to stderr) once all have ended by themselves."""
        deadline = time.monotonic() + within_s
        errors = []
        for process in self.processes:
            try:
                errors.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[1])
            except subprocess.TimeoutExpired:
                process.kill()
                errors.append("STILL RUNNING\n" + process.communicate(timeout=10)[1])
        return [process.returncode for process in self.processes], errors

    def log(self, rank: int) -> str:
        return (self.run_dir / "logs" / f"rank-{rank:05d}.log").read_text()


def start(
    run_dir: Path, bodies: Sequence[str], *, timeout_s: float = 60.0, dead_after_s: float = 1.0, before: str = ""
) -> Ranks:
    """One process per body."""
    processes = []
    for rank, body in enumerate(bodies):
        code = RANK.replace("{before}", before).replace("{body}", body.replace("\n", "\n    "))
        code = code.replace("{timeout_s}", str(timeout_s)).replace("{dead_after_s}", str(dead_after_s))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, str(run_dir), str(rank), str(len(bodies))],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return Ranks(run_dir, processes)


@pytest.fixture(autouse=True)
def _no_timer_is_left() -> Iterator[None]:
    yield
    import faulthandler

    faulthandler.cancel_dump_traceback_later()


def test_a_killed_rank_ends_the_run_and_is_named_once(tmp_path: Path) -> None:
    """At the speed of real runs: the promise is 15 s. Rank 1 looks at ranks 0 and 2 only, and is told by them."""
    real = "heartbeat.BEAT_S, watchdog.GRACE_S, watchdog.LEAVE_S = 1.0, 3.0, 5.0"
    ranks = start(tmp_path, ["wait_for_ever()"] * 4, before=real)
    for rank in range(4):
        ranks.wait_until(rank, step=17)
    started = time.monotonic()
    ranks.processes[3].kill()
    codes, errors = ranks.end()
    assert time.monotonic() - started < 12
    assert codes == [5, 5, 5, -signal.SIGKILL], errors
    dead = ranks.heartbeat(3)
    named = f"rank 3 on {dead.host} (pid {dead.pid}) died after step 17 (phase forward)"
    assert named in errors[0]
    assert "rank 0 ends with it: the last committed checkpoint is whole" in errors[0]
    assert errors[1:] == ["", "", ""]
    for rank in range(3):
        assert named in ranks.log(rank)
        assert (ranks.heartbeat(rank).state, ranks.heartbeat(rank).blamed) == (LEFT, 3)


def test_when_rank_0_dies_rank_1_says_so(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["os.kill(os.getpid(), signal.SIGKILL)", "wait_for_ever()", "wait_for_ever()"])
    codes, errors = ranks.end()
    assert codes == [-signal.SIGKILL, 5, 5], errors
    assert re.search(r"error: rank 0 on \S+ \(pid \d+\) died", errors[1])
    assert errors[2] == ""


def test_an_exception_of_one_rank_is_the_reason_that_the_others_give(tmp_path: Path) -> None:
    own = """
try: raise ValueError('row 7 is no text')
except ValueError as error:
  assert dog.explain(error) is None
  raise"""
    ranks = start(tmp_path, ["wait_for_ever()", own, "wait_for_ever()"])
    codes, errors = ranks.end()
    assert codes == [5, 1, 5], errors
    assert re.search(r"rank 1 on \S+ \(pid \d+\) left after step 17 \(phase forward\): ValueError: row 7", errors[0])
    assert "Traceback" in errors[1]  # its own words reach the console
    assert errors[2] == ""


def test_the_main_thread_may_raise_the_loss_itself(tmp_path: Path) -> None:
    body = """
time.sleep(0.1)
try: raise RuntimeError("[gloo] Connection closed by peer")
except RuntimeError as error:
  lost = dog.explain(error)
  assert isinstance(lost, RankLostError), lost
  open(run_dir / f"said-{rank}", "w").write(f"{lost.is_local} {lost}")
  raise lost from None"""
    ranks = start(tmp_path, [body, "os._exit(1)", body])
    codes, errors = ranks.end()
    assert codes == [1, 1, 1], errors  # raised, not ended by the thread
    assert re.match(r"True rank 1 on \S+ \(pid \d+\) died after step", (tmp_path / "said-0").read_text())
    assert (tmp_path / "said-2").read_text().startswith("False rank 1 on")
    assert ranks.heartbeat(0).blamed == 1


def test_an_error_of_the_connection_without_a_dead_peer_is_this_ranks_own(tmp_path: Path) -> None:
    body = """
try: raise RuntimeError("[gloo] Connection closed by peer")
except RuntimeError as error:
  started = time.monotonic()
  assert dog.explain(error, wait_s=0.5) is None
  assert 0.5 <= time.monotonic() - started < 2
  raise"""
    ranks = start(tmp_path, [body, "wait_for_ever()"])
    codes, errors = ranks.end()
    assert codes == [1, 5], errors
    assert "left after step 17 (phase forward): RuntimeError: [gloo] Connection closed by peer" in errors[
        1
    ] + ranks.log(1)


def test_a_main_thread_stuck_on_its_way_out_is_ended(tmp_path: Path) -> None:
    stuck = "import atexit\natexit.register(wait_for_ever)\nraise ValueError"
    ranks = start(tmp_path, [stuck, "wait_for_ever()"])
    codes, errors = ranks.end(within_s=8)
    assert codes == [1, 5], errors


def test_ranks_that_finish_one_by_one_are_not_minded(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["at_work(1.5)\ndog.finish()", "dog.finish()", "pass"])
    codes, errors = ranks.end()
    assert (codes, errors) == ([0, 0, 0], ["", "", ""])
    assert {ranks.heartbeat(rank).state for rank in range(3)} == {FINISHED}


def test_a_rank_that_finishes_while_it_is_looked_at_is_not_minded(tmp_path: Path) -> None:
    """Its file said running, its pid was gone a moment later, and in between it had written that it is done."""
    between = """
def is_alive(last):
    write(run_dir / "heartbeats", replace(last, state="finished"))
    return False
write = heartbeat.write
if rank == 0:
    heartbeat.is_alive = is_alive
"""
    ranks = start(tmp_path, ["at_work(0.8)\ndog.finish()"] * 2, before=between)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_a_silent_rank_on_another_host_is_lost(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["wait_for_ever()", "wait_for_ever()"], before="elsewhere() if rank == 1 else None")
    try:
        ranks.wait_until(1, step=17)
        ranks.processes[1].send_signal(signal.SIGSTOP)
        error = ranks.processes[0].communicate(timeout=8)[1]
        assert ranks.processes[0].returncode == 5
        assert re.search(r"rank 1 on far \(pid \d+\) has given no sign of life for \d+ s after step 17", error)
        ranks.processes[1].send_signal(signal.SIGCONT)  # it learns from rank 0's file, and ends too
        assert ranks.processes[1].wait(timeout=8) == 5
    finally:
        ranks.processes[1].kill()
        ranks.end()


def test_a_silent_rank_does_not_end_one_that_gets_on(tmp_path: Path) -> None:
    """The file system of the other host may be slow: as long as steps are made it lives."""
    body = "at_work(1.8)\ndog.finish()"
    ranks = start(tmp_path, [body, body], before="elsewhere() if rank == 1 else None", dead_after_s=0.8)
    ranks.wait_until(1, step=17)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    ranks.processes[1].send_signal(signal.SIGCONT)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["time.sleep(2.7)\ndog.finish()"] * 2, before="elsewhere()", timeout_s=1.2)
    for rank in (0, 1):
        ranks.wait_until(rank, step=17)
    for number, seconds in ((signal.SIGSTOP, 1.3), (signal.SIGCONT, 0)):
        for process in ranks.processes:
            process.send_signal(number)
        time.sleep(seconds)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_a_hang_shows_the_stacks_of_all_ranks_and_names_the_frozen_one(tmp_path: Path) -> None:
    stuck = "def stuck_in_the_data():\n    time.sleep(60)\ndog.progress(phase='data')\nstuck_in_the_data()"
    ranks = start(tmp_path, ["wait_for_ever()", stuck, "wait_for_ever()"], timeout_s=1.5)
    try:
        ranks.wait_until(2, step=17)
        ranks.processes[2].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        errors = [process.communicate(timeout=10)[1] for process in ranks.processes[:2]]
        assert time.monotonic() - started < 5
    finally:
        ranks.processes[2].kill()
        ranks.end()
    assert [process.returncode for process in ranks.processes[:2]] == [5, 5]
    assert "no progress for 2 s at step 17" in errors[0]
    assert re.search(r"rank 1 on \S+ \(pid \d+\), step 17, phase data: is at .* stuck_in_the_data", errors[0])
    assert re.search(r"rank 2 on .*: no heartbeat for \d+ s", errors[0])
    assert "likely cause: rank 2" in errors[0]
    assert errors[1] == ""
    assert "in wait_for_ever" in ranks.log(0)
    assert "in stuck_in_the_data" in ranks.log(1)


def test_long_work_of_one_rank_that_others_wait_for_is_no_hang(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["at_work(2)\ndog.finish()", "time.sleep(2)", "time.sleep(2)"], timeout_s=0.8)
    codes, errors = ranks.end()
    assert codes == [0, 0, 0], errors
    assert "Python stacks" not in ranks.log(1) + ranks.log(2)


def test_a_clock_that_is_behind_makes_no_hang(tmp_path: Path) -> None:
    behind = "now = time.time\ntime.time = lambda: now() - 100 * (rank == 0)"
    ranks = start(tmp_path, ["at_work(2)\ndog.finish()", "time.sleep(2)"], before=behind, timeout_s=0.6)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_one_process_that_hangs_is_ended(tmp_path: Path) -> None:
    ranks = start(tmp_path, ["wait_for_ever()"], timeout_s=0.6)
    codes, errors = ranks.end()
    assert codes == [5]
    assert "no progress for 1 s at step 17" in errors[0]
    assert "in wait_for_ever" in ranks.log(0)


def test_a_collective_that_times_out_is_part_of_the_hang(tmp_path: Path) -> None:
    """It waited, and is not to blame, although its main thread now stands elsewhere."""
    gave_up = """
time.sleep(0.7)
try: raise RuntimeError("[gloo] Timed out waiting 700ms for recv operation to complete")
except RuntimeError as error:
  dog.explain(error, wait_s=0.1)
  raise"""
    ranks = start(tmp_path, [gave_up, "wait_for_ever()"], timeout_s=0.8)
    codes, errors = ranks.end()
    assert codes == [5, 5], errors
    assert "likely cause: rank 1" in errors[0]


def test_a_rank_that_lets_no_thread_run_still_writes_its_stack(tmp_path: Path) -> None:
    """A regular expression that never ends holds the interpreter, as a C extension may."""
    greedy = "import re\nre.match(r'(a*)*b', 'a' * 40)"
    ranks = start(tmp_path, ["wait_for_ever()", greedy], timeout_s=1.0, before="watchdog.C_TIMER_S = 1.0")
    codes, errors = ranks.end()
    assert codes == [5, 1], errors
    assert "likely cause: rank 1" in errors[0]
    assert "most recent call first" in ranks.log(1)


def test_a_second_job_in_the_directory_ends_nobody(tmp_path: Path) -> None:
    """Its ranks above 0 beat into the same files before its rank 0 is refused."""
    body = "at_work(1.6)\ndog.finish()"
    ranks = start(tmp_path, [body, body])
    ranks.wait_until(1, step=17)
    time.sleep(0.3)
    other = replace(ranks.heartbeat(1), pid=2**22 + 1, started=1, state=LEFT, reason="ConfigError: locked", blamed=1)
    for _ in range(15):
        heartbeat.write(tmp_path / "heartbeats", other)
        time.sleep(0.05)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_files_of_an_older_run_do_not_count(tmp_path: Path) -> None:
    directory = tmp_path / "heartbeats"
    directory.mkdir()
    for rank in range(4):
        old = replace(heartbeat.first_heartbeat(rank, "old"), pid=2**22 + 1, state=LEFT, reason="old", blamed=rank)
        heartbeat.write(directory, old)
    heartbeat.path_of(directory, 1).unlink()
    ranks = start(tmp_path, ["at_work(1)\ndog.finish()"] * 2)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors
    assert [found.rank for found in heartbeat.read_all(directory)] == [0, 1]


def test_a_full_disk_is_said_once_and_ends_nobody(tmp_path: Path) -> None:
    """Nobody's beats arrive then; who cannot write draws no conclusion from the silence of others."""
    full = """
elsewhere()
write, filled_at = heartbeat.write, time.monotonic() + 0.6
def write_or_fail(*given):
    if time.monotonic() > filled_at:
        raise OSError(28, "No space left on device")
    write(*given)
heartbeat.write = write_or_fail
"""
    ranks = start(tmp_path, ["time.sleep(2)\ndog.finish()"] * 2, before=full, dead_after_s=0.6)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors
    assert ranks.log(0).count("the heartbeat cannot be written") == 1


def test_what_an_older_run_left_is_gone_even_if_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "heartbeats"
    directory.mkdir()
    heartbeat.write(directory, replace(heartbeat.first_heartbeat(0, "old"), state=LEFT, reason="old", blamed=0))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat, "write", fail)
    with Watchdog(tmp_path, World(), timeout_s=60):
        assert heartbeat.read(directory, 0) is None


def test_a_file_server_that_is_away_for_a_while_ends_nobody(tmp_path: Path) -> None:
    away = """
elsewhere()
write, away_at = heartbeat.write, float("inf")
def write_late(*given):
    while away_at < time.monotonic() < away_at + 1 + 0.4 * rank:
        time.sleep(0.02)
    write(*given)
heartbeat.write = write_late
"""
    body = "away_at = time.monotonic() + 0.3\ntime.sleep(2)\ndog.finish()"
    ranks = start(tmp_path, [body, body], before=away, dead_after_s=0.8)
    codes, errors = ranks.end()
    assert codes == [0, 0], errors


def test_a_directory_that_cannot_be_made_ends_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Watchdog(tmp_path / "file", World(), timeout_s=60) as dog:
        dog.progress(step=1, phase="forward")


def test_progress_is_cheap(tmp_path: Path) -> None:
    with Watchdog(tmp_path, World(), timeout_s=60) as dog:
        started = time.perf_counter()
        for step in range(10_000):
            dog.progress(step=step, phase="forward")
        assert time.perf_counter() - started < 0.5  # 50 us a call; some thousand times less than a micro-batch


def test_gloo_tells_of_a_dead_peer_and_the_watchdog_of_its_name(tmp_path: Path) -> None:
    """The error is gloo's own, as the main thread meets it inside a collective."""
    script = tmp_path / "rank.py"
    script.write_text(f"""
import os, signal, sys, time
import torch
import torch.distributed as dist
from pathlib import Path
from sft_dist.errors import RankLostError
from sft_dist.watchdog import Watchdog
from sft_dist.world import read_world
world = read_world()
with Watchdog(Path({str(tmp_path)!r}), world, timeout_s=60) as dog:
    dist.init_process_group("gloo")
    dog.watch_peers()
    dog.progress(step=1, phase="forward")
    dist.all_reduce(torch.ones(4))
    if world.rank == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        dist.all_reduce(torch.ones(4))
    except RuntimeError as error:
        lost = dog.explain(error)
        print(f"{{time.monotonic() - started:.1f}} s: {{lost}}", flush=True)
    os._exit(0)
""")
    with pytest.raises(AssertionError, match=r"s: rank 1 on \S+ \(pid \d+\) died after step 1"):
        tiny.run_ranks([str(script)], world_size=2, timeout_s=60)


def test_the_error_has_the_exit_code_of_a_lost_rank() -> None:
    assert RankLostError.exit_code == 5


def test_a_beat_tells_how_long_the_rank_computes_by_itself(tmp_path: Path) -> None:
    with Watchdog(tmp_path, World(), timeout_s=60) as dog:
        dog.progress(forward_s=0.25)
        dog.progress(step=2)
    found = heartbeat.read(tmp_path / "heartbeats", 0)
    assert found is not None
    assert (found.forward_s, found.world_size) == (0.25, 1)


def test_what_the_processes_of_the_start_before_said_is_kept_for_the_record(tmp_path: Path) -> None:
    directory = tmp_path / "heartbeats"
    directory.mkdir()
    for rank, reason in enumerate(("", "rank 0 died", "rank 0 died")):
        heartbeat.write(directory, replace(heartbeat.first_heartbeat(rank, "old"), reason=reason))
    with Watchdog(tmp_path, World(), timeout_s=60) as dog:
        assert dog.earlier_reason == "rank 0 died"
    with Watchdog(tmp_path, World(), timeout_s=60) as dog:
        assert dog.earlier_reason == ""
