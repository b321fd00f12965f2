"""Signals that ask for a stop, in and around a slow save: one checkpoint, exit code 0, and the run goes on."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist import heartbeat
from sft_dist.run_files import INTERRUPTED, STOP_FILE
from tests.faults.runs import STEPS, Plan, Ranks, Run, shared_lab
from tests.faults.table import engines, fault

SLOW_STEPS: Plan = {"slow_step_s": 0.05}
SLOW_SAVES: Plan = {"slow_step_s": 0.02, "slow_write_s": 1.0}

Act = Callable[[Run, Ranks], None]


def saves(run: Run) -> list[Path]:
    """Checkpoints that are being written."""
    return list(run.checkpoints.glob(".step-*"))


def signal_one(number: signal.Signals, *, rank: int) -> Act:
    def act(run: Run, ranks: Ranks) -> None:
        wait_for_steps(run, ranks, 2)
        ranks.signal(number, rank)

    return act


def stop_file(run: Run, ranks: Ranks) -> None:
    wait_for_steps(run, ranks, 2)
    (run.directory / STOP_FILE).touch()


def signal_all_early(run: Run, ranks: Ranks) -> None:
    """As soon as all ranks are in the process group."""
    pids = [process.pid for process in ranks.processes]
    ranks.wait_until(lambda: [beat.pid for beat in heartbeat.read_all(run.heartbeats)] == pids)
    ranks.signal(signal.SIGTERM)


def signal_all_in_a_save(run: Run, ranks: Ranks) -> None:
    ranks.wait_until(lambda: saves(run))
    time.sleep(0.3)
    assert saves(run)
    ranks.signal(signal.SIGTERM)


def thrice(first: signal.Signals, later: signal.Signals) -> Act:
    """The later two while the save is written that the first asked for."""

    def act(run: Run, ranks: Ranks) -> None:
        wait_for_steps(run, ranks, 1)
        ranks.wait_until(lambda: not saves(run))
        ranks.signal(first)
        ranks.wait_until(lambda: saves(run))
        ranks.signal(later)
        time.sleep(0.3)
        assert saves(run)
        ranks.signal(later)

    return act


def wait_for_steps(run: Run, ranks: Ranks, count: int) -> None:
    """Until so many steps were done in this start."""
    ranks.wait_until(lambda: run.is_started(ranks) and run.last_step() - run.resumed_from() >= count)


REQUESTS: tuple[tuple[str, Act, Plan], ...] = (
    ("SIGTERM to rank 1 only", signal_one(signal.SIGTERM, rank=1), SLOW_STEPS),
    ("SIGUSR1 to rank 0 only", signal_one(signal.SIGUSR1, rank=0), SLOW_STEPS),
    ("SIGINT to rank 1 only", signal_one(signal.SIGINT, rank=1), SLOW_STEPS),
    ("the file STOP", stop_file, SLOW_STEPS),
    ("SIGTERM to all ranks while they start", signal_all_early, SLOW_STEPS),
    ("SIGTERM to all ranks in a slow save", signal_all_in_a_save, SLOW_SAVES),
    ("SIGTERM to all ranks, and twice again in the slow save", thrice(signal.SIGTERM, signal.SIGTERM), SLOW_SAVES),
    ("SIGINT to all ranks, and SIGTERM twice in the slow save", thrice(signal.SIGINT, signal.SIGTERM), SLOW_SAVES),
)


@pytest.mark.parametrize("engine", engines("zero2"))
def test_a_run_that_is_asked_to_stop_saves_once_and_goes_on(engine: str) -> None:
    lab, stopped = shared_lab(), 0
    reference = lab.undisturbed(engine)
    with lab.run("stopped", engine) as run:
        for name, act, plan in REQUESTS:
            with fault(name, engine=f"{engine} x 2") as outcome:
                ranks = run.start({0: plan, 1: plan})
                act(run, ranks)
                ended = ranks.wait()
                assert ended.codes == (0, 0), "\n".join(ended.said)
                assert run.resumed_from() == stopped, "it goes on where it stopped"
                stopped = run.last_step()
                assert run.resumed_from() < stopped < STEPS
                assert run.good_steps()[-1] == stopped
                assert not saves(run)
                assert json.loads((run.directory / INTERRUPTED).read_text())["step"] == stopped
                assert not (run.directory / STOP_FILE).exists()
                assert f"stopped on request after step {stopped}" in ended.said[0]
                outcome.text = f"both ranks saved step {stopped} and ended with exit code 0; INTERRUPTED written"
        name = "SIGTERM to all ranks, and SIGKILL in the slow save, as a launcher does that loses patience"
        with fault(name, engine=f"{engine} x 2") as outcome:
            ranks = run.start({0: SLOW_SAVES, 1: SLOW_SAVES})
            wait_for_steps(run, ranks, 1)
            ranks.signal(signal.SIGTERM)
            ranks.wait_until(lambda: saves(run))
            ranks.signal(signal.SIGKILL)
            assert ranks.wait().codes == (-signal.SIGKILL, -signal.SIGKILL)
            assert run.good_steps()[-1] == stopped
            outcome.text = f"step {stopped}, saved before, is the newest whole checkpoint"
        with fault("the run after all these requests", engine=f"{engine} x 2") as outcome:
            equal = run.finish(reference)
            assert run.resumed_from() == stopped
            assert not (run.directory / INTERRUPTED).exists()
            outcome.text = f"went on from where it had stopped each time; {equal}"
